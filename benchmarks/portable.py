"""
portable.py - what does the portable kernel give where no architecture's own kernel serves? Device time and peak
memory against PyTorch's math backend, the only one that also takes everything. The kernel is forced
(FLASHCORE_FORCE=portable), so the question can be asked on any GPU. Peak memory is what one call adds to PyTorch's
allocator, its output included.
"""

import os
import statistics
import sys

import contenders as who
import harness
import timers
from report import Table


def rows() -> list[harness.Row]:
    return [
        harness.Row(
            who.Problem(2, 16, seqlen, head_dim, is_causal, dtype),
            panel=f"{dtype} D{head_dim} {'causal' if is_causal else 'full'}",
            x=seqlen,
            quick=seqlen == 1_024 and head_dim == 64,
        )
        for dtype in ("float16", "float32")
        for head_dim in (64, 128)
        for is_causal in (False, True)
        for seqlen in (1_024, 2_048, 4_096)
    ]


def contenders() -> list[who.Contender]:
    return [who.sdpa("math", "MATH"), who.flashcore()]


def peak_bytes(call, scope) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with scope():
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(job: harness.Job) -> dict:
    if any(item.kind == "ours" for item in job.contenders):
        plan = job.inputs[0].explain()
        if "portable" not in plan:
            raise RuntimeError(f"FLASHCORE_FORCE=portable was not obeyed; the plan is: {plan}")
    peaks = {name: peak_bytes(call, scope) for name, (call, scope) in job.single().items()}
    times = timers.device_times(job.per_set(), job.effort)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return {
        name: {"us": us, "tflops": job.problem.flops / us / 1e6, "peak_mib": peaks[name] / 2**20}
        for name, us in medians.items()
    }


QUESTION = harness.Question(
    name="portable",
    text=__doc__,
    device="cuda",
    rows=rows,
    contenders=contenders,
    measure=measure,
    tables=(
        Table("us per call", ("us",), "{:.0f}"),
        Table("TFLOP/s, higher is better", ("tflops",), higher_is_better=True),
        Table("peak memory, MiB", ("peak_mib",)),
    ),
    sets=who.Problem.sets_beyond,
)

if __name__ == "__main__":
    os.environ |= {"FLASHCORE_FORCE": "portable", "FLASHCORE_SLOW": "allow"}  # before flashcore is imported
    sys.exit(harness.main(QUESTION))
