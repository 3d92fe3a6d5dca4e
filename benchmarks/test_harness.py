"""
test_harness.py - the harness itself, on the CPU: what counts as best, when a bar is missed, that a wrong result is
noticed, and what a machine without a GPU is told. A stand-in plays our part, so that no build is needed.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time

import contenders as who
import cpu
import forward
import harness
import models
import options
import pytest
import report
import short
import timers

US = report.Table("us", ("us",))
TFLOPS = report.Table("TFLOP/s", ("tflops",), higher_is_better=True)
HERE = pathlib.Path(__file__).resolve().parent


def result(ours, **peers):
    contenders = {name: {"kind": "peer", "us": us, "tflops": 12 / us} for name, us in peers.items()}
    contenders["flashcore"] = {"kind": "ours"} | ({"us": ours, "tflops": 12 / ours} if ours else {"refused": "because"})
    contenders["refusing"] = {"kind": "peer", "refused": "because"}
    contenders["addcmul"] = {"kind": "note", "us": 0.1, "tflops": 120.0}
    return {"name": "row", "panel": "p", "x": 1, "contenders": contenders}


@pytest.mark.parametrize("table", [US, TFLOPS])
def test_best_is_the_fastest_peer(table):
    assert report.compare(result(2.0, cudnn=4.0, flash=3.0), table) == ("flash", 1.5)
    assert report.compare(result(None, cudnn=4.0, flash=3.0), table) == ("flash", None)
    assert report.compare(result(2.0), table) == (None, None)


@pytest.mark.parametrize(
    ("bar", "passed"),
    [
        ({"speed": 1.5}, True),
        ({"speed": 1.51}, False),
        ({"speed": 2.0, "peer": "cudnn"}, True),
        ({"speed": 2.1, "peer": "cudnn"}, False),
        ({"speed": 0.1, "peer": "refusing"}, None),
        ({"us": 2.0}, True),
        ({"us": 1.9}, False),
    ],
)
def test_bar(bar, passed):
    judged = result(2.0, cudnn=4.0, flash=3.0)
    report.judge(judged, US, bar)
    assert judged["passed"] is passed
    refused = result(None, cudnn=4.0)
    report.judge(refused, US, bar)
    assert refused["passed"] is False


def test_a_forward_run_sums_up_its_panels():
    rows = [result(2.0, cudnn=4.0, flash=3.0), result(2.0, cudnn=5.0, flash=6.0), result(None, cudnn=1.0)]
    for row, bar in zip(rows, ({"speed": 1.6, "peer": "cudnn"}, {"us": 3.2}, None), strict=True):
        report.judge(row, US, bar)
    (line,) = forward.conclude(rows, None).lines
    means = (1.5 * 2.5) ** 0.5, (1.25 * 1.6) ** 0.5
    assert line == f"p: {means[0]:.3f} times the best peer, {means[1]:.3f} times its bars, 1.250 the least"


def test_markdown():
    judged = result(2.0, cudnn=4.0, flash=3.0)
    report.judge(judged, US, {"speed": 1.6})
    table = report.markdown([judged, result(6.0, cudnn=4.0)], US, judged=True).splitlines()
    assert table[2] == "| shape | cudnn | flash | flashcore | refusing | addcmul | ours / best | bar |"
    assert table[4] == "| row | 4.0 | 3.0 | **2.0** | - | 0.1 | 1.50 | MISS |"
    assert table[5] == "| row | **4.0** | - | 6.0 | - | 0.1 | 0.67 | - |"
    assert report.markdown([judged], report.Table("none has it", ("gflops",))) == ""


@pytest.mark.parametrize(
    ("question", "count"),
    [(forward.QUESTION, 41), (short.QUESTION, 16), (options.QUESTION, 6), (models.question("cuda"), 28)],
)
def test_shipped_bars_name_rows(question, count):
    path = HERE / "bars" / f"{question.name}.json"
    bars = json.loads(path.read_text())
    bars.pop("about")
    rows = [row.name for row in question.rows()]
    assert len(bars) == count
    assert report.read_bars(str(path), rows) == bars
    assert len(set(rows)) == len(rows)


def test_bad_bar_is_refused(tmp_path):
    path = tmp_path / "bars.json"
    path.write_text('{"row": {"speed": 1.0, "us": 3.0}}')
    with pytest.raises(ValueError, match=r"row.*give"):
        report.read_bars(str(path), ["row"])


def test_figures_of_a_problem():
    problem = who.Problem(2, 8, 1_024, 64, num_heads_kv=2)
    assert problem.flops == 2 * 8 * (2 * 1_024 * 1_024 * 64) * 2  # two matmuls of 2 m n k
    assert dataclasses.replace(problem, is_causal=True).flops == problem.flops / 2
    assert problem.bytes == 2 * 1_024 * 64 * (8 + 2 + 2 + 8) * 2  # q k v o, two bytes each
    assert problem.sets_beyond(50 * 2**20) * problem.bytes >= 2 * 50 * 2**20
    assert problem.sets_beyond(0) == 2


def test_percentile():
    samples = list(range(100, 0, -1))
    assert [timers.percentile(samples, percent) for percent in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert timers.percentile([7.0], 99) == 7.0


def test_a_slow_host_is_in_the_time_as_called_alone():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU that PyTorch can use")
    x = torch.zeros(1, device="cuda")

    def call():
        x.add_(1)
        time.sleep(0.002)
        x.add_(1)

    calls = {"slow": (call, contextlib.nullcontext)}
    (called,), (queued,) = (take(calls, timers.QUICK).values() for take in (timers.called_times, timers.queued_times))
    assert min(called) > 2_000
    assert statistics.median(queued) < 500


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """Asks a small CPU question, with `attention` in our place; gives the exit status, stdout and the JSON."""
    torch = pytest.importorskip("torch")

    def run(attention, *arguments):
        ours = who.Contender("flashcore", lambda inputs: lambda: attention(torch, inputs), kind="ours")
        rows = [harness.Row(who.Problem(1, 2, 32, 16, True, "float32"), "panel", 32, quick=True)]
        question = dataclasses.replace(
            cpu.QUESTION, rows=lambda: rows, contenders=lambda: [who.sdpa("sdpa", None), ours]
        )
        monkeypatch.setattr(harness, "require", lambda question, options: None)
        monkeypatch.setattr(who.Inputs, "explain", lambda inputs: "a plan")
        path = tmp_path / "result.json"
        status = harness.main(question, ["--quick", "--json", str(path), *arguments])
        return status, capsys.readouterr().out, json.loads(path.read_text())

    return run


def correct(torch, inputs):
    return torch.nn.functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=True)


def forgets_the_mask(torch, inputs):
    return torch.nn.functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)


def gives_nan(torch, inputs):
    return torch.full_like(inputs.query, float("nan"))


def refuses(torch, inputs):
    raise ValueError("head_dim 16 is not served")


def test_run(ask):
    status, out, written = ask(correct)
    assert status == 0
    assert "float32 D16 causal B1 H2 S32" in out
    (row,) = written["results"]
    assert row["contenders"]["flashcore"]["us"] > 0
    assert row["plan"] == "a plan"
    assert written["settings"]["seed"] == 42
    assert written["environment"].keys() >= {"cpu", "git", "torch", "flashcore", "date"}


@pytest.mark.parametrize("attention", [forgets_the_mask, gives_nan])
def test_wrong_result_fails_the_run(ask, attention):
    status, out, _ = ask(attention)
    assert status == 1
    assert "result differs" in out


def test_refusal_is_told(ask):
    status, out, _ = ask(refuses, "--bar", "0.001")
    assert status == 1  # a bar that we do not even run at is missed
    assert "head_dim 16 is not served" in out


def test_a_conclusion_is_printed_stored_and_decides(ask, monkeypatch):
    concluded = harness.Conclusion(["all in all"], False, {"of": 1})
    monkeypatch.setattr(cpu, "QUESTION", dataclasses.replace(cpu.QUESTION, conclude=lambda results, options: concluded))
    status, out, written = ask(correct)
    assert status == 1
    assert "all in all" in out
    assert written["conclusion"] == {"lines": ["all in all"], "passed": False, "facts": {"of": 1}}


def test_a_sample_takes_as_long_as_asked(ask, monkeypatch):
    efforts = []

    def measure(job):
        efforts.append(job.effort)
        return {"flashcore": {"us": 1.0}}

    monkeypatch.setattr(cpu, "QUESTION", dataclasses.replace(cpu.QUESTION, measure=measure))
    ask(correct)
    ask(correct, "--sample-ms", "20")
    assert [effort.sample_us for effort in efforts] == [timers.QUICK.sample_us, 20_000]


def test_geometric_mean():
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_missed_bar_fails_the_run(ask):
    assert ask(correct, "--bar", "0.0001")[0] == 0
    assert ask(correct, "--bar", "10000")[0] == 1


def test_plot(ask, tmp_path):
    pytest.importorskip("matplotlib")
    ask(correct, "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--rows", "D77"], "no row's name"), (["--peers", "nobody"], "no such peer: nobody; there are flash, math")],
)
def test_bad_options(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(harness, "require", lambda question, options: None)
    assert harness.main(cpu.QUESTION, arguments) == 2
    assert words in capsys.readouterr().err


def test_without_gpu():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run(
        [sys.executable, str(HERE), "forward", "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr
