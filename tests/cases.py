"""The named cases that every kernel must pass, and how their arrays are laid in memory.

A Case is a line of the table at the end; `inputs(case, dtype)` makes its arrays, always the same ones. The one trick is
`place`: every array is a window into a larger buffer filled with poison (NaN, or true for a bool mask), behind its
sequence end, between its strided rows and around it, so that a kernel which reads past an edge gives NaN, not luck.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from reference import Array, Expected

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

GUARD_BYTES = 256  # around every array: more than the widest load of any kernel, and a multiple of its alignment


@dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    num_heads_q: int = 2
    num_heads_kv: int = 2
    seqlen_q: int = 70
    seqlen_k: int = 70
    head_dim: int = 64
    head_dim_v: int = 0  # 0: head_dim
    mask: str = ""  # a key of MASKS
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    small_float32: bool = False  # alibi_slopes and sinks in float32 whatever the query is
    options: dict[str, Any] = field(default_factory=dict)  # is_causal, scale, window, diagonal, softcap, layout
    strides_q: str = "contiguous"  # a key of STRIDES
    strides_kv: str = "contiguous"
    values: str = "normal"  # "normal", "huge" or "dominant"
    sanitize: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Inputs:
    query: Array
    key: Array
    value: Array
    options: dict[str, Any]  # every other argument of attention()

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        return self.query, self.key, self.value

    @property
    def lse_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.query.dtype == np.float64 else np.float32)


# Memory orders. Each gives, for a shape, the element strides; the last dimension contiguous is the fast case.


def _packed(shape: tuple[int, ...], order: tuple[int, ...], pad: int = 0, step: int = 1) -> list[int]:
    """Strides of axes packed outermost first in `order`, `pad` unused elements a row, every `step`-th one used."""
    strides = [0] * len(shape)
    pitch = step
    for axis in reversed(order):
        strides[axis] = pitch
        pitch *= max(shape[axis], 1)
        if axis == order[-1]:
            pitch += pad
    return strides


def _times(strides: list[int], axis: int, factor: int) -> list[int]:
    strides[axis] *= factor
    return strides


STRIDES: dict[str, Callable[[tuple[int, ...]], list[int]]] = {
    "contiguous": lambda s: _packed(s, tuple(range(len(s)))),
    "heads_inside": lambda s: _packed(s, (0, 2, 1, 3)),  # the memory of bshd
    "batch_inside": lambda s: _packed(s, (2, 0, 1, 3)),
    "padded_rows": lambda s: _packed(s, (0, 1, 2, 3), pad=3),  # rows at odd addresses
    "padded_16": lambda s: _packed(s, (0, 1, 2, 3), pad=16),
    "columns": lambda s: _packed(s, (0, 1, 3, 2)),  # a transposed matrix
    "every_second": lambda s: _packed(s, (0, 1, 2, 3), step=2),
    "reversed_rows": lambda s: _times(_packed(s, (0, 1, 2, 3)), 2, -1),
    "reversed_columns": lambda s: _times(_packed(s, (0, 1, 2, 3)), 3, -1),
    "unaligned": lambda s: _packed(s, tuple(range(len(s)))),  # place() adds one element to the address
    "repeat_batch": lambda s: _times(_packed(s, (0, 1, 2, 3)), 0, 0),
    "repeat_heads": lambda s: _times(_packed(s, (0, 1, 2, 3)), 1, 0),
    "repeat_rows": lambda s: _times(_packed(s, (0, 1, 2, 3)), 2, 0),
}


def place(values: Array, strides: str = "contiguous") -> Array:
    """The same values under other strides, in a buffer of poison. Repeated dimensions take their first entry."""
    item = values.dtype.itemsize
    steps = [step * item for step in STRIDES[strides](values.shape)]
    reach = [(size - 1) * step if values.size else 0 for size, step in zip(values.shape, steps, strict=True)]
    before = GUARD_BYTES - sum(r for r in reach if r < 0) + (item if strides == "unaligned" else 0)
    before += -before % item
    after = sum(r for r in reach if r > 0) + item + GUARD_BYTES
    buffer = np.empty(before + after + -(before + after) % 8 + 64, np.uint8)
    poison = {"b": True, "u": 0xDEAD}.get(values.dtype.kind, "nan")
    buffer.view(values.dtype)[:] = values.dtype.type(poison)
    before += -buffer.ctypes.data % 64  # so that alignment is what `strides` says, not what malloc gave
    view: Array = np.ndarray(values.shape, values.dtype, buffer=buffer, offset=before, strides=steps)
    first = tuple(slice(0, 1) if step == 0 else slice(None) for step in steps)
    view[first] = values[first]
    return view


def buffer_of(view: Array) -> Array:
    """The bytes that `place` made around a view, or around a view of that view."""
    assert view.base is not None and view.base.dtype == np.uint8
    return view.base


def guard_intact(view: Array) -> bool:
    """Whether all of the buffer that is not the view still is poison."""
    rest = buffer_of(view).copy()
    offset = view.ctypes.data - buffer_of(view).ctypes.data
    inside: Array = np.ndarray(view.shape, view.dtype, buffer=rest, offset=offset, strides=view.strides)
    inside[...] = view.dtype.type("nan")
    return bool(np.isnan(rest.view(view.dtype).astype(np.float64)).all())


# Masks. Each gives an array that broadcasts to [batch, num_heads_q, seqlen_q, seqlen_k].

Shape = tuple[int, int, int, int]


def _sprinkle(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Three keys in four visible, and the first one always, so that no row is dark by chance."""
    mask = rng.random(shape) < 0.75
    mask[..., :1] = True
    return mask


