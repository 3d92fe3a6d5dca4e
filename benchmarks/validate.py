"""
validate.py - is it right and fast at short sequences, call by call? 9 configurations (S 128, 256, 512; B 8, 16, 32;
H 8, D 64, float16, no mask), 100 calls to warm up and 1,000 trials each, random seed 42, every backend of PyTorch's
SDPA beside us, in turn. The prototypes that came before this library were measured so; their figures are printed, too.

A trial is the device time of one call: a CUDA graph of that call between two events, inputs rotating over 8 sets. Per
call is just that; per sequence is the call's time divided by its batch, which says nothing of how long one waits.

Correct is what is within 1e-2 of the formula in float64, the prototypes' tolerance, and within our own error rule: at
most twice the error of the formula whose scores, probabilities and output are rounded to float16. That is asked of
every contender at each configuration, and of us at 5 more shapes with 3 random seeds each.
"""

import argparse
import dataclasses
import sys

import contenders as who
import harness
import report
import timers
from report import Table

SETS = 8
WARM_UPS = 100
TRIALS = 1_000
TOLERANCE = 1e-2
SEEDS = (42, 43, 44)
SHAPES = ((1, 8, 128, 64), (8, 8, 128, 64), (16, 8, 256, 64), (32, 8, 512, 64), (2, 12, 333, 64))

