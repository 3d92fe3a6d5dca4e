"""
host.py - how long does an eager call keep the host? Microseconds until the call returns, small GPU problems, median
over bursts of 20 calls, each burst after a synchronization, all contenders in turn. Beside them an elementwise
PyTorch operation with three inputs (addcmul), our call into a given output, and forward and backward of a call whose
inputs require gradients.
"""

import dataclasses
import functools
import statistics
import sys

import contenders as who
import harness
import timers
from report import Table


def into_output() -> who.Contender:
    def prepare(inputs):
        import torch

        import flashcore

        return functools.partial(
            flashcore.attention,
            inputs.query,
            inputs.key,
            inputs.value,
            is_causal=inputs.is_causal,
            out=torch.empty_like(inputs.query),
        )

    return who.Contender("flashcore out=", prepare, kind="note")


def elementwise() -> who.Contender:
    def prepare(inputs):
        import torch

        return functools.partial(torch.addcmul, inputs.query, inputs.key, inputs.value)

    return who.Contender("addcmul", prepare, kind="note")


def training(contender: who.Contender) -> who.Contender:
    return dataclasses.replace(who.with_gradients(contender), name=f"{contender.name} + backward", kind="note")


def rows() -> list[harness.Row]:
    shapes = [(1, 128, False), (8, 128, False), (1, 128, True)]
    return [
        harness.Row(who.Problem(batch, 8, seqlen, 64, is_causal), "causal" if is_causal else "full", batch, quick=True)
        for batch, seqlen, is_causal in shapes
    ]


def contenders() -> list[who.Contender]:
    sdpa, ours = who.sdpa("sdpa", None), who.flashcore()
    return [sdpa, who.flash_attention_3(), elementwise(), training(sdpa), training(ours), into_output(), ours]


def measure(job: harness.Job) -> dict:
    times = timers.host_times(job.single(), bursts=10 if job.options.quick else 200)
    return {
        name: {"us": statistics.median(samples), "p95": timers.percentile(samples, 95)}
        for name, samples in times.items()
    }


QUESTION = harness.Question(
    name="host",
    text=__doc__,
    device="cuda",
    rows=rows,
    contenders=contenders,
    measure=measure,
    tables=(Table("host us per call, median / P95 of bursts", ("us", "p95")),),
)

if __name__ == "__main__":
    sys.exit(harness.main(QUESTION))
