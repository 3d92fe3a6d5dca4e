"""What the options mean, each said as an equation between two calls."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import reference
from cases import DTYPES
from devices import Kernel, fetch, same_bits, to_torch
from reference import Array

import flashcore


class Problem:
    """Small arrays of one kernel's device, and attention() that gives NumPy back."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rng = np.random.default_rng(42)

    def normal(self, *shape: int, dtype: str = "float32") -> Array:
        return self.rng.standard_normal(shape).astype(DTYPES[dtype])

    def qkv(self, batch: int = 2, heads: int = 2, rows: int = 70, keys: int = 70, dim: int = 32, **kind: str) -> Any:
        shapes = (batch, heads, rows, dim), (batch, heads, keys, dim), (batch, heads, keys, dim)
        return [self.normal(*shape, **kind) for shape in shapes]

    def __call__(self, *arrays: Array, **options: Any) -> Any:
        sent = [self.send(x) for x in arrays]
        result = flashcore.attention(*sent, **{name: self.send(x) for name, x in options.items()})
        return tuple(map(fetch, result)) if isinstance(result, tuple) else fetch(result)

    def send(self, x: Any) -> Any:
        if self.device == "cpu" or not isinstance(x, np.ndarray):
            return x
        return to_torch(cases.place(x), self.device)


@pytest.fixture
def attention(kernel: Kernel) -> Problem:
    return Problem(kernel.device)


# The band: causal, window and diagonal are one thing.


@pytest.mark.parametrize("rows,keys", [(70, 70), (10, 90), (90, 10), (1, 40)])
def test_lower_right_is_a_number(attention: Problem, rows: int, keys: int) -> None:
    qkv = attention.qkv(rows=rows, keys=keys)
    by_number = attention(*qkv, is_causal=True, diagonal=keys - rows)
    assert same_bits(attention(*qkv, is_causal="lower_right"), by_number)
    assert same_bits(attention(*qkv, is_causal=True, diagonal="lower_right"), by_number)
    assert same_bits(attention(*qkv, is_causal="lower_right", diagonal="lower_right"), by_number)


def test_causal_is_a_window(attention: Problem) -> None:
    qkv = attention.qkv()
    causal = attention(*qkv, is_causal=True)
    for right in ((None, 0), (-1, 0), (1000, 0), (2**62, 0)):
        assert same_bits(attention(*qkv, window=right), causal)
    assert same_bits(attention(*qkv, window=(None, 5), is_causal=True), causal)
    full = attention(*qkv)
    for window in (None, (None, None), (-1, -1), (69, 69), (2**62, 2**62)):
        assert same_bits(attention(*qkv, window=window), full)
    assert not same_bits(attention(*qkv, window=(68, 69)), full)


def test_diagonal_alone_hides_nothing(attention: Problem) -> None:
    qkv = attention.qkv()
    assert same_bits(attention(*qkv, diagonal=-30), attention(*qkv))


def test_window_of_one_copies_a_row_of_value(attention: Problem) -> None:
    q, k, v = attention.qkv(rows=40, keys=60)
    for diagonal in (0, 3, 20):
        out = attention(q, k, v, window=(0, 0), diagonal=diagonal)
        np.testing.assert_array_equal(out, v[:, :, diagonal : diagonal + 40])


def test_mask_and_causal_both_apply(attention: Problem) -> None:
    q, k, v = attention.qkv()
    mask = attention.rng.random((2, 2, 70, 70)) < 0.7
    right = reference.expect(q, k, v, mask & np.tril(np.ones((70, 70), bool)))
    right.check(attention(q, k, v, attn_mask=mask, is_causal=True))


def test_bool_mask_true_means_attend(attention: Problem) -> None:
    q, k, v = attention.qkv()
    mask = np.zeros((70, 70), bool)
    mask[:, 7] = True
    np.testing.assert_array_equal(attention(q, k, v, attn_mask=mask), np.broadcast_to(v[:, :, 7:8], v.shape))


# lse and sinks


def test_lse_is_a_natural_logarithm(attention: Problem) -> None:
    q, k, v = attention.qkv()
    q[:] = 0
    _, lse = attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(lse, np.log(70), rtol=1e-6)
    assert lse.shape == (2, 2, 70)
    assert lse.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_lse_is_float32_in_both_layouts(attention: Problem, dtype: str) -> None:
    q, k, v = attention.qkv(batch=3, heads=2, rows=5, keys=7, dtype=dtype)
    out, lse = attention(q, k, v, return_lse=True)
    swapped = (x.swapaxes(1, 2).copy() for x in (q, k, v))
    out_bshd, lse_bshd = attention(*swapped, return_lse=True, layout="bshd")
    assert lse.dtype == np.float32
    assert lse.shape == (3, 2, 5)
    assert same_bits(lse, lse_bshd)
    assert same_bits(out, out_bshd.swapaxes(1, 2))


def test_asking_for_lse_changes_no_bit(attention: Problem) -> None:
    qkv = attention.qkv(dtype="float16")
    assert same_bits(attention(*qkv), attention(*qkv, return_lse=True)[0])


