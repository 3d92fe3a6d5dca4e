"""
forward.py - how fast is the forward on a GPU? TFLOP/s of device time against PyTorch's SDPA backends and
FlashAttention-3.

The grid is 16,384 tokens of hidden size 2048 (batch * seqlen = 16,384, heads * head_dim = 2048) in float16; below it
are large and long shapes. Causal counts half the operations. Each figure is the median over CUDA graphs of many calls
on input sets that together exceed the L2 cache, all contenders timed in turn. Below the tables: the geometric mean of
each head_dim and mask.
"""

import argparse
import statistics
import sys

import contenders as who
import harness
import report
import timers
from report import Table

TOKENS = 16_384
HIDDEN = 2_048

LARGE = (  # num_heads_q, num_heads_kv (0: the same), seqlen, head_dim, is_causal; batch 1
    (96, 0, 2_048, 128, True),
    (96, 0, 2_048, 128, False),
    (32, 0, 2_048, 128, True),
    (64, 0, 2_048, 128, True),
    (128, 0, 2_048, 128, True),
    (1, 0, 32_768, 64, True),
    (8, 0, 32_768, 64, True),
    (32, 8, 32_768, 128, True),
    (8, 0, 131_072, 128, True),
)


def rows() -> list[harness.Row]:
    grid = [
        harness.Row(
            who.Problem(TOKENS // seqlen, HIDDEN // head_dim, seqlen, head_dim, is_causal),
            panel=f"D{head_dim} {'causal' if is_causal else 'full'}",
            x=seqlen,
            quick=seqlen == 1_024,
        )
        for head_dim in (64, 128, 256)
        for is_causal in (False, True)
        for seqlen in (512, 1_024, 2_048, 4_096, 8_192, 16_384)
    ]
    large = [
        harness.Row(who.Problem(1, heads, seqlen, head_dim, is_causal, num_heads_kv=heads_kv), "large", index + 1)
        for index, (heads, heads_kv, seqlen, head_dim, is_causal) in enumerate(LARGE)
    ]
    return grid + large


def measure(job: harness.Job) -> dict:
    times = timers.device_times(job.per_set(), job.effort)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return {name: {"us": us, "tflops": job.problem.flops / us / 1e6} for name, us in medians.items()}


def conclude(results: list[dict], options: argparse.Namespace) -> harness.Conclusion:
    """Of each panel the geometric mean of our speed against the best peer, and against the bars that rows have."""
    lines, facts = [], {}
    for panel in dict.fromkeys(result["panel"] for result in results):
        here = [result for result in results if result["panel"] == panel and result.get("speed")]
        if not here:
            continue
        facts[panel] = {"speed": report.geometric_mean([result["speed"] for result in here])}
        line = f"{panel}: {facts[panel]['speed']:.3f} times the best peer"
        if ratios := [ratio for result in here if (ratio := report.of_bar(result)) is not None]:
            facts[panel] |= {"of_bars": report.geometric_mean(ratios), "least_of_bars": min(ratios)}
            line += f", {facts[panel]['of_bars']:.3f} times its bars, {min(ratios):.3f} the least"
        lines.append(line)
    return harness.Conclusion(lines, facts=facts)


QUESTION = harness.Question(
    name="forward",
    text=__doc__,
    device="cuda",
    rows=rows,
    contenders=who.gpu_contenders,
    measure=measure,
    tables=(
        Table("TFLOP/s, higher is better", ("tflops",), "{:.0f}", higher_is_better=True),
        Table("us per call", ("us",)),
    ),
    sets=who.Problem.sets_beyond,
    conclude=conclude,
)

if __name__ == "__main__":
    sys.exit(harness.main(QUESTION))
