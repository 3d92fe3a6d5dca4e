"""The oracle: attention from its formula, in NumPy, as slow and plain as it reads.

    score_ij = softcap(scale * q_i . k_j) + attn_mask_ij - slope * |j - i - diagonal|
    out_i    = sum_j softmax_j(score_i) v_j         over the keys that the band and a bool mask leave visible
    lse_i    = log sum_j exp(score_ij)

With dropout, softmax_j is multiplied by drop_ij = 0 or 1 / (1 - dropout_p); lse knows nothing of it.

Arrays are [..., heads, seqlen, head_dim], or [..., seqlen, heads, head_dim] with layout="bshd"; two dimensions mean
one head. The one trick is that the same lines run twice: `attention` in float64 (long double for float64 arrays)
is the truth, and `rounded` in low precision is what an honest implementation may lose. A result is right when its
largest error is at most twice that of `rounded`. `gradients` and `rounded_gradients` are the same for the backward.
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
    return _formula(query, key, value, *args, **options, **_rounding_to(query.dtype))


def _rounding_to(precision: np.dtype[Any]) -> dict[str, Any]:
    """What sums are in, and what rounds the rest."""
    work = np.float64 if precision == np.float64 else np.float32
    largest = work(ml_dtypes.finfo(precision).max)

    def store(x: Array) -> Array:
        # Rounding saturates: a float32 mask of finfo.min must not become -inf on its way through float16.
        saturated = np.where(np.isfinite(x), np.clip(x, -largest, largest), x)
        return saturated.astype(precision).astype(work)

    return {"work": work, "store": store}


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
    query: Array, key: Array, value: Array, *args: Any, work: Any, store: Callable[[Array], Array], **options: Any
) -> tuple[Array, Array]:
    bshd = options.pop("layout", "bhsd") == "bshd"
    query, key, value = (x.swapaxes(-3, -2) if bshd and x.ndim > 2 else x for x in (query, key, value))
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and inf are legal inputs
        soft = _softmax(query, key, *args, work=work, store=store, **options)
        out = store(store(soft.probability * soft.drop) @ _repeat_heads(query, value.astype(work)))
    return (out.swapaxes(-3, -2) if bshd and out.ndim > 2 else out), soft.lse


@dataclass(frozen=True)
class _Softmax:
    """What lies between the scores and the values; all but `lse`, `sink` and `scale` are [..., rows, keys], or 1."""

    scale: Any
    slope: Array  # the derivative of softcap, or 1
    probability: Array
    drop: Array  # dropout's factors
    sink: Array  # the sink's probability, [..., rows]
    lse: Array  # [..., rows]


def _softmax(
    query: Array,
    key: Array,
    attn_mask: Array | None = None,
    is_causal: bool | str = False,
    scale: float | None = None,
    *,
    window: tuple[int | None, int | None] | None = None,
    diagonal: int | str = 0,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Array | None = None,
    work: Any,
    store: Callable[[Array], Array],
) -> _Softmax:
    query, key = query.astype(work), _repeat_heads(query, key.astype(work))
    seqlen_q, head_dim = query.shape[-2:]
    seqlen_k = key.shape[-2]
    scale = work(head_dim**-0.5 if scale is None else scale)

    score = scale * (query @ key.swapaxes(-1, -2))
    slope = np.ones((), work)
    if softcap is not None:
        capped = np.tanh(score / work(softcap))
        score, slope = work(softcap) * capped, 1 - capped**2
    visible, diagonal = visible_band(seqlen_q, seqlen_k, is_causal, window, diagonal)
    if attn_mask is not None and attn_mask.dtype == np.bool_:
        visible = visible & attn_mask
    elif attn_mask is not None:
        score = score + attn_mask.astype(work)
    if alibi_slopes is not None:
        distance = np.abs((np.arange(seqlen_k) - np.arange(seqlen_q)[:, None]).astype(work) - work(diagonal))
        score = score - alibi_slopes.astype(work)[..., None, None] * distance
    score = np.where(visible, store(score), work(-np.inf))

    # A sink is one more key, and its value is zero.
    sink = work(-np.inf) if sinks is None else sinks.astype(work)[..., None, None]
    score = np.concatenate([score, np.broadcast_to(sink, (*score.shape[:-1], 1))], axis=-1)
    top = score.max(axis=-1, keepdims=True)
    weight = np.exp(score - np.where(np.isneginf(top), 0, top))
    total = weight.sum(axis=-1, keepdims=True)
    sees_nothing = total == 0
    probability = store(weight / np.where(sees_nothing, 1, total))
    lse = np.where(sees_nothing, -np.inf, top + np.log(np.where(sees_nothing, 1, total)))[..., 0]
    drop = np.ones((), work)
    if dropout_p:
        assert dropout_seed is not None
        heads = int(np.prod(score.shape[:-2]))
        kept = kept_by_dropout(dropout_p, dropout_seed, heads, seqlen_q, seqlen_k).reshape(score[..., :-1].shape)
        drop = np.where(kept, 1 / (1 - work(dropout_p)) if dropout_p < 1 else 0, work(0))
    return _Softmax(scale, slope, probability[..., :-1], drop, probability[..., -1], lse)


def philox(counter: Array, key: Array) -> Array:
    """Philox4x32-10 of the paper (Salmon et al., 2011): counters [..., 4] and keys [..., 2] of 32-bit numbers."""
    word = [counter[..., i].astype(np.uint64) for i in range(4)]
    key_of_round = [key[..., i].astype(np.uint64) for i in range(2)]
    low = np.uint64(2**32 - 1)
    for _ in range(10):
        left, right = word[0] * np.uint64(0xD2511F53), word[2] * np.uint64(0xCD9E8D57)
        word = [
            (right >> 32) ^ word[1] ^ key_of_round[0],
            right & low,
            (left >> 32) ^ word[3] ^ key_of_round[1],
            left & low,
        ]
        key_of_round = [
            k + np.uint64(weyl) & low for k, weyl in zip(key_of_round, (0x9E3779B9, 0xBB67AE85), strict=True)
        ]
    return np.stack(np.broadcast_arrays(*word), axis=-1).astype(np.uint32)


def _words(*numbers: Array) -> Array:
    """64-bit numbers as 32-bit ones, low word first, in a last dimension."""
    halves = [half for x in numbers for half in (x & np.uint64(2**32 - 1), x >> np.uint64(32))]
    return np.stack(np.broadcast_arrays(*halves), axis=-1)


def dropout_numbers(seed: Array, heads: int, rows: int, keys: int) -> Array:
    """The random number of each weight, [heads, rows, keys]; the heads of all batches follow each other."""
    head, row, key = (np.arange(n, dtype=np.uint64) for n in (heads, rows, keys))
    head_key = philox(_words(seed[1], head), _words(seed[0]))[..., :2]
    draw = key // 64 * 16 + key % 16
    words = philox(_words(draw[None, None], row[None, :, None]), head_key[:, None, None])
    return np.take_along_axis(words, (key // 16 % 4).astype(np.int64)[None, None, :, None], axis=-1)[..., 0]


def kept_by_dropout(p: float, seed: Array, heads: int, rows: int, keys: int) -> Array:
    keep = min(round((1 - p) * 2**32), 2**32 - 1)
    return dropout_numbers(np.asarray(seed).view(np.uint64), heads, rows, keys) < keep


@dataclass(frozen=True)
class Gradients:
    """Of a loss, with respect to each input. dbias and dsinks are unsummed: one for each score, one for each row's
    logit."""

    dq: Array
    dk: Array
    dv: Array
    dbias: Array  # [..., heads, seqlen_q, seqlen_k]
    dsinks: Array  # [..., heads]


def gradients(
    query: Array, key: Array, value: Array, dout: Array, dlse: Array | None = None, **options: Any
) -> Gradients:
    """The backward of `attention`, from its formula, here without dropout, whose factors go to do . v and dv's p:

    ds = p * (do . v - delta), delta = rowsum(do * o) - dlse, dsinks = -sum_rows p_sink * delta
    dq = scale * softcap'(..) * ds @ k, dk = (the same ds)^T @ q, dv = p^T @ do, over the query heads of a group
    """
    work = np.longdouble if query.dtype == np.float64 else np.float64
    return _derivative(query, key, value, dout, dlse, **options, work=work, store=lambda x: x)


def rounded_gradients(
    query: Array, key: Array, value: Array, dout: Array, dlse: Array | None = None, **options: Any
) -> Gradients:
    """The same with out, probabilities, gradients of scores and results rounded to the query's precision, and sums in
    float32."""
    return _derivative(query, key, value, dout, dlse, **options, **_rounding_to(query.dtype))


def _derivative(
    query: Array,
    key: Array,
    value: Array,
    dout: Array,
    dlse: Array | None,
    *,
    work: Any,
    store: Callable[[Array], Array],
    absolute: bool = False,
    **options: Any,
) -> Gradients:
    """`absolute`: every term with its absolute value, so that nothing cancels: how large what is summed is."""
    bshd = options.pop("layout", "bhsd") == "bshd"
    arrays = [x.swapaxes(-3, -2) if bshd and x.ndim > 2 else x for x in (query, key, value, dout)]
    size = np.abs if absolute else lambda x: x
    soft = _softmax(arrays[0], arrays[1], **options, work=work, store=store)
    query, key, value, dout = (size(x.astype(work)) for x in arrays)
    keys, values = _repeat_heads(query, key), _repeat_heads(query, value)
    weights = store(soft.probability * soft.drop)
    out = store(weights @ values)
    delta = (dout * out).sum(axis=-1)
    if dlse is not None:
        delta = delta + size(dlse.astype(work)) if absolute else delta - dlse.astype(work)
    difference = soft.drop * (dout @ values.swapaxes(-1, -2)) + (1 if absolute else -1) * delta[..., None]
    # A key with no probability has no part in it, though its value be NaN.
    ds = store(np.where(soft.probability == 0, 0, soft.probability * difference))
    slope = 2 - soft.slope if absolute else soft.slope  # 1 - tanh^2 without its cancellation
    dr = size(soft.scale) * slope * ds
    group = query.shape[-3] // max(key.shape[-3], 1)

    def over_heads(x: Array) -> Array:
        return x.reshape(*x.shape[:-3], x.shape[-3] // group, group, *x.shape[-2:]).sum(axis=-3)

    dq = store(dr @ keys)
    dk = store(over_heads(dr.swapaxes(-1, -2) @ query)) if group else np.zeros_like(key)
    dv = store(over_heads(weights.swapaxes(-1, -2) @ dout)) if group else np.zeros_like(value)
    if bshd:
        dq, dk, dv = (x.swapaxes(-3, -2) for x in (dq, dk, dv))
    return Gradients(dq, dk, dv, ds, size(-(soft.sink * delta).sum(axis=-1)))


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

    bound = 2 x the error of `rounded` + eps x (8 + the largest |scale q.k| / 2) x the largest |v| (that dropout may
    scale up), capped at half of the largest |out|.

    The term in eps, that of the sums (float32's, or float64's), is for cases so small that `rounded` is lucky: an
    exponential good to 2 units in the last place for each of numerator and denominator, a division and a product
    are 6 roundings, and 2 more are the order of summation. A score is rounded by eps / 2 of itself, and two that are
    off by so much in opposite directions move what is between their values by up to half of eps times it. The cap is
    for scores so large that rounding them to the precision loses the answer: a result of zeros never passes.

    lse has no cap but two more terms, eps |lse| and eps times the largest product of norms |scale| |q_i| |k_j|: each
    row's lse is about its largest score, and a score is a sum whose terms may cancel. For the 16-bit types that counts
    once for each 32 of head_dim: a tensor core adds 16 products at a time and cuts off what its float32 sum cannot
    hold, half a unit on the average and always downwards (cuDNN and FlashAttention show the same). Its yardstick is the
    formula in float32, for the log of a float32 sum never was a low-precision number; and the error of that is taken
    relative to 1 + |lse|, since a mask of finfo.min makes an lse of 1e38 beside rows of 5.
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
    cuts = max(1, query.shape[-1] / 32) if query.dtype.itemsize == 2 else 1
    if options.get("layout") == "bshd":
        heads = [x.swapaxes(-3, -2) if x.ndim > 2 else x for x in heads]
    with np.errstate(invalid="ignore"):
        score = unit * _largest(heads[0] @ _repeat_heads(heads[0], heads[1]).swapaxes(-1, -2))
    largest = _largest(value) / max(1 - options.get("dropout_p", 0.0), eps)
    out_bound = 2 * _errors(rough_out, out).max(initial=0) + eps * (8 + score / 2) * largest
    size = np.where(np.isfinite(lse), np.abs(lse), 0)
    relative = (_errors(rough_lse, lse) / (1 + size)).max(initial=0)
    return Expected(
        out,
        lse,
        min(float(out_bound), _largest(out) / 2),
        2 * relative * (1 + size) + eps * (8 + size + cuts * reach),
    )


@dataclass(frozen=True)
class ExpectedGradients:
    """What a backward call must give, and how far from it is still right: one bound for each element."""

    values: dict[str, Array]
    bounds: dict[str, Array]
    sizes: dict[str, Array]  # 0 where nothing at all is summed: there the result is exactly 0

    def check(self, name: str, result: Array) -> None:
        assert result.dtype != object
        _assert_error(name, result, self.values[name], self.bounds[name])
        assert not result[self.sizes[name] == 0].any(), f"{name} must be exactly 0 where no row and key meet"


def expect_gradients(
    query: Array, key: Array, value: Array, dout: Array, dlse: Array | None = None, **options: Any
) -> ExpectedGradients:
    """The oracle's gradients with their error bounds.

    bound = 2 x the error of `rounded_gradients` + half a unit in the element's last place + noise, capped at half of
    the largest gradient or the noise;
    noise = eps x (8 + the largest |scale q.k| + the largest |scale| |q| |k| + the number of terms / 4) x the element's
    size.

    An element's size is what it would be if no two of its terms cancelled. The noise is that of the exponential; of
    lse, which is rounded by itself; of the score, a sum whose terms may cancel; and of the sums, whose roundings point
    one way where rows repeat. The half unit, and for dsinks that of out over the root of the number of rows, is for
    gradients of so few elements that the yardstick's rounding may be lucky; the smallest numbers there are come on top.
    The cap keeps a result of zeros from passing, but where the largest gradient is less than one unit of rounding of
    what it is summed from: with one visible key dq is zero, and its sum in float16 is not. dbias is summed to the shape
    of attn_mask, dsinks to that of sinks.
    """
    right = gradients(query, key, value, dout, dlse, **options)
    rough = rounded_gradients(query, key, value, dout, dlse, **options)
    work = np.longdouble if query.dtype == np.float64 else np.float64
    size = _derivative(query, key, value, dout, dlse, **options, work=work, store=lambda x: x, absolute=True)
    sums = np.float64 if query.dtype == np.float64 else np.float32
    scale = options.get("scale")
    heads = [x.astype(np.float64) for x in (query, key)]
    if options.get("layout") == "bshd":
        heads = [x.swapaxes(-3, -2) for x in heads]
    product = heads[0] @ _repeat_heads(heads[0], heads[1]).swapaxes(-1, -2)
    unit_scale = abs(query.shape[-1] ** -0.5 if scale is None else scale)
    score = unit_scale * _largest(product)
    rows, keys = heads[0].shape[-2], heads[1].shape[-2]
    group = heads[0].shape[-3] // max(heads[1].shape[-3], 1)
    norms = [_largest(np.linalg.norm(x, axis=-1)) for x in heads]
    reach = unit_scale * norms[0] * norms[1]
    unit = float(np.finfo(sums).eps) * (8 + score + reach + (group * rows + keys) / 4)

    like = {"dq": query, "dk": key, "dv": value}
    mask, sinks = options.get("attn_mask"), options.get("sinks")
    if mask is not None and mask.dtype != np.bool_:
        like["dbias"] = mask
    if sinks is not None:
        like["dsinks"] = sinks
    expected = ExpectedGradients({}, {}, {})
    for name, array in like.items():
        exact, lossy, whole = (_sum_to(getattr(x, name), array.shape) for x in (right, rough, size))
        lossy = lossy.astype(array.dtype).astype(exact.dtype)  # a mask or sinks may be narrower than the query
        noise = unit * whole
        last_place = float(ml_dtypes.finfo(array.dtype).eps) / 2 * np.abs(exact)
        if name == "dsinks":
            last_place = last_place + float(ml_dtypes.finfo(query.dtype).eps) / 2 * whole / max(rows, 1) ** 0.5
        unit_of_terms = float(ml_dtypes.finfo(array.dtype).eps) * _largest(whole)
        bound = 2 * _errors(lossy, exact).max(initial=0) + noise + last_place
        if _largest(exact) > unit_of_terms:
            bound = np.minimum(bound, np.maximum(_largest(exact) / 2, noise))
        expected.values[name] = exact
        smallest = float(ml_dtypes.finfo(array.dtype).smallest_subnormal) + float(np.finfo(sums).smallest_normal)
        expected.bounds[name] = bound + smallest
        expected.sizes[name] = whole
    return expected


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Over the dimensions that an array of this shape was broadcast along."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1), keepdims=True)


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
