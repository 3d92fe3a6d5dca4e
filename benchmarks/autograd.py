"""
autograd.py - what does an eager call with gradients cost, forward and backward? Microseconds of torch.autograd.grad of
one call, on the CPU, of a problem so small that it is all overhead, and of the smallest that is not; median over bursts
of 20, all contenders in turn. Beside it the least of the bursts: the median moves with what else the machine does.
"""

import statistics
import sys

import contenders as who
import harness
import timers
from report import Table


def rows() -> list[harness.Row]:
    return [
        harness.Row(who.Problem(1, heads, seqlen, head_dim, is_causal, "float32"), "float32", seqlen, quick=True)
        for heads, seqlen, head_dim in ((2, 8, 16), (8, 128, 64))
        for is_causal in (False, True)
    ]


def contenders() -> list[who.Contender]:
    return [who.with_gradients(item) for item in (who.sdpa("sdpa", None), who.flashcore())]


def measure(job: harness.Job) -> dict:
    times = timers.host_times(job.single(), bursts=10 if job.options.quick else 200)
    return {name: {"us": statistics.median(samples), "least": min(samples)} for name, samples in times.items()}


QUESTION = harness.Question(
    name="autograd",
    text=__doc__,
    device="cpu",
    rows=rows,
    contenders=contenders,
    measure=measure,
    tables=(Table("us forward and backward, median / least of bursts", ("us", "least")),),
)

if __name__ == "__main__":
    sys.exit(harness.main(QUESTION))
