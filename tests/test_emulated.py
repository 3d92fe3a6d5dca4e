"""Hopper's kernels against the oracle where there is no GPU: results and barriers, on the emulator of emulated.py.

What holds for every call runs on both families; hopper_short may pass where a head's keys do not fit in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import cases
import emulated
import numpy as np
import pytest
import reference
import variants
from cases import DTYPES, Case
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import Array
from strategies import problems

pytestmark = pytest.mark.skipif(bool(emulated.lacks()), reason=emulated.lacks() or "it can be built")
HALVES = ["float16", "bfloat16"]


@pytest.fixture(scope="module", params=["hopper", "hopper_short"])
def hopper(request: pytest.FixtureRequest) -> partial[tuple[Array, Array] | None]:
    return partial(emulated.attention, emulated.library(request.param), kernel=request.param.encode())


def _check(hopper: Any, *arrays: Array, num_sms: int = 3, **options: Any) -> None:
    result = hopper(*arrays, num_sms=num_sms, **options)
    if result is None and hopper.keywords["kernel"] == b"hopper_short":
        pytest.skip("hopper_short does not hold so many keys, or so wide ones")
    assert result is not None, "no row serves"
    reference.expect(*arrays, **options).check(*result)


def _normal(*shape: int, dtype: str = "float16", seed: int = 1) -> Array:
    return cases.place(np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[dtype]))


def _qkv(rows: int, keys: int, dim: int, heads: int = 2, heads_kv: int = 1, **more: Any) -> tuple[Array, Array, Array]:
    shapes = ((1, heads, rows, dim), (1, heads_kv, keys, dim), (1, heads_kv, keys, dim))
    return tuple(_normal(*shape, seed=seed, **more) for seed, shape in enumerate(shapes))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", cases.params())
def test_case(hopper: Any, case: Case, dtype: str) -> None:
    made = cases.inputs(case, DTYPES[dtype])
    result = hopper(*made.arrays, **made.options)
    if result is None:
        pytest.skip("Hopper's kernels do not read these arrays")
    cases.expected(case, DTYPES[dtype]).check(*result)


ROWS = [variant for variant in variants.read("forward") if variant.family.startswith("hopper")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row(row: variants.Variant) -> None:
    """Around the edges of its tiles, with padded columns and grouped heads; and keys that a cluster shares."""
    family, dtype, mask = row.family, row.dtype, row.mask
    m, n, d = row.block_m, row.block_n, row.head_dim
    splits = set()
    for rows, keys in [
        (m + 1, 2 * n),
        (m - 1, 4 * n + 1),
        (3, n - 1),
        (60, 6 * n + 5),
        (2, 600),
        (2, 1100),
        (64, 2050),
    ]:
        q, k, v = _qkv(rows, keys, d - 8, dtype=dtype)
        options: dict[str, Any] = {"sinks": np.float32([0.3, -2])}
        if mask != "full":
            options |= {"window": (keys, 0), "diagonal": keys - rows}
        if mask == "unbiased":
            options |= {"attn_mask": _normal(1, 1, rows, keys, seed=4) > -0.5}
        if mask in ("biased", "general"):
            options |= {"attn_mask": _normal(1, 1, rows, keys, dtype=dtype, seed=4)}
        if mask == "general":
            options |= {"softcap": 5.0, "alibi_slopes": np.float32([0.5, 0.1])}
        launches: list[emulated.Launch] = []
        result = emulated.attention(
            emulated.library(family), q, k, v, kernel=row.name.encode(), num_sms=132, launches=launches, **options
        )
        if result is None:
            assert family == "hopper_short" and keys * d > 30_000, "no more than that fits"
            continue
        splits.update(launch.plan.num_splits for launch in launches)
        reference.expect(q, k, v, **options).check(*result)
    assert splits == {1} if family == "hopper" else max(splits) >= 4


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.family == "hopper" and row.mask in ("full", "band")], ids=lambda row: row.name
)
def test_every_row_of_many_tiles(row: variants.Variant) -> None:
    """For each block, which then sends out by way of shared memory. Bands hide the first rows from warpgroups, or whole
    tiles, whatever values lie there; four warpgroups take turns in a causal call and not in a window; out may have no
    columns in a slab, or be out of the copy engine's reach."""
    kernel, dtype, dim, mask = row.name.encode(), row.dtype, row.head_dim, row.mask
    library = emulated.library(row.family)
    rows = 2 * row.block_m + 9
    causal = {"is_causal": True, "diagonal": -70}
    for dim_v, options in [
        (dim - 8, {} if mask == "full" else causal),
        (dim // 2 - 8, {} if mask == "full" else {"window": (150, 0), "diagonal": -70}),
        (dim, {} if mask == "full" else causal | {"diagonal": -row.block_m - 70}),
        (dim - 9, {} if mask == "full" else causal),
    ]:
        q, k, v = _qkv(rows, 200, dim, dtype=dtype)
        v = cases.place(np.ascontiguousarray(v[..., : dim_v + 1]))[..., :dim_v] if dim_v % 8 else v[..., :dim_v]
        result = emulated.attention(library, q, k, v, kernel=kernel, num_sms=2, **options)
        assert result is not None
        reference.expect(q, k, v, **options).check(*result)
        few = slice(row.block_n - 3)  # one tile of keys, so that rings go round once in a few tiles of rows
        result = emulated.attention(library, q, k[..., few, :], v[..., few, :], kernel=kernel, num_sms=2, **options)
        assert result is not None
        reference.expect(q, k[..., few, :], v[..., few, :], **options).check(*result)
        if options.get("diagonal") == -70 and dim_v % 8 == 0:
            v = v.copy()
            v[..., 1, 3] = np.nan
            result = emulated.attention(library, q, k, v, kernel=kernel, num_sms=2, **options)
            assert result is not None
            assert (result[0][..., :70, :] == 0).all(), "they see no value"


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": True}], ids=str)
@pytest.mark.parametrize("heads,keys,splits", [(2, 130, 1), (1, 280, 2)])
def test_blocks_without_a_tile(heads: int, keys: int, splits: int, options: dict[str, Any]) -> None:
    """Of short calls, which fill up the multiprocessors: three tiles a head, of one block or two."""
    q, k, v = _qkv(130, keys, 64, heads=heads, heads_kv=1)
    if "attn_mask" in options:
        options = {"attn_mask": np.arange(keys).reshape(1, 1, 1, keys) % 5 != 3}
    launches: list[emulated.Launch] = []
    result = emulated.attention(
        emulated.library("hopper_short"), q, k, v, kernel=b"hopper_short", num_sms=11, launches=launches, **options
    )
    assert result is not None
    reference.expect(q, k, v, **options).check(*result)
    (launch,) = launches
    plan = launch.plan
    assert (plan.num_splits, plan.num_blocks, launch.blocks_per_sm > 0) == (splits, 11 // splits * splits, True)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dim_v", [40, 44])
def test_nothing_behind_outs_columns_is_written(hopper: Any, dim_v: int, options: dict[str, Any]) -> None:
    """In rows that begin at whole 16 bytes and need not end there."""
    q, k, v = _qkv(500, 200, 48)
    v = v[..., :dim_v]
    around = np.full((1, 2, 500, 64), 777, np.float16)
    result = hopper(q, k, v, out=around[..., :dim_v], num_sms=2, **options)
    assert result is not None
    reference.expect(q, k, v, **options).check(*result)
    assert (around[..., dim_v:] == 777).all()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (70, 3)}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("rows,keys", [(130, 130), (20, 190), (500, 260)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_many_tiles_for_each_block(hopper: Any, dim: int, rows: int, keys: int, options: dict[str, Any]) -> None:
    _check(hopper, *_qkv(rows, keys, dim, heads=6, heads_kv=2), num_sms=2, **options)


@pytest.mark.parametrize(
    "rows,tile,options", [(500, "band_192x128", {}), (600, "general_128x128", {"softcap": 5.0})], ids=str
)
def test_groups_of_heads_that_alternate(rows: int, tile: str, options: dict[str, Any]) -> None:
    """Where that deals tiles more evenly: in every other group of heads the first rows come first."""
    q, k, v = _qkv(rows, rows, 64, heads=7, heads_kv=7)
    launches: list[emulated.Launch] = []
    options = options | {"is_causal": True}
    result = emulated.attention(
        emulated.library("hopper"), q, k, v, kernel=f"hopper_float16_d64_{tile}".encode(), num_sms=2, launches=launches,
        **options,
    )  # fmt: skip
    assert result is not None
    reference.expect(q, k, v, **options).check(*result)
    assert [(launch.num_groups, launch.groups_alternate) for launch in launches] == [(7, True)]


def _padding(keys: int) -> Array:
    return np.arange(keys) < [[[[90]]]]


def _middle(keys: int) -> Array:
    return (np.arange(keys) >= 80) & (np.arange(keys) < [[[[208]]]])


def _added(shown: Array, **values: float) -> Array:
    """0 where shown, or at key k what k says."""
    mask = np.where(shown, 0, -np.inf).astype(np.float16)
    for key, value in values.items():
        mask[..., int(key[1:])] = value
    return mask


def _blocks(rows: int, keys: int) -> Array:
    return np.arange(rows)[:, None] // 130 == np.arange(keys) // 130


MASKS: dict[str, Callable[[int, int], Array]] = {
    "padding": lambda rows, keys: _padding(keys),
    "padding_left": lambda rows, keys: ~_padding(keys),
    "all_hidden": lambda rows, keys: np.zeros((1, 1, 1, keys), bool),
    "middle": lambda rows, keys: _middle(keys),
    "middle_with_a_hole": lambda rows, keys: _middle(keys) & (np.arange(keys) != 130),
    "middle_and_a_far_key": lambda rows, keys: _middle(keys) | (np.arange(keys) == 380),
    "middle_of_float": lambda rows, keys: _added(_middle(keys)),
    "middle_of_float_with_a_hole": lambda rows, keys: _added(_middle(keys), k140=-np.inf),
    "middle_of_float_with_a_bias": lambda rows, keys: _added(_middle(keys), k150=3.0),
    "middle_of_float_below_0": lambda rows, keys: _added(_middle(keys), k80=-0.0, k150=-0.0),
    "one_key": lambda rows, keys: np.arange(keys).reshape(1, 1, 1, keys) == keys // 2,
    "blocks": _blocks,
    "blocks_of_float": lambda rows, keys: _added(_blocks(rows, keys)),
    "blocks_of_float32": lambda rows, keys: np.where(_blocks(rows, keys), 0, -np.inf).astype(np.float32),
    "padding_of_float": lambda rows, keys: _added(_padding(keys)),
    "padding_of_float32": lambda rows, keys: np.where(_padding(keys), 0.5, -np.inf).astype(np.float32),
    "lowest_rows": lambda rows, keys: np.where(
        np.arange(rows)[:, None] % 2 == 0, np.finfo(np.float32).min, np.zeros((rows, keys), np.float32)
    ),
    "stairs": lambda rows, keys: np.arange(keys) < np.arange(rows)[:, None] // 16 * 2 % 5 * 100,  # each warp's its own
    "sprinkled": lambda rows, keys: np.random.default_rng(3).random((rows, keys)) < 0.5,
    "bias": lambda rows, keys: _normal(2, rows, keys)[None],
}


@pytest.mark.parametrize("options", [{}, {"is_causal": "lower_right"}, {"window": (40, 70)}], ids=str)
@pytest.mark.parametrize("keys", [384, 390])  # rows of whole 16 bytes, and others
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", MASKS)
def test_masks(hopper: Any, name: str, dim: int, keys: int, options: dict[str, Any]) -> None:
    rows = 300
    mask = cases.place(MASKS[name](rows, keys))
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    _check(hopper, *_qkv(rows, keys, dim), attn_mask=mask, **options)


@pytest.mark.parametrize("options", [{}, {"is_causal": "lower_right"}], ids=str)
@pytest.mark.parametrize("keys", [304, 310])  # copied by the copy engine, and by lanes
@pytest.mark.parametrize("dtype", ["bool", "float16"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_one_block_works_on_many_padded_sequences(
    hopper: Any, dim: int, dtype: str, keys: int, options: dict[str, Any]
) -> None:
    """Each has its own length, one none, one a hole, one no first keys: what a block finds of one sequence's mask must
    not reach the next."""
    lengths = np.array([keys, 5, 190, 0, 129, 64])[:, None, None, None]
    shown = np.arange(keys) < lengths
    shown[2, ..., 50] = shown[4, ..., :20] = False
    q, k, v = (_normal(6, 2, n, dim, seed=seed) for seed, n in enumerate((260, keys, keys)))
    mask = shown if dtype == "bool" else np.where(shown, 0, -np.inf).astype(dtype)
    _check(hopper, q, k, v, attn_mask=cases.place(mask), num_sms=1, **options)


@pytest.mark.parametrize("strides", ["unaligned", "transposed", "backwards", "every_second", "one_key_for_all"])
@pytest.mark.parametrize("dtype", ["bool", "float16", "float32"])
@pytest.mark.parametrize("rows", [1, 150])  # alike, and not
def test_masks_anywhere_in_memory(hopper: Any, rows: int, dtype: str, strides: str) -> None:
    keys = 259
    numbers = np.random.default_rng(6).standard_normal((2, 2, 2 * keys, 2 * keys))
    mask = (numbers > 0) if dtype == "bool" else numbers.astype(dtype)
    views = {
        "unaligned": mask[..., 3 : 3 + rows, 5 : 5 + keys],
        "transposed": mask.swapaxes(2, 3)[..., :rows, :keys],
        "backwards": mask[..., :rows, keys:0:-1],
        "every_second": mask[..., : 2 * rows : 2, ::2],
        "one_key_for_all": np.broadcast_to(mask[..., :rows, :1], (2, 2, rows, keys)),
    }
    q, k, v = (_normal(2, 2, n, 64, seed=seed) for seed, n in enumerate((150, keys, keys)))
    _check(hopper, q, k, v, attn_mask=views[strides])


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("rows", [1, 150])  # alike, and not
@pytest.mark.parametrize("dim", [64, 256])  # 128 keys a tile, and 64
def test_bools_that_are_not_1(hopper: Any, dim: int, rows: int, options: dict[str, Any]) -> None:
    """As a buffer of C or another library's bytes may hold: whatever is not 0 shows its key."""
    random = np.random.default_rng(8)
    q, k, v = _qkv(150, 200, dim)
    shown = random.random((1, 1, rows, 200)) < 0.6
    numbers = random.choice(np.uint8([2, 16, 128, 254]), shown.shape) * shown
    result = hopper(q, k, v, attn_mask=cases.place(numbers.view(bool)), **options)
    if result is None:
        pytest.skip("hopper_short does not hold so wide keys")
    reference.expect(q, k, v, attn_mask=shown, **options).check(*result)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["band", "bool", "float16", "float32"])
@pytest.mark.parametrize("rows", [1, 100])  # alike, and not
def test_keys_that_a_mask_hides_are_not_read(hopper: Any, mask: str, rows: int, dim: int) -> None:
    """Beyond the tiles that hold visible keys, that is: within one, 0 * NaN is NaN."""
    q, k, v = _qkv(100, 300, dim)
    options: dict[str, Any] = {"is_causal": True}
    if mask != "band":
        shown = np.repeat(_padding(300), rows, axis=2)
        options = {"attn_mask": cases.place(shown if mask == "bool" else np.where(shown, 0, -np.inf).astype(mask))}
    right = reference.expect(q, k, v, **options)
    k[:, :, 128:], v[:, :, 128:] = np.nan, np.inf
    result = hopper(q, k, v, **options)
    if hopper.keywords["kernel"] == b"hopper_short" and (result is None or mask != "band"):
        pytest.skip("hopper_short does not hold so wide keys, and reads all that the band leaves")
    right.check(*result)


@pytest.mark.parametrize("scale", [0.01, 0.6, 3.0, 40.0])  # a reference of nothing times these fits in float32, or not
@pytest.mark.parametrize("mask", ["bool", "float16", "float32", "finfo.min", "band"])
@pytest.mark.parametrize("dim", [64, 128])
def test_rows_that_see_nothing_at_first(hopper: Any, dim: int, mask: str, scale: float) -> None:
    """Keys are walked from the last: some rows see none of those, some none at all, beside rows that see all."""
    q, k, v = _qkv(200, 300, dim, heads=4)
    shown = np.ones((1, 1, 200, 300), bool)
    shown[:, :, 0::3, 20:] = False
    shown[:, :, 1::3] = False
    options: dict[str, Any] = {"scale": scale, "sinks": np.float32([-np.inf, 0.5, -3e38, 100])}
    if mask == "band":
        options |= {"is_causal": True, "diagonal": -70}
    elif mask == "finfo.min":
        options |= {"attn_mask": cases.place(np.where(shown, 0, np.finfo(np.float32).min).astype(np.float32))}
    else:
        options |= {"attn_mask": cases.place(shown if mask == "bool" else np.where(shown, 0, -np.inf).astype(mask))}
    _check(hopper, q, k, v, **options)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 50.0}], ids=str)
def test_scores_that_leap(hopper: Any, options: dict[str, Any]) -> None:
    """Keys whose scores pass the reference by far, tile after tile: the fast step must notice."""
    q, k, v = _qkv(200, 700, 64)
    k *= np.linspace(20, 0.1, 700, dtype=np.float16)[:, None]
    _check(hopper, q, k, v, **options)


# A weight within what the reference lets pass, beyond it, beyond float16 and beyond float32.
@pytest.mark.parametrize("leap", [4.0, 8.0, 40.0, 400.0])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_bias_that_leaps(hopper: Any, dtype: str, dim: int, leap: float) -> None:
    """Keys are walked from the last: by a bias a tile that comes later outweighs those before it, in some rows."""
    q, k, v = _qkv(130, 450, dim, dtype=dtype)
    bias = np.zeros((1, 1, 130, 450), np.float32)
    bias[:, :, ::3, 200] = leap
    bias[:, :, 1::3, 20] = leap
    _check(hopper, q, k, v, attn_mask=cases.place(bias.astype(DTYPES[dtype])))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_equal_values_under_a_weight_that_rounds(hopper: Any, dim: int) -> None:
    """The mean of equal values is that value, to the last bit. One key has exp(9.046875) = 8492.0 times the weight of
    the one that is seen before it, and float16 holds 8488 and 8496: 2^-11 of it, which moves values just below 2."""
    q, k, v = _qkv(130, 450, dim)
    q[:], v[:] = 0, 2 - 2**-10
    bias = np.full((1, 1, 130, 450), -np.inf, np.float16)
    bias[..., 440], bias[..., 380] = 0, 9.046875  # in the last tile, and in the one before it
    _check(hopper, q, k, v, attn_mask=cases.place(bias))


@given(
    case=problems().map(lambda case: replace(case, dropout_p=0.0)),
    dtype=st.sampled_from(HALVES),
    num_sms=st.integers(1, 4),
)
@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_any_problem(hopper: Any, case: Case, dtype: str, num_sms: int) -> None:
    made = cases.inputs(case, DTYPES[dtype])
    assume(made.arrays[0].ndim == 4)
    result = hopper(*made.arrays, num_sms=num_sms, **made.options)
    assume(result is not None)
    reference.expect(*made.arrays, **made.options).check(*result)