def _key_lengths(rng: np.random.Generator, shape: Shape) -> Array:
    lengths = rng.integers(min(1, shape[3]), shape[3] + 1, size=(shape[0], 1, 1, 1))
    return np.arange(shape[3]) < lengths


def _dark_rows(rng: np.random.Generator, shape: Shape) -> Array:
    mask = _sprinkle(rng, shape)
    mask[:, :, ::3] = False
    return mask


def _added(mask: Array) -> Array:
    return np.where(mask, 0.0, -np.inf)


def _lowest_rows(rng: np.random.Generator, shape: Shape) -> Array:
    """What transformers makes of a padded row: every key at finfo.min, and the row is the mean of v."""
    mask = rng.standard_normal(shape)
    mask[:, :, ::2] = -np.inf  # inputs() writes finfo.min for it
    return mask


MASKS: dict[str, Callable[[np.random.Generator, Shape], Array]] = {
    "bool": _sprinkle,
    "bool_matrix": lambda rng, s: _sprinkle(rng, s[2:]),
    "bool_heads": lambda rng, s: _sprinkle(rng, (1, *s[1:])),
    "bool_batch": lambda rng, s: _sprinkle(rng, (s[0], 1, *s[2:])),
    "bool_keys": _key_lengths,
    "bool_vector": lambda rng, s: _sprinkle(rng, s[3:]),
    "bool_rows": lambda rng, s: rng.random((s[0], 1, s[2], 1)) < 0.75,
    "bool_dark_rows": _dark_rows,
    "bool_all_dark": lambda rng, s: np.zeros(s, bool),
    "added": lambda rng, s: rng.standard_normal(s),
    "added_matrix": lambda rng, s: rng.standard_normal(s[2:]),
    "added_keys": lambda rng, s: _added(_key_lengths(rng, s)),
    "added_heads": lambda rng, s: rng.standard_normal((1, s[1], 1, s[3])),
    "added_dark_rows": lambda rng, s: _added(_dark_rows(rng, s)),
    "added_float32": lambda rng, s: rng.standard_normal(s),
    "added_lowest_rows": _lowest_rows,
    "added_float32_lowest_rows": _lowest_rows,
    "added_columns": lambda rng, s: rng.standard_normal(s),  # inputs() lays it down transposed
}


def _make_mask(case: Case, dtype: np.dtype[Any], rng: np.random.Generator) -> Array:
    mask = MASKS[case.mask](rng, (case.batch, case.num_heads_q, case.seqlen_q, case.seqlen_k))
    if mask.dtype == np.bool_:
        return place(mask)
    if "float32" in case.mask:
        dtype = np.dtype(np.float32)
    if "lowest" in case.mask:
        mask = np.where(np.isneginf(mask), float(ml_dtypes.finfo(dtype).min), mask)
    return place(mask.astype(dtype), "columns" if case.mask == "added_columns" else "contiguous")


