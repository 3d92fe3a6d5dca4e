"""
test_models.py - the question about whole models, asked of a tiny one on the CPU: that figures and verdicts are there,
that a wrong result is noticed, in prefill and in training, that a backend which refuses is named.
"""

import dataclasses
import json

import contenders as who
import harness
import models
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="the models are its")
flashcore = pytest.importorskip("flashcore", exc_type=ImportError)


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """Asks for one step of a tiny GPT-2; gives the exit status, stdout and the row of the JSON."""
    small = models.gpt2(2, 32, 4)
    monkeypatch.setitem(models.MODELS, "tiny", dataclasses.replace(small, sizes=small.sizes | {"vocab_size": 199}))

    def run(what, *arguments, contenders=None):
        rows = [harness.Row(models.Problem("tiny", what, "float32", 2, 24, 1), "panel", 2, quick=True)]
        question = dataclasses.replace(models.question("cpu"), rows=lambda: rows)
        if contenders:
            question = dataclasses.replace(question, contenders=lambda: contenders)
        path = tmp_path / "result.json"
        threads = torch.get_num_threads()
        status = harness.main(question, ["--quick", "--threads", "1", "--json", str(path), *arguments])
        torch.set_num_threads(threads)
        (row,) = json.loads(path.read_text())["results"]
        return status, capsys.readouterr().out, row

    return run


@pytest.mark.parametrize("what", ["prefill", "training"])
def test_run(ask, what):
    status, out, row = ask(what, "--bar", "0.0001")
    assert status == 0, out
    assert row["name"] == f"tiny (1 of 2 layers) {what} float32 B2 S24"
    assert row["plan"].startswith("cpu")
    assert row["passed"] is True
    for figures in row["contenders"].values():
        assert figures["tokens"] == pytest.approx(2 * 24 / figures["us"] * 1e3)
        assert figures["speed"] == pytest.approx(row["contenders"]["sdpa"]["us"] / figures["us"])
    assert f"{what}, other kernels: " in out
    ours = row["contenders"]["flashcore"]
    assert ours["allowed"].keys() == ({"error"} if what == "prefill" else {"loss_error", "gradient_error"})


def test_the_swap_reaches_flashcore(ask, monkeypatch):
    seen = []
    attention = flashcore.attention
    monkeypatch.setattr(flashcore, "attention", lambda *args, **kwargs: (seen.append(1), attention(*args, **kwargs))[1])
    ask("prefill", "--peers", "math")
    assert seen


@pytest.mark.parametrize("what", ["prefill", "training"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda attention, *args, **kwargs: attention(*args, **(kwargs | {"is_causal": False})),
        lambda attention, *args, **kwargs: attention(*args, **kwargs) * 1.001,
        lambda attention, *args, **kwargs: attention(*args, **kwargs) * float("nan"),
    ],
)
def test_wrong_results_are_seen(ask, monkeypatch, what, spoil):
    attention = flashcore.attention

    def wrong(*args, **kwargs):  # install() gives is_causal by place
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        return spoil(attention, **dict(zip(names, args, strict=False)), **kwargs)

    monkeypatch.setattr(flashcore, "attention", wrong)
    status, out, _ = ask(what)
    assert status == 1
    assert "WRONG at tiny" in out


def test_refusals_are_named(ask):
    def refuses(inputs):
        raise who.Refused("no such kernel")

    stand_in = who.Contender("cudnn", refuses)
    _, out, row = ask("prefill", contenders=[*models.contenders("cpu"), stand_in])
    assert row["contenders"]["cudnn"]["refused"] == "no such kernel"
    assert "cudnn refused tiny (1 of 2 layers) prefill float32 B2 S24: no such kernel" in out


def test_the_math_backend_is_not_given_what_does_not_fit():
    problem = models.Problem("gpt2", "training", "bfloat16", 32, 1_024, 12)
    inputs = models.Inputs(problem, lambda name: None, {}, 1, 32 * 12 * 1_024**2)
    with pytest.raises(who.Refused, match="scores in memory"):
        models.sdpa("math", "MATH").prepare(inputs)
    models.sdpa("flash", "FLASH_ATTENTION").prepare(inputs)


def test_the_bar_asks_for_a_mean():
    def result(speed):
        figures = {"kind": "ours", "speed": speed}
        return {
            "name": "row",
            "plan": "hopper_128",
            "problem": {"what": "prefill"},
            "contenders": {"flashcore": figures},
        }

    for bar, speeds, passed in (("bars", (0.99, 1.2), True), ("bars", (0.99, 1.0), False), (None, (0.99, 1.0), True)):
        options = harness.parse(models.question("cuda"), ["--bar", bar] if bar else [])
        assert models.conclude([result(speed) for speed in speeds], options).passed is passed
