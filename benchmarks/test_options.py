"""test_options.py - every option on the CPU: what flashcore is given and what PyTorch is given say the same."""

import argparse
import math

import contenders as who
import harness
import options
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flashcore", exc_type=ImportError)

PEER = who.sdpa("math", "MATH")


@pytest.mark.parametrize("option", options.OPTIONS)
def test_both_are_given_the_same(option):
    problem = options.Problem(2, 3, 700, 32, option=option)
    (inputs,) = problem.make("cpu", 1)
    ours = harness.try_once(who.flashcore(), inputs)
    assert ours.isfinite().all()
    if option in ("sinks", "alibi", "softcap"):
        with pytest.raises(who.Refused, match=option):
            harness.try_once(PEER, inputs)
    else:
        expected = harness.try_once(PEER, inputs)
        assert harness.disagreement(ours, expected) <= harness.disagreement_max(problem)
    plain = harness.try_once(who.flashcore(), who.Inputs(inputs.query, inputs.key, inputs.value, False))
    assert torch.equal(ours, plain) == (option in ("none", "bools-all-true")), "an option that does nothing"


def test_a_mask_that_no_copy_engine_reads():
    (inputs,) = options.Problem(1, 1, 64, 32, option="bools-of-odd-rows").make("cpu", 1)
    assert inputs.options["attn_mask"].stride(-2) == 65


def test_conclusions():
    def result(us, option, seqlen=100, dtype="float16", **more):
        problem = {"head_dim": 64, "seqlen": seqlen, "dtype": dtype, "option": option}
        return {"problem": problem, "contenders": {"flashcore": {"us": us} | more}}

    half = 100.0 * sum(min(row, 9) + 1 for row in range(100)) / 100**2
    said = options.conclude(
        [
            result(100.0, "none"),
            result(130.0, "bias", mask_bytes=64_000_000),
            result(2 * half, "window-9-0"),
            result(101.0, "none", dtype="bfloat16"),
            {"problem": {}, "contenders": {"flashcore": {"refused": "because"}}},
        ],
        argparse.Namespace(),
    )
    assert said.lines == [
        "D64 S100 bias: +30 us over none, for 64 MB",
        "D64 S100 window-9-0: 2.00 of its share of the full call",
        "D64 S100 none bfloat16: 1.010 of float16's time",
    ]
    assert math.isclose(options._share({"seqlen": 5}, 5, 5), 1.0)