def test_lse_merges_two_halves_of_the_keys(attention: Problem) -> None:
    """What context-parallel callers do with it."""
    q, k, v = attention.qkv(keys=90)
    halves = [attention(q, k[:, :, part], v[:, :, part], return_lse=True) for part in (slice(0, 31), slice(31, 90))]
    (out_a, lse_a), (out_b, lse_b) = halves
    weight = 1 / (1 + np.exp(lse_b - lse_a))[..., None]
    np.testing.assert_allclose(out_a * weight + out_b * (1 - weight), attention(q, k, v), atol=2e-6)


def test_a_sink_is_a_key_with_a_zero_value(attention: Problem) -> None:
    q, k, v = attention.qkv()
    sinks = attention.normal(2)
    out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
    out_without, lse_without = attention(q, k, v, return_lse=True)
    merged = np.logaddexp(lse_without, sinks[:, None])
    np.testing.assert_allclose(lse, merged, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out, out_without * np.exp(lse_without - merged)[..., None], atol=2e-6)


def test_per_batch_slopes_and_sinks(attention: Problem) -> None:
    q, k, v = attention.qkv(batch=3)
    per_batch = attention.normal(3, 2)
    for name, x in (("sinks", per_batch), ("alibi_slopes", abs(per_batch))):
        right = reference.expect(q, k, v, **{name: x})
        right.check(*attention(q, k, v, return_lse=True, **{name: x}))


# Rows that see nothing, and numbers that are none


def test_a_row_that_sees_nothing(attention: Problem) -> None:
    q, k, v = attention.qkv()
    everywhere = {
        "bool": {"attn_mask": np.zeros((70, 70), bool)},
        "added": {"attn_mask": np.full((70, 70), -np.inf, np.float32)},
        "band": {"is_causal": True, "diagonal": -70},
    }
    for name, options in everywhere.items():
        out, lse = attention(q, k, v, return_lse=True, **options)
        assert not out.any(), name
        assert np.isneginf(lse).all(), name
        sinks = np.array([0.5, -2], np.float32)
        out, lse = attention(q, k, v, return_lse=True, sinks=sinks, **options)
        assert not out.any(), name
        np.testing.assert_allclose(lse, np.broadcast_to(sinks[:, None], lse.shape), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_finfo_min_is_the_mean(attention: Problem, dtype: str) -> None:
    q, k, v = attention.qkv(dtype=dtype)
    lowest = float(np.finfo(np.float32).min) if dtype == "float32" else float(cases.ml_dtypes.finfo(dtype).min)
    mask = np.full((70, 70), lowest).astype(DTYPES[dtype])
    mean = np.broadcast_to(v.astype(np.float64).mean(axis=2, keepdims=True), v.shape)
    out = attention(q, k, v, attn_mask=mask)
    np.testing.assert_allclose(out.astype(np.float64), mean, atol=1e-6 if dtype == "float32" else 2e-3)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
def test_poison_in_a_query_stays_in_its_row(attention: Problem, options: dict[str, Any], poison: float) -> None:
    q, k, v = attention.qkv(rows=140, keys=140)
    clean, clean_lse = attention(q, k, v, return_lse=True, **options)
    for row in (0, 1, 63, 139):
        dirty = q.copy()
        dirty[1, 0, row, 5] = poison
        out, lse = attention(dirty, k, v, return_lse=True, **options)
        others = np.ones(out.shape[:3], bool)
        others[1, 0, row] = False
        assert same_bits(out[others], clean[others])
        assert same_bits(lse[others], clean_lse[others])
        if np.isnan(poison):
            assert np.isnan(out[1, 0, row]).all()
            assert np.isnan(lse[1, 0, row])


def test_nan_in_a_key_reaches_every_row_that_sees_it(attention: Problem) -> None:
    q, k, v = attention.qkv(rows=140, keys=140)
    clean = attention(q, k, v, is_causal=True)
    for at in (0, 5, 64, 139):
        dirty = k.copy()
        dirty[1, 0, at, 3] = np.nan
        out = attention(q, dirty, v, is_causal=True)
        assert np.isnan(out[1, 0, at:]).all(), "a row that sees the NaN swallowed it"
        _clean_or_nan(out, clean)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_in_a_value_reaches_every_row_that_sees_it(attention: Problem, poison: float) -> None:
    q, k, v = attention.qkv(rows=140, keys=140)
    clean = attention(q, k, v, is_causal=True)
    for at in (0, 5, 64, 139):
        dirty = v.copy()
        dirty[1, 0, at, 3] = poison
        out = attention(q, k, dirty, is_causal=True)
        assert not np.isfinite(out[1, 0, at:, 3]).any()
        untouched = np.arange(32) != 3
        assert same_bits(out[..., untouched], clean[..., untouched]), "it left its column"
        _clean_or_nan(out[1, 0, :at], clean[1, 0, :at])


def _clean_or_nan(out: Array, clean: Array) -> None:
    """Rows that hide the poison may get 0 * NaN, but never a third thing."""
    seen = ~np.isfinite(out)
    assert same_bits(np.where(seen, 0, out), np.where(seen, 0, clean))


# Scale


def test_scale_default(attention: Problem) -> None:
    qkv = attention.qkv(dim=64)
    assert same_bits(attention(*qkv), attention(*qkv, scale=0.125))
    assert same_bits(attention(*qkv, scale=1), attention(*qkv, scale=1.0))


def test_scale_zero_is_the_mean(attention: Problem) -> None:
    q, k, v = attention.qkv()
    out = attention(q, k, v, scale=0)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=2, keepdims=True), v.shape), atol=1e-6)


