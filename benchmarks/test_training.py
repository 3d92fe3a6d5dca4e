"""test_training.py - the training question on the CPU, 20 steps: passed, and not passed with a wrong attention."""

import json

import pytest

torch = pytest.importorskip("torch")
flashcore = pytest.importorskip("flashcore", exc_type=ImportError)
import training  # noqa: E402


@pytest.fixture
def ask(tmp_path, capsys):
    def run(*arguments):
        threads = torch.get_num_threads()
        path = tmp_path / "result.json"
        status = training.main(["--quick", "--device", "cpu", "--threads", "1", "--json", str(path), *arguments])
        torch.set_num_threads(threads)
        return status, capsys.readouterr().out, json.loads(path.read_text())

    return run


def test_a_model_learns_the_same(ask):
    status, out, written = ask()
    assert status == 0, out
    assert "float32: pass" in out
    assert "bfloat16: pass" in out
    assert len(written["results"]) == 6
    for run in written["results"]:
        assert len(run["losses"]) == 20
        assert run["losses"][0] - run["losses"][-1] > 1, "it learns"
    differences = [each["differences"] for each in written["conclusion"]["compared"]]
    assert max(map(max, differences)) > 0, "two ways of computing, though in float32 the losses may round to the same"


@pytest.mark.parametrize("factor", [0.99, float("nan")])
def test_a_wrong_attention_does_not(ask, monkeypatch, factor):
    attention = flashcore.attention
    monkeypatch.setattr(flashcore, "attention", lambda *args, **kwargs: attention(*args, **kwargs) * factor)
    status, out, _ = ask("--steps", "5")
    assert status == 1
    assert "float32: MISS" in out


def test_bfloat16_is_held_against_the_spread_of_seeds():
    def done(ours):
        losses = {"flashcore": [ours], "sdpa": [[2.0] * 40, [2.0] * 20 + [2.1] * 20, [2.0] * 40]}
        return [
            training.Run(contender, dtype, 42, each)
            for contender in losses
            for dtype in ("float32", "bfloat16")
            for each in losses[contender]
        ]

    def passed(ours):
        return [each.passed for each in training.compare(done(ours))]

    assert passed([2.0] * 40) == [True, True]
    assert passed([2.0] * 20 + [2.05] * 20) == [False, True]
    assert passed([2.0] * 10 + [2.05] * 30) == [False, True]  # the seeds differ within ten steps
    assert passed([2.0] * 9 + [2.05] * 31) == [False, False]
    assert passed([2.0] * 20 + [2.11] * 20) == [False, False]


def test_plot(ask, tmp_path):
    pytest.importorskip("matplotlib")
    ask("--steps", "3", "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert training.main(["--quick", "--device", "cuda"]) == 2
    assert "use --device cpu" in capsys.readouterr().err