def inputs(case: Case, dtype: np.dtype[Any]) -> Inputs:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))  # the same numbers in every process
    head_dim_v = case.head_dim_v or case.head_dim

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    query = normal(case.batch, case.num_heads_q, case.seqlen_q, case.head_dim)
    key = normal(case.batch, case.num_heads_kv, case.seqlen_k, case.head_dim)
    value = normal(case.batch, case.num_heads_kv, case.seqlen_k, head_dim_v)
    if case.values == "huge":  # scores of some hundreds: softmax is all but one key
        query, key = query * 16, key * 16
    elif case.values == "dominant":  # one key in the last tile outweighs all before it by e^60
        direction = key[:, :, -2:-1] / np.linalg.norm(key[:, :, -2:-1], axis=-1, keepdims=True)
        group = case.num_heads_q // case.num_heads_kv
        query = query + 60 * direction.repeat(group, axis=1) * case.head_dim**0.5
        key[:, :, -2:-1] = direction

    options = dict(case.options)
    if case.mask:
        options["attn_mask"] = _make_mask(case, dtype, rng)
    small_dtype = np.dtype(np.float32) if case.small_float32 else dtype
    if case.alibi:
        slopes = 2.0 ** -np.arange(1, case.num_heads_q + 1)  # the ALiBi paper's geometric sequence
        options["alibi_slopes"] = place(slopes.astype(small_dtype))
    if case.sinks:
        options["sinks"] = place(normal(case.num_heads_q).astype(small_dtype))

    if case.dropout_p:
        options["dropout_p"] = case.dropout_p
        options["dropout_seed"] = place(rng.integers(2**64, size=2, dtype=np.uint64))

    arrays = [
        place(x.astype(dtype), strides)
        for x, strides in ((query, case.strides_q), (key, case.strides_kv), (value, case.strides_kv))
    ]
    if options.get("layout") == "bshd":
        arrays = [x.swapaxes(1, 2) for x in arrays]
    return Inputs(*arrays, options)


@cache
def _expected(name: str, dtype: str) -> Expected:
    given = inputs(CASES[name], DTYPES[dtype])
    return reference.expect(*given.arrays, **given.options)


def expected(case: Case, dtype: np.dtype[Any]) -> Expected:
    """The oracle's answer, computed once for all kernels."""
    return _expected(case.name, dtype.name)


CAUSAL = {"is_causal": True}
LOWER_RIGHT = {"is_causal": "lower_right"}
EVERYTHING: dict[str, Any] = {
    "num_heads_q": 6,
    "seqlen_q": 75,
    "seqlen_k": 140,
    "head_dim": 72,
    "head_dim_v": 40,
    "alibi": True,
    "sinks": True,
    "strides_q": "heads_inside",
    "options": {"softcap": 3.0, "window": (60, None), "is_causal": True, "diagonal": 50, "scale": 0.2},
    "sanitize": True,
}

# Tiles are 64 to 192 rows by 32 to 176 keys: lengths around those, and one with no factor in common with any.
EDGES = (31, 32, 33, 63, 64, 65, 79, 81, 127, 128, 129, 175, 177, 191, 193, 255, 257)
HEAD_DIMS = (1, 2, 7, 8, 16, 31, 32, 40, 63, 64, 65, 72, 80, 96, 127, 128, 129, 160, 192, 224, 255, 256)