def test_negative_scale_negates_the_query(attention: Problem) -> None:
    q, k, v = attention.qkv()
    assert same_bits(attention(q, k, v, scale=-0.25), attention(-q, k, v, scale=0.25))


# Shapes


@pytest.mark.parametrize(
    "query,key",
    [
        ((5, 8), (7, 8)),
        ((2, 5, 8), (2, 7, 8)),
        ((4, 5, 8), (2, 7, 8)),  # three dimensions: the first is heads, and they group
        ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8)),
        ((2, 1, 2, 5, 8), (1, 3, 2, 7, 8)),
        ((2, 3, 2, 5, 8), (3, 1, 7, 8)),
        ((3, 2, 5, 8), (2, 7, 8)),
        ((2, 5, 8), (3, 2, 7, 8)),
        ((1, 2, 1, 2, 1, 5, 8), (2, 2, 2, 1, 7, 8)),
    ],
    ids=str,
)
def test_leading_shapes(attention: Problem, query: tuple[int, ...], key: tuple[int, ...]) -> None:
    q, k, v = attention.normal(*query), attention.normal(*key), attention.normal(*key)
    right = reference.expect(q, k, v, is_causal=True)
    out, lse = attention(q, k, v, is_causal=True, return_lse=True)
    assert out.shape == right.out.shape
    right.check(out, lse)


def test_key_and_value_broadcast_apart(attention: Problem) -> None:
    q, k, v = attention.normal(3, 2, 5, 8), attention.normal(1, 2, 7, 8), attention.normal(3, 1, 7, 4)
    right = reference.expect(q, np.broadcast_to(k, (3, 2, 7, 8)), np.broadcast_to(v, (3, 2, 7, 4)))
    right.check(attention(q, k, v))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (1, 7), (5, 1), (2, 1, 5, 7), (1, 4, 1, 1), (3, 2, 4, 5, 7)], ids=str)
def test_mask_broadcasts(attention: Problem, shape: tuple[int, ...]) -> None:
    q, k, v = (attention.normal(3, 2, 4, n, 8) for n in (5, 7, 7))
    mask = attention.rng.random(shape) < 0.7
    reference.expect(q, k, v, mask).check(attention(q, k, v, attn_mask=mask))
    added = attention.normal(*shape)
    reference.expect(q, k, v, added).check(attention(q, k, v, attn_mask=added))


# The same bits


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bitwise_repeatable(attention: Problem, dtype: str) -> None:
    qkv = attention.qkv(batch=4, heads=3, rows=200, keys=300, dtype=dtype)
    first = attention(*qkv, is_causal=True)
    assert all(same_bits(attention(*qkv, is_causal=True), first) for _ in range(10))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
def test_deterministic_row_does_not_depend_on_its_batch(attention: Problem, options: dict[str, Any]) -> None:
    q, k, v = attention.qkv(batch=5, heads=4, rows=130, keys=130, dtype="float16")
    whole = attention(q, k, v, deterministic=True, **options)
    for b in range(5):
        alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], deterministic=True, **options)
        assert same_bits(alone[0], whole[b])
    one_head = attention(q[:, 2:3].copy(), k[:, 2:3].copy(), v[:, 2:3].copy(), deterministic=True, **options)
    assert same_bits(one_head[:, 0], whole[:, 2])


def test_deterministic_is_the_same_function(attention: Problem) -> None:
    q, k, v = attention.qkv()
    reference.expect(q, k, v).check(attention(q, k, v, deterministic=True))


def test_names_of_arguments_need_not_be_interned() -> None:
    q, k, v = (np.random.default_rng(seed).standard_normal((1, 1, 6, 8), np.float32) for seed in range(3))
    named = flashcore.attention(q, k, v, **{"".join(("is", "_causal")): True})
    assert same_bits(named, flashcore.attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("sink", [np.nan, np.inf])
def test_a_sink_that_is_no_number_is_not_lost(sink: float) -> None:
    q, k, v = (np.random.default_rng(seed).standard_normal((1, 2, 6, 8), np.float32) for seed in range(3))
    out, lse = flashcore.attention(q, k, v, sinks=np.float32([sink, 0]), return_lse=True)
    assert np.isnan(out[:, 0]).all() and not np.isfinite(lse[:, 0]).any()
    assert np.isfinite(out[:, 1]).all() and np.isfinite(lse[:, 1]).all()
