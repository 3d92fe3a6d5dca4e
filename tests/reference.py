"""The oracle: attention from its formula, in NumPy, as slow and plain as it reads.

    score_ij = softcap(scale * q_i . k_j) + attn_mask_ij - slope * |j - i - diagonal|
    out_i    = sum_j softmax_j(score_i) v_j         over the keys that the band and a bool mask leave visible
    lse_i    = log sum_j exp(score_ij)

Arrays are [..., heads, seqlen, head_dim], or [..., seqlen, heads, head_dim] with layout="bshd"; two dimensions mean
one head. The one trick is that the same lines run twice: `attention` in float64 (long double for float64 arrays)
is the truth, and `rounded` in low precision is what an honest implementation may lose. A result is right when its
largest error is at most twice that of `rounded`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
bfloat16 = np.dtype(ml_dtypes.bfloat16)


def attention(query: Array, key: Array, value: Array, *args: Any, **options: Any) -> tuple[Array, Array]:
    """Out and lse, exact as far as the next wider precision goes."""
    work = np.longdouble if query.dtype == np.float64 else np.float64
    return _formula(query, key, value, *args, **options, work=work, store=lambda x: x)


def rounded(query: Array, key: Array, value: Array, *args: Any, **options: Any) -> tuple[Array, Array]:
    """The same with scores, probabilities and output rounded to the query's precision, and sums in float32."""
    precision = query.dtype
    work = np.float64 if precision == np.float64 else np.float32
    largest = work(ml_dtypes.finfo(precision).max)

    def store(x: Array) -> Array:
        # Rounding saturates: a float32 mask of finfo.min must not become -inf on its way through float16.
        saturated = np.where(np.isfinite(x), np.clip(x, -largest, largest), x)
        return saturated.astype(precision).astype(work)

    return _formula(query, key, value, *args, **options, work=work, store=store)


def visible_band(
    seqlen_q: int,
    seqlen_k: int,
    is_causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    diagonal: int | str = 0,
) -> tuple[Array, int]:
    """Which keys each row sees, as bool [seqlen_q, seqlen_k], and the diagonal as a number."""
    if "lower_right" in (diagonal, is_causal):
        diagonal = seqlen_k - seqlen_q
    assert isinstance(diagonal, int)
    left, right = (None if edge == -1 else edge for edge in window or (None, None))
    # The band is first <= j - i <= last. Python's integers do not overflow; NumPy's get them clamped to what matters.
    first = -seqlen_q if left is None else diagonal - left
    last = seqlen_k if right is None else diagonal + right
    if is_causal:
        last = min(last, diagonal)
    first, last = (min(max(edge, -seqlen_q), seqlen_k) for edge in (first, last))
    offset = np.arange(seqlen_k) - np.arange(seqlen_q)[:, None]
    return (first <= offset) & (offset <= last), diagonal


def _formula(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    is_causal: bool | str = False,
    scale: float | None = None,
    *,
    window: tuple[int | None, int | None] | None = None,
    diagonal: int | str = 0,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    layout: str = "bhsd",
    work: Any,
    store: Callable[[Array], Array],
) -> tuple[Array, Array]:
    if layout == "bshd":
        query, key, value = (x.swapaxes(-3, -2) if x.ndim > 2 else x for x in (query, key, value))
    query, key, value = (x.astype(work) for x in (query, key, value))
    key, value = (_repeat_heads(query, x) for x in (key, value))
    seqlen_q, head_dim = query.shape[-2:]
    seqlen_k = key.shape[-2]
    if scale is None:
        scale = head_dim**-0.5

    with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf are legal inputs
        score = work(scale) * (query @ key.swapaxes(-1, -2))
        if softcap is not None:
            score = work(softcap) * np.tanh(score / work(softcap))
        visible, diagonal = visible_band(seqlen_q, seqlen_k, is_causal, window, diagonal)
        if attn_mask is not None and attn_mask.dtype == np.bool_:
            visible = visible & attn_mask
        elif attn_mask is not None:
            score = score + attn_mask.astype(work)
        if alibi_slopes is not None:
            distance = np.abs((np.arange(seqlen_k) - np.arange(seqlen_q)[:, None]).astype(work) - work(diagonal))
            score = score - alibi_slopes.astype(work)[..., None, None] * distance
        score = np.where(visible, store(score), work(-np.inf))

        if sinks is not None:  # a sink is one more key, and its value is zero
            sink = np.broadcast_to(sinks.astype(work)[..., None, None], (*score.shape[:-1], 1))
            score = np.concatenate([score, sink], axis=-1)
            value = np.concatenate(
                [value, np.zeros_like(value, shape=(*value.shape[:-2], 1, value.shape[-1]))], axis=-2
            )

        top = score.max(axis=-1, keepdims=True, initial=-np.inf)
        weight = np.exp(score - np.where(np.isneginf(top), 0, top))
        total = weight.sum(axis=-1, keepdims=True)
        sees_nothing = total == 0
        probability = store(weight / np.where(sees_nothing, 1, total))
        out = store(probability @ value)
        lse = np.where(sees_nothing, -np.inf, top + np.log(np.where(sees_nothing, 1, total)))[..., 0]
    return (out.swapaxes(-3, -2) if layout == "bshd" and out.ndim > 2 else out), lse