_LIST = [
    # lengths
    Case("plain", sanitize=True),
    Case("one_by_one", seqlen_q=1, seqlen_k=1, sanitize=True),
    Case("one_row", seqlen_q=1, seqlen_k=200, sanitize=True),
    Case("one_key", seqlen_q=75, seqlen_k=1),
    Case("two_by_two", seqlen_q=2, seqlen_k=2),
    Case("two_by_two_causal", seqlen_q=2, seqlen_k=2, options=CAUSAL),
    *[Case(f"square_{n}", batch=1, seqlen_q=n, seqlen_k=n, sanitize=n in (65, 129)) for n in EDGES],
    *[Case(f"causal_{n}", batch=1, seqlen_q=n, seqlen_k=n, options=CAUSAL, sanitize=n in (65, 257)) for n in EDGES],
    Case("few_rows_many_keys", seqlen_q=5, seqlen_k=259),
    Case("many_rows_few_keys", seqlen_q=259, seqlen_k=5),
    Case("causal_few_rows", seqlen_q=5, seqlen_k=259, options=CAUSAL),
    Case("causal_many_rows", seqlen_q=259, seqlen_k=5, options=CAUSAL, sanitize=True),
    Case("lower_right_few_rows", seqlen_q=5, seqlen_k=259, options=LOWER_RIGHT, sanitize=True),
    Case("lower_right_many_rows", seqlen_q=259, seqlen_k=5, options=LOWER_RIGHT, sanitize=True),  # 254 dark rows
    Case("lower_right_one_row", seqlen_q=1, seqlen_k=130, options=LOWER_RIGHT),
    Case("many_heads", batch=7, num_heads_q=13, num_heads_kv=13, seqlen_q=3, seqlen_k=9, head_dim=16),
    # head dimensions: every kernel's, one beside each, odd ones
    *[
        Case(f"head_dim_{d}", batch=1, head_dim=d, options=CAUSAL, sanitize=d in (1, 40, 96, 128, 256))
        for d in HEAD_DIMS
    ],
    Case("head_dim_v_wider", head_dim=32, head_dim_v=128),
    Case("head_dim_v_narrower", head_dim=192, head_dim_v=128, sanitize=True),
    Case("head_dim_v_one", head_dim=64, head_dim_v=1),
    Case("head_dim_one_v_256", head_dim=1, head_dim_v=256),
    # heads
    Case("grouped", num_heads_q=6, num_heads_kv=2, options=CAUSAL, sanitize=True),
    Case("one_kv_head", num_heads_q=8, num_heads_kv=1, seqlen_q=33),
    Case("grouped_one_row", num_heads_q=16, num_heads_kv=2, seqlen_q=1, seqlen_k=190),
    Case("grouped_few_rows_causal", num_heads_q=4, num_heads_kv=1, seqlen_q=3, seqlen_k=150, options=LOWER_RIGHT),
    # strides
    *[
        Case(f"strides_{s}", strides_q=s, strides_kv=s, num_heads_q=4, num_heads_kv=2, options=CAUSAL)
        for s in STRIDES
        if s != "contiguous"
    ],
    Case("head_dim_five_of_eight", head_dim=5, strides_q="padded_rows", strides_kv="padded_rows"),
    Case("strides_mixed", strides_q="columns", strides_kv="unaligned", head_dim=40, sanitize=True),
    Case("layout_bshd", options={"layout": "bshd"}, num_heads_q=4, sanitize=True),
    Case("layout_bshd_memory_bhsd", options={"layout": "bshd", **CAUSAL}, strides_q="heads_inside"),
    # masks
    *[
        Case(
            f"mask_{m}", mask=m, num_heads_q=4, seqlen_q=67, seqlen_k=130, sanitize=m in ("bool", "added", "bool_keys")
        )
        for m in MASKS
    ],
    Case("mask_bool_and_causal", mask="bool", options=CAUSAL),
    Case("mask_added_and_causal", mask="added", options=CAUSAL),
    Case("mask_added_float32_softcap", mask="added_float32", options={"softcap": 5.0}),
    Case("mask_rows_and_sinks", mask="bool_dark_rows", sinks=True, sanitize=True),
    Case("mask_one_key", mask="bool", seqlen_q=9, seqlen_k=1),
    # band
    Case("window", seqlen_q=150, seqlen_k=150, options={"window": (20, 10)}, sanitize=True),
    Case("window_left", seqlen_q=150, seqlen_k=150, options={"window": (7, None)}),
    Case("window_right", seqlen_q=150, seqlen_k=150, options={"window": (-1, 7)}),
    Case("window_self", seqlen_q=70, seqlen_k=70, options={"window": (0, 0)}),
    Case("window_causal", seqlen_q=260, seqlen_k=260, options={"window": (64, None), **CAUSAL}, sanitize=True),
    Case("window_causal_right", seqlen_q=70, seqlen_k=70, options={"window": (3, 5), **CAUSAL}),
    Case("window_open", options={"window": (None, None)}),
    Case("window_lower_right", seqlen_q=20, seqlen_k=200, options={"window": (30, 0), "diagonal": "lower_right"}),
    Case("window_wide", options={"window": (2**62, 2**62)}),
    Case("diagonal_up", options={"diagonal": 9, **CAUSAL}),
    Case("diagonal_down", options={"diagonal": -9, **CAUSAL}),  # 9 dark rows
    Case("diagonal_far_up", options={"diagonal": 2**60, **CAUSAL}),
    Case("diagonal_far_down", options={"diagonal": -(2**60), **CAUSAL}),  # every row dark
    Case("diagonal_only", options={"diagonal": 5}),  # a diagonal alone hides nothing
    Case("band_off_the_end", seqlen_q=40, seqlen_k=40, options={"window": (2, 2), "diagonal": 30}),
    # options
    Case("scale_zero", options={"scale": 0.0}),
    Case("scale_negative", options={"scale": -0.3, **CAUSAL}),
    Case("scale_one_small_dim", head_dim=8, options={"scale": 1.0}),
    Case("softcap", options={"softcap": 2.0}, sanitize=True),
    Case("softcap_tiny", options={"softcap": 0.01}),
    Case("softcap_huge", options={"softcap": 1e6, **CAUSAL}),
    Case("alibi", num_heads_q=8, num_heads_kv=8, alibi=True, sanitize=True),
    Case("alibi_causal", num_heads_q=4, alibi=True, options=CAUSAL),
    Case("alibi_diagonal", seqlen_q=30, seqlen_k=90, alibi=True, options={"diagonal": "lower_right"}),
    Case("sinks", sinks=True, sanitize=True),
    Case("sinks_float32_alibi", sinks=True, alibi=True, small_float32=True, options={"window": (15, 0)}),
    Case("sinks_dark_rows", seqlen_q=90, seqlen_k=20, sinks=True, options=LOWER_RIGHT),
    Case("everything", mask="added", strides_kv="padded_rows", **EVERYTHING),
    Case("everything_aligned", mask="bool", strides_kv="padded_16", **EVERYTHING),  # as copy engines want it
    Case("band_many_tiles", batch=1, seqlen_q=500, seqlen_k=420, options={"window": (150, 40), "diagonal": -30}),
    # dropout
    Case("dropout", dropout_p=0.1, sanitize=True),
    Case("dropout_half_causal", dropout_p=0.5, seqlen_q=200, seqlen_k=330, options=CAUSAL),
    Case("dropout_most", dropout_p=0.99, batch=1),  # rows that lose every key
    Case("dropout_all", dropout_p=1.0, batch=1),
    Case("dropout_hardly", dropout_p=1e-12, batch=1),
    Case("dropout_window", dropout_p=0.3, seqlen_q=210, seqlen_k=210, options={"window": (45, 3)}, sanitize=True),
    Case("dropout_far_keys", dropout_p=0.3, seqlen_q=9, seqlen_k=500, options={"window": (17, 0), "diagonal": 470}),
    Case("dropout_grouped", dropout_p=0.3, num_heads_q=6, num_heads_kv=2, seqlen_q=50, options=LOWER_RIGHT),
    Case("dropout_one_row", dropout_p=0.3, num_heads_q=4, seqlen_q=1, seqlen_k=190),
    Case("dropout_mask_and_sinks", dropout_p=0.3, mask="bool_dark_rows", sinks=True),
    Case("dropout_bias", dropout_p=0.3, mask="added_matrix", seqlen_k=150, options={"softcap": 5.0}, sanitize=True),
    Case("dropout_lowest_rows", dropout_p=0.3, mask="added_float32_lowest_rows"),
    *[Case(f"dropout_head_dim_{d}", dropout_p=0.2, batch=1, seqlen_k=100, head_dim=d) for d in (8, 128, 256)],
    Case("dropout_bshd", dropout_p=0.2, num_heads_q=4, options={"layout": "bshd"}),
    Case("dropout_and_everything", dropout_p=0.4, mask="added", strides_kv="padded_rows", **EVERYTHING),
    Case("dropout_no_keys", dropout_p=0.2, seqlen_k=0),
    # values
    Case("huge_scores", values="huge", seqlen_k=200),
    Case("huge_scores_causal", values="huge", options=CAUSAL),
    Case("dominant_key", values="dominant", seqlen_q=20, seqlen_k=300, head_dim=32),
    Case("dominant_key_softcap", values="dominant", seqlen_q=20, seqlen_k=300, options={"softcap": 50.0}),
    # nothing there
    Case("no_batch", batch=0),
    Case("no_heads", num_heads_q=0, num_heads_kv=0),
    Case("no_rows", seqlen_q=0),
    Case("no_keys", seqlen_k=0),
    Case("no_keys_causal_sinks", seqlen_k=0, sinks=True, options=CAUSAL),
    Case("nothing", batch=0, num_heads_q=0, num_heads_kv=0, seqlen_q=0, seqlen_k=0),
]

CASES = {case.name: case for case in _LIST}
assert len(CASES) == len(_LIST), "two cases share a name"


def params() -> list[Any]:
    """For pytest.mark.parametrize, with the mark `sanitize` where a case is for the sanitizers too."""
    return [pytest.param(case, id=case.name, marks=[pytest.mark.sanitize] if case.sanitize else []) for case in _LIST]
