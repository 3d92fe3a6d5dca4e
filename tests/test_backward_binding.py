"""flashcore._C.backward: the gradients of a call as flashcore.torch asks for them, here on NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference

import flashcore
from flashcore import _C

Arrays = dict[str, Any]


def make(layout: str = "bhsd", dtype: Any = np.float32, **options: Any) -> tuple[Arrays, tuple[Any, ...], Arrays]:
    """(the backward's arrays, query, key and value, options) of a call with every gradient."""
    rng = np.random.default_rng(5)

    def random(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    inputs = [random(2, 4, 6, 8), random(2, 2, 7, 8), random(2, 2, 7, 5)]
    if layout == "bshd":
        inputs = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in inputs]
    options |= {"layout": layout, "attn_mask": random(2, 1, 1, 7), "sinks": random(4)}
    out, lse = flashcore.attention(*inputs, **options, return_lse=True)
    arrays = {"out": out, "lse": lse, "dout": random(*out.shape), "dlse": random(*lse.shape).astype(lse.dtype)}
    like = dict(zip(("dq", "dk", "dv"), inputs, strict=True))
    like |= {"dbias": options["attn_mask"], "dsinks": options["sinks"]}
    return arrays | {name: np.full_like(x, np.nan) for name, x in like.items()}, tuple(inputs), options


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 2.0, "window": (3, None), "scale": 0.4}])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_gradients(layout: str, options: Arrays, dtype: Any) -> None:
    arrays, inputs, options = make(layout, dtype, **options)
    assert _C.backward(arrays, *inputs, **options) is None
    expected = reference.expect_gradients(*inputs, arrays["dout"], arrays["dlse"], **options)
    for name in ("dq", "dk", "dv", "dbias", "dsinks"):
        expected.check(name, arrays[name])


def test_what_is_not_given_is_not_computed() -> None:
    arrays, inputs, options = make()
    _C.backward(arrays, *inputs, **options)
    few, _, _ = make()
    few |= {"dq": None, "dsinks": None}
    del few["dbias"]
    _C.backward(few, *inputs, **options)
    for name in ("dk", "dv"):
        assert few[name].tobytes() == arrays[name].tobytes()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dq": np.zeros((2, 4, 6, 7), np.float32)}, ValueError, r"dq has shape \(2, 4, 6, 7\).*\(2, 4, 6, 8\)"),
        ({"dout": np.zeros((2, 4, 5, 5), np.float32)}, ValueError, "dout has shape"),
        ({"lse": np.zeros((2, 4), np.float32)}, ValueError, "lse has shape"),
        ({"dk": np.zeros((2, 2, 7, 8), np.float64)}, ValueError, "dk has dtype float64"),
        ({"dv": np.frombuffer(bytes(560), np.float32).reshape(2, 2, 7, 5)}, ValueError, "dv is read-only"),
        (
            {"dq": np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (2, 4, 6, 8), (0, 0, 0, 4))},
            ValueError,
            "dq",
        ),
        ({"out": None}, TypeError, "needs an array 'out'"),
        ({"dout": 3}, TypeError, "dout is a int"),
        ({"dalibi": None}, TypeError, "it knows out, lse, dout"),
    ],
)
def test_refusals(change: Arrays, error: type[Exception], words: str) -> None:
    arrays, inputs, options = make()
    with pytest.raises(error, match=words):
        _C.backward(arrays | change, *inputs, **options)


def test_refusals_of_the_call() -> None:
    arrays, inputs, options = make()
    with pytest.raises(TypeError, match="is a dict"):
        _C.backward(None, *inputs)
    with pytest.raises(TypeError, match="needs a dict"):
        _C.backward()
    with pytest.raises(ValueError, match="dsinks is given, but the call has no sinks"):
        _C.backward(arrays, *inputs, attn_mask=options["attn_mask"])
    with pytest.raises(ValueError, match="one batch dimension at most"):
        _C.backward(arrays, *(x[None] for x in inputs))
    mask = np.ones((6, 7), bool)
    with pytest.raises(ValueError, match="only a mask that is added"):
        _C.backward(arrays | {"dbias": np.empty((6, 7), np.float32)}, *inputs, attn_mask=mask, sinks=options["sinks"])
