"""
tuning.py - what does tuning gain? The 40 shapes of `python -m flashcore tune`, each on the kernel that the planner
chooses by itself and on the one that flashcore.autotune found, device time back to back, in turn, inputs rotating over
8 sets. The planner should leave little to find: under 3% by geometric mean.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile

import contenders as who
import harness
import report
import timers
from report import Table

SETS = 8
MOST_GAIN = 1.03


def problem_of(shape) -> who.Problem:
    """Of a flashcore._tune.Shape."""
    heads_kv = 0 if shape.num_heads_kv == shape.num_heads_q else shape.num_heads_kv
    sizes = (shape.batch, shape.num_heads_q, shape.seqlen, shape.head_dim)
    return who.Problem(*sizes, shape.is_causal, shape.dtype, heads_kv)


def rows() -> list[harness.Row]:
    from flashcore._tune import SHAPES

    problems = [problem_of(shape) for shape in SHAPES]
    return [harness.Row(problem, problem.dtype, index + 1, quick=index < 2) for index, problem in enumerate(problems)]


@contextlib.contextmanager
def untuned():
    """Nothing tuned inside; afterwards what the cache holds, as in a new process."""
    from flashcore import _C

    _C.clear_tuned()
    try:
        yield
    finally:
        sys.modules["flashcore.autotune"]._load()


def planner() -> who.Contender:
    return who.Contender("planner", who.flashcore().prepare, untuned)


def tuned() -> who.Contender:
    def prepare(inputs):
        import flashcore

        arguments = (inputs.query, inputs.key, inputs.value)
        if not flashcore.explain(*arguments, is_causal=inputs.is_causal).tuned:
            flashcore.autotune(*arguments, is_causal=inputs.is_causal)
        return who.flashcore().prepare(inputs)

    return who.Contender("tuned", prepare, kind="ours")


def measure(job: harness.Job) -> dict:
    times = timers.device_times(job.per_set(), job.effort)
    return {name: {"us": statistics.median(times[name]), "kernel": kernel} for name, kernel in kernels(job).items()}


def kernels(job: harness.Job) -> dict[str, str]:
    import flashcore

    inputs, result = job.inputs[0], {}
    for item in job.contenders:
        with item.scope():
            plan = flashcore.explain(inputs.query, inputs.key, inputs.value, is_causal=inputs.is_causal)
        result[item.name] = plan.kernel
    return result


def conclude(results: list[dict], options: argparse.Namespace) -> harness.Conclusion:
    gains = [result["speed"] for result in results if result.get("speed")]
    if not gains:
        return harness.Conclusion([])
    mean = report.geometric_mean(gains)
    lines = [
        f"tuning gains {100 * (mean - 1):.1f}% by geometric mean over {len(gains)} shapes, "
        f"{'under' if mean < MOST_GAIN else 'NOT under'} {100 * (MOST_GAIN - 1):.0f}%; another kernel at:"
    ]
    for result in results:
        each = {name: figures.get("kernel") for name, figures in result["contenders"].items()}
        if each["tuned"] != each["planner"]:
            lines.append(f"  {result['name']}: {each['tuned']} for {each['planner']}, {result['speed']:.2f}x")
    return harness.Conclusion(lines, mean < MOST_GAIN, {"gain": mean})


QUESTION = harness.Question(
    name="tuning",
    text=__doc__,
    device="cuda",
    rows=rows,
    contenders=lambda: [planner(), tuned()],
    measure=measure,
    tables=(Table("us per call, back to back", ("us",), "{:.2f}"),),
    sets=lambda problem, cache_bytes: SETS,
    conclude=conclude,
)


def main() -> int:
    with tempfile.TemporaryDirectory() as cache:  # nobody's choices, and nobody gets these
        os.environ |= {"FLASHCORE_AUTOTUNE": "1", "FLASHCORE_CACHE": cache}
        return harness.main(QUESTION)


if __name__ == "__main__":
    sys.exit(main())
