"""flashcore._C.backward: the gradients of a call as flashcore.torch asks for them, here on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference

import flashcore
from flashcore import _C

ALL = (True, True, True, True, False, True)  # query, key, value, attn_mask, alibi_slopes, sinks
NAMES = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks", "dropout_seed", "out", "lse", "dout", "dlse")


def make(layout: str = "bhsd", dtype: Any = np.float32, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by the names above, options) of a call with every gradient."""
    rng = np.random.default_rng(5)

    def random(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    inputs = [random(2, 4, 6, 8), random(2, 2, 7, 8), random(2, 2, 7, 5)]
    if layout == "bshd":
        inputs = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in inputs]
    options |= {"layout": layout}
    inputs += [random(2, 1, 1, 7), None, random(4), np.uint64([7, 2**63])]
    out, lse = flashcore.attention(*inputs[:4], sinks=inputs[5], dropout_seed=inputs[6], **options, return_lse=True)
    arrays = [*inputs, out, lse, random(*out.shape), random(*lse.shape).astype(lse.dtype)]
    return dict(zip(NAMES, arrays, strict=True)), options


def backward(arrays: dict[str, Any], options: dict[str, Any], wanted: tuple[bool, ...] = ALL) -> Any:
    *saved, dout, dlse = (arrays[name] for name in NAMES)
    return _C.backward(tuple(saved), dout, dlse, wanted, options)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "softcap": 2.0, "window": (3, None), "scale": 0.4}, {"dropout_p": 0.3}]
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_gradients(layout: str, options: dict[str, Any], dtype: Any) -> None:
    arrays, options = make(layout, dtype, **options)
    dq, dk, dv, dbias, dslopes, dsinks = backward(arrays, options)
    assert dslopes is None
    expected = reference.expect_gradients(
        *(arrays[name] for name in ("query", "key", "value", "dout", "dlse")),
        **options,
        attn_mask=arrays["attn_mask"],
        sinks=arrays["sinks"],
        dropout_seed=arrays["dropout_seed"],
    )
    for name, gradient in {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias, "dsinks": dsinks}.items():
        expected.check(name, gradient)


def test_what_is_not_wanted_is_not_computed() -> None:
    arrays, options = make()
    whole = backward(arrays, options)
    wanted = (False, True, True, False, False, False, True, True)  # autograd has entries for more than arrays
    few = backward(arrays, options, wanted)
    assert len(few) == len(wanted)
    assert few[6:] == (None, None)
    for want, one, other in zip(wanted, few, whole, strict=False):
        assert one.tobytes() == other.tobytes() if want else one is None


def test_a_gradient_of_lse_may_be_left_out() -> None:
    arrays, options = make()
    none, zero = (backward(arrays | {"dlse": dlse}, options) for dlse in (None, np.zeros((2, 4, 6), np.float32)))
    for one, other in zip(none, zero, strict=True):
        assert one is other or one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dout": np.zeros((2, 4, 5, 5), np.float32)}, ValueError, r"dout has shape \(2, 4, 5, 5\).*\(2, 4, 6, 5\)"),
        ({"dout": np.zeros((2, 4, 6, 5), np.float64)}, ValueError, "dout has dtype float64"),
        ({"out": np.zeros((2, 4, 6), np.float32)}, ValueError, "out has shape"),
        ({"lse": np.zeros((2, 4), np.float32)}, ValueError, "lse has shape"),
        ({"dlse": np.zeros((2, 4), np.float32)}, ValueError, "dlse has shape"),
        ({"out": None}, TypeError, "out is of type NoneType"),
        ({"dout": 3}, TypeError, "dout is of type int"),
        ({"sinks": None}, ValueError, "dsinks is wanted, but the call has no such input"),
        ({"attn_mask": np.ones((6, 7), bool)}, ValueError, "only a mask that is added"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arrays, options = make()
    with pytest.raises(error, match=words):
        backward(arrays | change, options)


def test_refusals_of_the_call() -> None:
    arrays, options = make()
    for wrong in ((), (arrays,), ((), None, None, ALL, {})):
        with pytest.raises(TypeError, match=r"needs a tuple of 9 arrays"):
            _C.backward(*wrong)
    for wanted in (ALL[:5], list(ALL), None):
        with pytest.raises(TypeError, match=r"wanted is .* a tuple of bools"):
            backward(arrays, options, wanted)
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        backward(arrays, {"windows": (1, 1)})
    with pytest.raises(TypeError, match="given 40 options"):
        backward(arrays, {str(i): 0 for i in range(40)})
    more = {name: x if x is None or name in ("attn_mask", "sinks") else x[None] for name, x in arrays.items()}
    with pytest.raises(ValueError, match="one batch dimension at most"):
        backward(more, options)
    slopes = arrays | {"alibi_slopes": np.ones(4, np.float32)}
    with pytest.raises(ValueError, match="dalibi is wanted, but flashcore computes no gradient of alibi_slopes"):
        backward(slopes, options, (True,) * 6)
