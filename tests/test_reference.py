"""The oracle itself: PyTorch's attention passes its bounds, and wrong answers fail them."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference
from devices import fetch, to_torch

torch = pytest.importorskip("torch", reason="PyTorch is the second opinion on the oracle")

SDPA_KNOWS = {"attn_mask", "is_causal", "scale"}


def _same_problem_for_torch(case: cases.Case) -> bool:
    if case.alibi or case.sinks or case.dropout_p:
        return False
    if set(case.options) - SDPA_KNOWS or case.options.get("is_causal") == "lower_right":
        return False
    if any("reversed" in strides for strides in (case.strides_q, case.strides_kv)):
        return False  # PyTorch has no negative strides
    if case.mask and case.options.get("is_causal"):
        return False  # PyTorch's CPU path refuses both at once
    # PyTorch wants a mask of two dimensions or more, and gives NaN for causal with a negative scale.
    return case.name not in ("mask_bool_vector", "scale_negative")


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", list(filter(_same_problem_for_torch, cases.CASES.values())), ids=str)
def test_torch_agrees(case: cases.Case, dtype: str) -> None:
    given = cases.inputs(case, cases.DTYPES[dtype])
    if dtype == "float64" and "float32" in case.mask:
        pytest.skip("PyTorch reads a float32 mask beside float64 arrays as if it were float64")
    query, key, value = map(to_torch, given.arrays)
    options = {name: to_torch(x) for name, x in given.options.items()}
    result = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    cases.expected(case, cases.DTYPES[dtype]).check(fetch(result))


def _plain(dtype: str) -> tuple[cases.Inputs, reference.Expected]:
    case = cases.CASES["causal_33"]
    return cases.inputs(case, cases.DTYPES[dtype]), cases.expected(case, cases.DTYPES[dtype])


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_bounds_refuse_wrong_answers(dtype: str) -> None:
    """Each mistake is one that attention kernels really make; each must fail."""
    given, right = _plain(dtype)
    query, key, value = given.arrays
    mistakes = {
        "zeros": np.zeros_like(right.out),
        "not causal": reference.attention(query, key, value)[0],
        "last key lost": reference.attention(query, key[:, :, :-1], value[:, :, :-1], is_causal=True)[0],
        "mask off by one": reference.attention(query, key, value, is_causal=True, diagonal=1)[0],
        "wrong scale": reference.attention(query, key, value, is_causal=True, scale=1 / 64)[0],
        "rows swapped": right.out[:, :, ::-1],
        "a tile never rescaled": np.concatenate([right.out[:, :, :16] * 0.98, right.out[:, :, 16:]], axis=2),
        "one NaN": np.where(np.arange(right.out.size).reshape(right.out.shape) == 77, np.nan, right.out),
    }
    for name, wrong in mistakes.items():
        with pytest.raises(AssertionError):
            right.check(wrong.astype(query.dtype))
            pytest.fail(f"{name}: passed", pytrace=False)
    with pytest.raises(AssertionError):
        right.check(right.out, right.lse + 1e-3)
    right.check(right.out.astype(query.dtype), right.lse)


def test_tf32_is_not_float32() -> None:
    given, right = _plain("float32")
    query, key, value = given.arrays

    def tf32(x: np.ndarray) -> np.ndarray:  # 10 bits of mantissa are left of 23
        return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

    wrong, _ = reference.attention(tf32(query.copy()), tf32(key.copy()), value, is_causal=True)
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        right.check(wrong.astype(np.float32))


@pytest.mark.parametrize("case", list(cases.CASES.values()), ids=str)
def test_zeros_never_pass(case: cases.Case) -> None:
    for dtype in cases.DTYPES.values():
        right = cases.expected(case, dtype)
        if right.out.any():
            with pytest.raises(AssertionError):
                right.check(np.zeros_like(right.out))


@pytest.mark.parametrize("strides", cases.STRIDES)
def test_place_keeps_values_and_poisons_the_rest(strides: str) -> None:
    values = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    view = cases.place(values, strides)
    repeated = tuple(slice(0, 1) if step == 0 else slice(None) for step in view.strides)
    assert (view == values[repeated]).all()
    assert cases.guard_intact(view)
    cases.buffer_of(view)[-4:] = 0
    assert not cases.guard_intact(view)
