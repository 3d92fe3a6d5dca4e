"""
short.py - what does a short call cost on a GPU? Device microseconds at 8 heads of 64, float16, no mask, where
launches and memory weigh as much as matmuls. Asked in three ways, all contenders in turn, inputs rotating over 8
sets:

- back to back: CUDA graphs of many calls, the median.
- after a writer: each call follows an ordinary kernel that writes its query, as in a model; that kernel's own time,
  measured in the same turn, is subtracted.
- one by one: percentiles over 1,000 graphs of one call each; a graph's launch and two events are inside. The column
  "empty" is a kernel on one element taken in the same way.

Time per sequence is batch time divided by batch.
"""

import contextlib
import functools
import statistics
import sys

import contenders as who
import harness
import timers
from report import Table

SETS = 8
SINGLE_CALLS = 1_000


def rows() -> list[harness.Row]:
    return [
        harness.Row(who.Problem(batch, 8, seqlen, 64), panel=f"S{seqlen}", x=batch, quick=batch == 8 and seqlen <= 256)
        for seqlen in (128, 256, 512, 1_024)
        for batch in (1, 8, 16, 32)
    ]


def after_writer(job: harness.Job) -> dict[str, float]:
    import torch

    writes = [functools.partial(torch.mul, each.query.clone(), 1.0, out=each.query) for each in job.inputs]

    def both(write, call):
        write()
        return call()

    calls = {
        name: ([functools.partial(both, *pair) for pair in zip(writes, sets, strict=True)], scope)
        for name, (sets, scope) in job.per_set().items()
    }
    times = timers.device_times(calls | {"writer": (writes, contextlib.nullcontext)}, job.effort)
    writer = times.pop("writer")
    return {
        name: statistics.median(pair - alone for pair, alone in zip(samples, writer, strict=True))
        for name, samples in times.items()
    }


def measure(job: harness.Job) -> dict:
    import torch

    back_to_back = timers.device_times(job.per_set(), job.effort)
    figures = {name: {"us": statistics.median(samples)} for name, samples in back_to_back.items()}
    for name, us in after_writer(job).items():
        figures[name]["after_us"] = us
        figures[name]["sequence_us"] = figures[name]["us"] / job.problem.batch
    element = torch.zeros(1, device=job.inputs[0].query.device)
    empty = {"empty": ([element.zero_], contextlib.nullcontext)}
    count = SINGLE_CALLS // 10 if job.options.quick else SINGLE_CALLS
    for name, samples in timers.single_call_times(job.per_set() | empty, count).items():
        figures.setdefault(name, {}).update(
            {f"p{percent}": timers.percentile(samples, percent) for percent in (50, 95, 99)}
        )
    return figures


QUESTION = harness.Question(
    name="short",
    text=__doc__,
    device="cuda",
    rows=rows,
    contenders=who.gpu_contenders,
    measure=measure,
    tables=(
        Table("us per call, back to back", ("us",)),
        Table("us per call, after a writer", ("after_us",)),
        Table("us per sequence: batch time divided by batch, back to back", ("sequence_us",), "{:.2f}"),
        Table("us one by one: P50 / P95 / P99", ("p50", "p95", "p99")),
    ),
    sets=lambda problem, cache_bytes: SETS,
)

if __name__ == "__main__":
    sys.exit(harness.main(QUESTION))