# What the prototypes measured, microseconds per sequence on an H100: {seqlen: {batch: P50}}.
CLAIMED = {
    128: {8: 2.60, 16: 1.36, 32: 0.74},
    256: {8: 2.86, 16: 1.78, 32: 1.18},
    512: {8: 4.34, 16: 3.15, 32: 2.57},
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    error: float  # the largest, against float64
    allowed: float  # by the error rule

    @property
    def correct(self) -> bool:
        return self.error <= min(TOLERANCE, self.allowed)  # False for NaN


def judge(inputs: who.Inputs, output) -> Verdict:
    """The error rule of tests/reference.py, on the inputs' device. Full and causal masks."""
    import torch

    exact = formula(inputs, torch.float64, rounds=False)
    rounded = formula(inputs, torch.float32, rounds=True)
    eps = torch.finfo(torch.float32).eps
    scores = inputs.query.double() @ repeated(inputs, inputs.key).double().transpose(-1, -2)
    score = float(scores.abs().max()) * inputs.query.shape[-1] ** -0.5
    sums = eps * (8 + score / 2) * float(inputs.value.abs().max())
    allowed = 2 * float((rounded - exact).abs().max()) + sums
    return Verdict(float((output.double() - exact).abs().max()), min(allowed, float(exact.abs().max()) / 2))


def repeated(inputs: who.Inputs, tensor):
    return tensor.repeat_interleave(inputs.query.shape[1] // tensor.shape[1], dim=1)


def formula(inputs: who.Inputs, work, rounds: bool):
    """softmax(q k^T / sqrt(head_dim)) v, sums in `work`; with `rounds`, what is stored has the inputs' dtype."""
    import torch

    def store(x):
        return x.to(inputs.query.dtype).to(work) if rounds else x

    query, key, value = inputs.query.to(work), repeated(inputs, inputs.key).to(work), repeated(inputs, inputs.value)
    score = store(inputs.query.shape[-1] ** -0.5 * (query @ key.transpose(-1, -2)))
    if inputs.is_causal:
        rows, keys = score.shape[-2:]
        score = score.masked_fill(torch.ones(rows, keys, dtype=torch.bool, device=score.device).triu(1), -torch.inf)
    return store(store(score.softmax(-1)) @ value.to(work)).double()


def rows() -> list[harness.Row]:
    return [
        harness.Row(who.Problem(batch, 8, seqlen, 64), panel=f"S{seqlen}", x=batch, quick=(batch, seqlen) == (8, 128))
        for seqlen in CLAIMED
        for batch in CLAIMED[seqlen]
    ]


def measure(job: harness.Job) -> dict:
    share = 10 if job.options.quick else 1
    warm_ups, trials = WARM_UPS // share, TRIALS // share
    figures = {}
    for name, samples in timers.single_call_times(job.per_set(), warm_ups + trials).items():
        call = {f"p{percent}": timers.percentile(samples[warm_ups:], percent) for percent in (50, 95, 99)}
        figures[name] = {"us": call["p50"], "trials": trials} | call
        figures[name] |= {f"sequence_{key}": us / job.problem.batch for key, us in call.items()}
    for item in job.contenders:
        verdict = judge(job.inputs[0], harness.try_once(item, job.inputs[0]))
        figures[item.name] |= {"error": verdict.error, "allowed": verdict.allowed, "correct": verdict.correct}
    return figures


def check_more(device: str, shapes) -> list[dict]:
    """Our correctness at these shapes, once for each seed."""
    checked = []
    for batch, heads, seqlen, head_dim in shapes:
        problem = who.Problem(batch, heads, seqlen, head_dim)
        for seed in SEEDS:
            (inputs,) = problem.make(device, 1, seed)
            verdict = judge(inputs, harness.try_once(who.flashcore(), inputs))
            checked.append({"name": problem.name, "seed": seed, "correct": verdict.correct, **vars(verdict)})
    return checked


def conclude(results: list[dict], options: argparse.Namespace) -> harness.Conclusion:
    if options.peers_only:
        return harness.Conclusion([])
    return summarize(results, check_more("cuda", SHAPES[:1] if options.quick else SHAPES))


def summarize(results: list[dict], checked: list[dict]) -> harness.Conclusion:
    ours = [result["contenders"]["flashcore"] for result in results]
    correct = [figures.get("correct", False) for figures in ours]
    wrong = [each for each in checked if not each["correct"]]
    lines = [
        f"correct (an error of {TOLERANCE:g} at most, and the error rule): {sum(correct)}/{len(results)} "
        f"configurations; {len(checked) - len(wrong)}/{len(checked)} other problems (shapes x seeds {SEEDS})"
    ]
    lines += [f"  wrong: {each['name']}, seed {each['seed']}: error {each['error']:.3g}" for each in wrong]
    speeds = [result["speed"] for result in results if result.get("speed")]
    if speeds:
        lines.append(
            f"P50 per call against the best backend: faster at {sum(speed > 1 for speed in speeds)}/{len(results)}, "
            f"{min(speeds):.2f}x to {max(speeds):.2f}x, geometric mean {report.geometric_mean(speeds):.2f}x"
        )
    measured = [result for result in results if "sequence_p50" in result["contenders"]["flashcore"]]
    if measured:
        claims = list(map(against_claim, measured))
        lines += [
            f"P50 per sequence beside the prototypes' figures (H100): {min(claims):.2f}x to {max(claims):.2f}x, "
            f"geometric mean {report.geometric_mean(claims):.2f}x",
            f"P99 / P50 per call: at most {max(each['p99'] / each['p50'] for each in ours if 'p50' in each):.2f}",
        ]
    is_right = all(correct) and not wrong
    is_fast = len(speeds) == len(results) and min(speeds) > 1
    lines.append(f"verdict: {'correct' if is_right else 'WRONG'}, {'faster' if is_fast else 'NOT faster'} everywhere")
    return harness.Conclusion(lines, is_right, {"checked": checked})


def against_claim(result: dict) -> float:
    problem = result["problem"]
    return CLAIMED[problem["seqlen"]][problem["batch"]] / result["contenders"]["flashcore"]["sequence_p50"]


QUESTION = harness.Question(
    name="validate",
    text=__doc__,
    device="cuda",
    rows=rows,
    contenders=who.gpu_contenders,
    measure=measure,
    tables=(
        Table("us per call: P50 / P95 / P99", ("p50", "p95", "p99")),
        Table("us per sequence (a call's time divided by its batch): P50 / P95 / P99",
              ("sequence_p50", "sequence_p95", "sequence_p99"), "{:.2f}"),
        Table("largest error against float64 / what the error rule allows", ("error", "allowed"), "{:.1e}"),
    ),
    sets=lambda problem, cache_bytes: SETS,
    conclude=conclude,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(harness.main(QUESTION))
