"""
cpu.py - how fast is the CPU path? GFLOP/s against PyTorch's SDPA backends on the same threads, timed in turn, median
wall time. One batch of 8 heads; causal counts half the operations. The inputs stay in cache between calls, as they do
in a model.
"""

import statistics
import sys

import contenders as who
import harness
import timers
from report import Table


def rows() -> list[harness.Row]:
    shapes = [(seqlen, 64) for seqlen in (16, 128, 256, 512, 1024, 2048, 4096)] + [(2048, 128)]
    return [
        harness.Row(
            who.Problem(1, 8, seqlen, head_dim, is_causal, dtype),
            panel=f"{dtype} {'causal' if is_causal else 'full'} D{head_dim}",
            x=seqlen,
            quick=seqlen <= 128,
        )
        for dtype in ("float32", "float16", "bfloat16")
        for is_causal in (False, True)
        for seqlen, head_dim in shapes
    ]


def measure(job: harness.Job) -> dict:
    times = {name: statistics.median(samples) for name, samples in timers.wall_times(job.single(), job.effort).items()}
    return {name: {"us": us, "gflops": job.problem.flops / us / 1e3} for name, us in times.items()}


QUESTION = harness.Question(
    name="cpu",
    text=__doc__,
    device="cpu",
    rows=rows,
    contenders=who.cpu_contenders,
    measure=measure,
    tables=(
        Table("GFLOP/s, higher is better", ("gflops",), "{:.0f}", higher_is_better=True),
        Table("us per call", ("us",)),
    ),
)

if __name__ == "__main__":
    sys.exit(harness.main(QUESTION))
