"""
test_validate.py - the questions that look at our own library, validate.py and tuning.py, asked of the CPU path: that an
error beyond the rule is seen, that figures are labelled right, that tuning is measured against what it replaces.
"""

import argparse
import dataclasses
import json

import contenders as who
import harness
import pytest
import timers
import tuning
import validate

torch = pytest.importorskip("torch")
flashcore = pytest.importorskip("flashcore", exc_type=ImportError)

OPTIONS = argparse.Namespace(quick=False, peers_only=False)


def inputs_of(problem, seed=42):
    return problem.make("cpu", 1, seed)[0]


PROBLEMS = [
    who.Problem(2, 2, 70, 32),
    who.Problem(1, 4, 33, 64, True, num_heads_kv=2),
    who.Problem(1, 2, 50, 16, True, "bfloat16"),
    who.Problem(1, 2, 50, 16, False, "float32"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name.replace(" ", "-"))
def test_the_error_rule_is_that_of_the_tests(problem):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    import numpy as np
    from reference import expect

    inputs = inputs_of(problem)
    dtype = np.dtype(getattr(ml_dtypes, problem.dtype, None) or problem.dtype)
    arrays = [x.float().numpy().astype(dtype) for x in (inputs.query, inputs.key, inputs.value)]
    expected = expect(*arrays, is_causal=problem.is_causal)
    verdict = validate.judge(inputs, torch.from_numpy(expected.out))
    assert verdict.error < 1e-12, "another truth"
    assert verdict.allowed == pytest.approx(expected.out_bound, rel=0.3)  # libraries round exponentials differently


@pytest.mark.parametrize(
    "spoil,correct",
    [
        (lambda out: out, True),
        (lambda out: out + 0.02, False),
        (lambda out: out + 0.006, False),  # within the tolerance, but more than rounding does
        (lambda out: torch.zeros_like(out), False),
        (lambda out: out.where(out < out.max(), torch.nan), False),
    ],
)
def test_wrong_results_are_seen(spoil, correct):
    inputs = inputs_of(who.Problem(2, 8, 128, 64))
    out = flashcore.attention(inputs.query, inputs.key, inputs.value)
    assert validate.judge(inputs, spoil(out)).correct == correct


def test_configurations():
    rows = validate.rows()
    assert len({row.name for row in rows}) == len(rows) == 9
    assert {row.problem.seqlen for row in rows} == {128, 256, 512}
    assert all((row.problem.num_heads_q, row.problem.head_dim, row.problem.is_causal) == (8, 64, False) for row in rows)
    assert sum(row.quick for row in rows) == 1


def result(speed=2.0, **figures):
    ours = {"kind": "ours", "sequence_p50": 1.3, "p50": 10.0, "p99": 11.0, "correct": True, "error": 1e-4} | figures
    return {"name": "row", "problem": {"seqlen": 128, "batch": 8}, "speed": speed, "contenders": {"flashcore": ours}}


FEW = ((1, 2, 40, 16), (1, 1, 7, 8), (2, 1, 33, 64), (1, 1, 1, 64), (1, 3, 64, 8))


def test_conclusion():
    checked = validate.check_more("cpu", FEW)
    assert len({(each["name"], each["seed"]) for each in checked}) == 15
    whole = validate.summarize([result(), result(4.5)], checked)
    text = "\n".join(whole.lines)
    assert whole.passed
    assert "2/2 configurations; 15/15 other problems" in text
    assert "faster at 2/2, 2.00x to 4.50x, geometric mean 3.00x" in text
    assert "beside the prototypes' figures (H100): 2.00x to 2.00x" in text
    assert "P99 / P50 per call: at most 1.10" in text
    assert text.endswith("verdict: correct, faster everywhere")
    assert whole.facts == {"checked": checked}


@pytest.mark.parametrize(
    "results,passed,words",
    [
        ([result(), result(correct=False)], False, "1/2 configurations"),
        ([result(), result(error=float("nan"), correct=False)], False, "WRONG"),
        ([result(0.9), result()], True, "verdict: correct, NOT faster everywhere"),
        ([result(None), result()], True, "NOT faster"),
    ],
)
def test_conclusions_that_are_not_good(results, passed, words):
    whole = validate.summarize(results, validate.check_more("cpu", FEW[:1]))
    assert whole.passed == passed
    assert words in "\n".join(whole.lines)


def test_a_configuration_that_we_refuse():
    refused = result(None)
    refused["contenders"]["flashcore"] = {"kind": "ours", "refused": "because"}
    whole = validate.summarize([refused], [])
    assert not whole.passed
    assert "0/1 configurations" in whole.lines[0]


def test_wrong_seeds_fail(monkeypatch):
    def zeros(query, key, value, **options):
        return torch.zeros_like(query)

    monkeypatch.setattr(flashcore, "attention", zeros)
    whole = validate.summarize([result()], validate.check_more("cpu", FEW[:1]))
    assert not whole.passed
    assert "0/3 other problems" in whole.lines[0]
    assert "  wrong: float16 D16 full B1 H2 S40, seed 43: error " in "\n".join(whole.lines)


def test_figures_of_a_configuration(monkeypatch):
    """The warm-ups are left out, and per sequence is per call divided by the batch."""
    asked = []

    def fake(calls, samples):
        asked.append(samples)
        return {name: [1e6] * 100 + list(range(1, samples - 99)) for name in calls}

    monkeypatch.setattr(timers, "single_call_times", fake)
    problem = who.Problem(4, 1, 20, 16)
    contenders = [who.sdpa("math", "MATH"), who.flashcore()]
    job = harness.Job(problem, problem.make("cpu", 1), contenders, timers.QUICK, OPTIONS)
    figures = validate.measure(job)
    assert asked == [1_100]
    assert figures.keys() == {"math", "flashcore"}
    for each in figures.values():
        assert (each["us"], each["p50"], each["p95"], each["p99"], each["trials"]) == (500, 500, 950, 990, 1_000)
        assert (each["sequence_p50"], each["sequence_p95"], each["sequence_p99"]) == (125, 237.5, 247.5)
        assert each["correct"] is True
        assert 0 < each["error"] <= each["allowed"] < 0.01


# Tuning


def test_tuning_has_the_shapes_of_the_command():
    rows = tuning.rows()
    assert len({row.name for row in rows}) == len(rows) == 40


def test_tuning_is_measured_against_what_it_replaces(monkeypatch, tmp_path, capsys):
    from flashcore import _C

    if sum(kernel.device == "cpu" and kernel.usable for kernel in flashcore.kernels()) < 2:
        pytest.skip("this CPU has one kernel, and no choice")
    monkeypatch.setenv("FLASHCORE_CACHE", str(tmp_path))
    monkeypatch.setenv("FLASHCORE_AUTOTUNE", "1")
    monkeypatch.setattr(who.Inputs, "explain", lambda inputs: "a plan")
    autotune = flashcore.autotune
    fake = {"cpu_baseline": 1.0}

    def prefer_baseline(*arguments, **options):
        return autotune(
            *arguments, **options, progress=None, measure=lambda candidate, calls: fake.get(candidate.kernel, 2.0)
        )

    def measure(job):
        times = timers.wall_times(job.single(), job.effort)
        return {name: {"us": min(times[name]), "kernel": kernel} for name, kernel in tuning.kernels(job).items()}

    monkeypatch.setattr(flashcore, "autotune", prefer_baseline)
    rows = [harness.Row(who.Problem(1, 2, 256, 64, True, "float32"), "panel", 1, quick=True)]
    question = dataclasses.replace(tuning.QUESTION, device="cpu", rows=lambda: rows, measure=measure)
    path = tmp_path / "result.json"
    _C.clear_tuned()
    try:
        status = harness.main(question, ["--quick", "--json", str(path)])
    finally:
        _C.clear_tuned()
    (row,) = json.loads(path.read_text())["results"]
    assert row["contenders"]["tuned"]["kernel"].startswith("cpu_baseline")
    assert not row["contenders"]["planner"]["kernel"].startswith("cpu_baseline")
    assert row["speed"] < 0.9, "baseline instructions are slower, so both ran what they said"
    assert status == 0
    out = capsys.readouterr().out
    assert "another kernel at:" in out
    assert "float32 D64 causal B1 H2 S256: cpu_baseline for cpu_" in out


def test_a_gain_that_the_planner_should_have_had():
    def row(speed):
        contenders = {"planner": {"kernel": "a"}, "tuned": {"kernel": "b"}}
        return {"name": "row", "speed": speed, "contenders": contenders}

    assert tuning.conclude([row(1.02), row(1.0)], OPTIONS).passed
    whole = tuning.conclude([row(1.10), row(1.0)], OPTIONS)
    assert not whole.passed
    assert "4.9% by geometric mean over 2 shapes, NOT under 3%" in whole.lines[0]
    assert whole.lines[1] == "  row: b for a, 1.10x"