def _repeat_heads(query: Array, x: Array) -> Array:
    """Key or value as often as its heads serve a query head."""
    if query.ndim == 2 or x.shape[-3] in (0, query.shape[-3]):
        return x
    return x.repeat(query.shape[-3] // x.shape[-3], axis=-3)


@dataclass(frozen=True)
class Expected:
    """What a call must give, and how far from it is still right."""

    out: Array
    lse: Array
    out_bound: float
    lse_bound: Array  # one for each row

    def check(self, out: Array, lse: Array | None = None) -> None:
        out = np.asarray(out)
        _assert_error("out", out, self.out, self.out_bound)
        # A row that sees no key is exactly zero, not nearly.
        dark = (self.out == 0).all(axis=-1)
        assert not out[dark].any(), f"rows that see no key must be exactly 0, found {out[dark][out[dark] != 0][:4]}"
        if lse is not None:
            _assert_error("lse", np.asarray(lse), self.lse, self.lse_bound)


def expect(query: Array, key: Array, value: Array, *args: Any, **options: Any) -> Expected:
    """The oracle's answer with its error bounds.

    bound = 2 x the error of `rounded` + eps x (8 + the largest |scale q.k| / 2) x the largest |v|, capped at half of
    the largest |out|.

    The term in eps, that of the sums (float32's, or float64's), is for cases so small that `rounded` is lucky: an
    exponential good to 2 units in the last place for each of numerator and denominator, a division and a product
    are 6 roundings, and 2 more are the order of summation. A score is rounded by eps / 2 of itself, and two that are
    off by so much in opposite directions move what is between their values by up to half of eps times it. The cap is
    for scores so large that rounding them to the precision loses the answer: a result of zeros never passes.

    lse has no cap but two more terms, eps |lse| and eps times the largest product of norms |scale| |q_i| |k_j|: each
    row's lse is about its largest score, and a score is a sum whose terms may cancel. Its yardstick is the formula in
    float32, for the log of a float32 sum never was a low-precision number; and the error of that is taken relative
    to 1 + |lse|, since a mask of finfo.min makes an lse of 1e38 beside rows of 5.
    """
    out, lse = attention(query, key, value, *args, **options)
    rough_out, _ = rounded(query, key, value, *args, **options)
    sums = np.float64 if query.dtype == np.float64 else np.float32
    wide = [x.astype(sums) for x in (query, key, value)]
    _, rough_lse = rounded(*wide, *args, **options)

    eps = float(np.finfo(sums).eps)
    scale = options.get("scale")
    unit = abs(query.shape[-1] ** -0.5 if scale is None else scale)
    heads = [x.astype(np.float64) for x in (query, key)]
    norms = [_largest(np.linalg.norm(x, axis=-1)) for x in heads]
    reach = unit * norms[0] * norms[1]
    if options.get("layout") == "bshd":
        heads = [x.swapaxes(-3, -2) if x.ndim > 2 else x for x in heads]
    with np.errstate(invalid="ignore"):
        score = unit * _largest(heads[0] @ _repeat_heads(heads[0], heads[1]).swapaxes(-1, -2))
    out_bound = 2 * _errors(rough_out, out).max(initial=0) + eps * (8 + score / 2) * _largest(value)
    size = np.where(np.isfinite(lse), np.abs(lse), 0)
    relative = (_errors(rough_lse, lse) / (1 + size)).max(initial=0)
    return Expected(
        out,
        lse,
        min(float(out_bound), _largest(out) / 2),
        2 * relative * (1 + size) + eps * (8 + size + reach),
    )


def assert_close(out: Array, query: Array, key: Array, value: Array, *args: Any, **options: Any) -> None:
    """Compares one output with the oracle, for tests that do not keep the Expected."""
    assert np.asarray(out).dtype == query.dtype, f"out is {np.asarray(out).dtype}, query is {query.dtype}"
    expect(query, key, value, *args, **options).check(out)


def _largest(x: Array) -> float:
    x = np.abs(x.astype(np.float64))
    return float(x[np.isfinite(x)].max(initial=0))


def _errors(result: Array, expected: Array) -> Array:
    """Element by element; 0 where either is not finite."""
    both = np.isfinite(result) & np.isfinite(expected)
    return np.abs(np.where(both, result, 0) - np.where(both, expected, 0))


def _assert_error(name: str, result: Array, expected: Array, bound: float | Array) -> None:
    assert result.shape == expected.shape, f"{name} has shape {result.shape}, expected {expected.shape}"
    result = result.astype(expected.dtype)
    both_finite = np.isfinite(expected) & np.isfinite(result)
    both_nan = np.isnan(expected) & np.isnan(result)
    wrong = ~(both_finite | both_nan | (result == expected))
    assert not wrong.any(), (
        f"{name} has {result[wrong][:4]} where {expected[wrong][:4]} belongs, at {np.argwhere(wrong)[:4].tolist()}"
    )
    errors, bound = _errors(result, expected), np.broadcast_to(bound, expected.shape)
    worst = np.unravel_index((errors - bound).argmax(), errors.shape) if errors.size else ()
    assert (errors <= bound).all(), f"{name}: error {errors[worst]:.3g} at {worst} exceeds {bound[worst]:.3g}"
