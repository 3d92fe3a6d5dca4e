"""Dropout: which weights are dropped, on every kernel and way, and that it is as random as it says.

The named cases with dropout run wherever the others do, against the oracle, whose Philox was written from the paper.
Here the mask itself is looked at: with an identity for value, out is the weights, and what is 0 was dropped.
"""

from __future__ import annotations

import math
from typing import Any

import capi
import cases
import emulated
import numpy as np
import pytest
import reference
from capi import INVALID, OK
from cases import DTYPES, Case
from devices import Kernel, fetch, send
from gradients import everywhere, make
from reference import Array

import flashcore
from flashcore import _C

SEED = np.array([0x0123456789ABCDEF, 0xFEDCBA9876543210], np.uint64)


# The generator


@pytest.mark.parametrize(
    "counter,key,words",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_philox(counter: list[int], key: list[int], words: list[int]) -> None:
    """Of philox4x32, 10 rounds, as Random123 publishes them."""
    assert reference.philox(np.uint32(counter), np.uint32(key)).tolist() == words


def _chi_square(counts: Array) -> float:
    """How many standard deviations from what equal counts would give."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


def test_numbers_are_uniform() -> None:
    numbers = reference.dropout_numbers(SEED, 6, 130, 200)
    for shift in (0, 8, 16, 24):
        assert abs(_chi_square(np.bincount((numbers >> shift & 255).ravel(), minlength=256))) < 4


@pytest.mark.parametrize("axis,name", list(enumerate(["head", "row", "key"])))
@pytest.mark.parametrize("distance", [1, 2, 4, 16, 48, 64])
def test_neighbours_know_nothing_of_each_other(axis: int, name: str, distance: int) -> None:
    numbers = reference.dropout_numbers(SEED, 80, 90, 100) >> 28
    first, second = (np.moveaxis(numbers, axis, 0)[part] for part in (slice(-distance), slice(distance, None)))
    pairs = np.bincount((first * 16 + second).ravel(), minlength=256)
    assert abs(_chi_square(pairs)) < 4


@pytest.mark.parametrize("other", [[1, 0], [0, 1], [2**32, 0], [0, 2**32], [2**63, 0], [0, 2**63]])
def test_each_bit_of_seed_and_offset_makes_other_numbers(other: list[int]) -> None:
    seeds = SEED, SEED ^ np.array(other, np.uint64)
    first, second = (reference.dropout_numbers(seed, 2, 100, 130) >> 28 for seed in seeds)
    assert abs(_chi_square(np.bincount((first * 16 + second).ravel(), minlength=256))) < 4


# The mask


def _weights(
    attention: Any, dtype: Any, heads: tuple[int, int] = (2, 2), rows: int = 70, keys: int = 130, batch: int = 2
) -> Array:
    """What attention(query, key, value) gives as [batch, heads, rows, keys] weights, in pieces as wide as a value."""
    rng = np.random.default_rng(42)
    query, key = (
        rng.standard_normal((batch, h, n, 24)).astype(dtype) for h, n in zip(heads, (rows, keys), strict=True)
    )
    pieces = []
    for first in range(0, keys, 200):
        value = np.eye(keys, dtype=dtype)[:, first : first + 200]
        pieces.append(
            attention(query, key, np.ascontiguousarray(np.broadcast_to(value, (batch, heads[1], *value.shape))))
        )
    return np.concatenate(pieces, axis=-1)


def _check_mask(weights: Array, p: float, visible: Array | bool = True, seed: Array = SEED) -> None:
    batch, heads, rows, keys = weights.shape
    kept = reference.kept_by_dropout(p, seed, batch * heads, rows, keys).reshape(weights.shape)
    np.testing.assert_array_equal(weights != 0, kept & visible)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 500])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": (37, 11)}, {"window": (9, 70), "diagonal": 99}, {"layout": "bshd"}, {"softcap": 3.0}],
    ids=str,
)
def test_every_kernel_drops_the_same(kernel: Kernel, dtype: str, keys: int, options: dict[str, Any]) -> None:
    """Whatever its tiles, in whatever part of one a weight lies, and from where on it walks."""
    if kernel.device == "cuda" and dtype == "float64":
        pytest.skip("float64 is served on the CPU alone; test_refusals.py checks the words")
    swap = options.get("layout") == "bshd"

    def attention(*arrays: Array) -> Array:
        sent = [send(cases.place(x.swapaxes(1, 2) if swap else x), kernel.device) for x in arrays]
        seed = send(cases.place(SEED), kernel.device)
        out = fetch(flashcore.attention(*sent, dropout_p=0.4, dropout_seed=seed, **options)).astype(np.float32)
        return out.swapaxes(1, 2) if swap else out

    band = {name: x for name, x in options.items() if name in ("window", "diagonal")}
    weights = _weights(attention, DTYPES[dtype], heads=(6, 2), keys=keys)
    _check_mask(weights, 0.4, reference.visible_band(70, keys, **band)[0])


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_threads_change_nothing(num_threads: int) -> None:
    def attention(*arrays: Array) -> Array:
        out = np.empty((*arrays[0].shape[:3], arrays[2].shape[3]), np.float32)
        made = capi.problem(*arrays, out, num_threads=num_threads)
        capi.set_options(made, {"dropout_p": 0.7, "dropout_seed": SEED})
        assert capi.forward(made) == OK, capi.last_error()
        return out

    _check_mask(_weights(attention, np.float32, rows=300), 0.7)


def test_batches_that_do_not_fold_into_one_stride() -> None:
    """They take several calls of the library, and number on."""

    def attention(query: Array, key: Array, value: Array) -> Array:
        apart = [np.empty((2, 5, *x.shape[1:]), x.dtype)[:, ::2] for x in (query, key, value)]
        for view, x in zip(apart, (query, key, value), strict=True):
            view[...] = x.reshape(view.shape)
        explained = flashcore.explain(*apart, dropout_p=0.5, dropout_seed=SEED)
        assert explained.num_calls == 2
        return flashcore.attention(*apart, dropout_p=0.5, dropout_seed=SEED).reshape(6, *query.shape[1:3], -1)

    _check_mask(_weights(attention, np.float32, batch=6), 0.5)


def test_a_problem_in_parts() -> None:
    def attention(query: Array, key: Array, value: Array) -> Array:
        out = np.empty((*query.shape[:3], value.shape[3]), np.float32)
        for first, count in ((0, 1), (1, 2)):
            part = slice(first, first + count)
            made = capi.problem(query[part], key[part], value[part], out[part], first_batch=first)
            capi.set_options(made, {"dropout_p": 0.5, "dropout_seed": SEED})
            assert capi.forward(made) == OK, capi.last_error()
        return out

    _check_mask(_weights(attention, np.float32, batch=3), 0.5)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint32])
def test_seeds_of_every_kind(dtype: Any) -> None:
    """Two numbers of 64 bits, or the four halves of them."""

    def attention(*arrays: Array) -> Array:
        return flashcore.attention(*arrays, dropout_p=0.5, dropout_seed=SEED.view(dtype))

    _check_mask(_weights(attention, np.float32), 0.5)


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9, 0.999])
def test_as_many_are_dropped_as_was_asked(p: float) -> None:
    def attention(*arrays: Array) -> Array:
        return flashcore.attention(*arrays, dropout_p=p, dropout_seed=SEED)

    weights = _weights(attention, np.float64, heads=(4, 1), rows=257, keys=333)
    deviation = math.sqrt(p * (1 - p) / weights.size)
    assert abs((weights == 0).mean() - p) < 4 * deviation
    np.testing.assert_allclose(weights[weights != 0].sum() / weights.sum(-1).size, 1, atol=0.1 if p < 0.99 else 1)


def test_nothing_and_everything() -> None:
    case = cases.CASES["causal_65"]
    given = cases.inputs(case, DTYPES["float32"])
    plain, plain_lse = flashcore.attention(*given.arrays, **given.options, return_lse=True)

    def drop(p: float) -> tuple[Array, Array]:
        return flashcore.attention(*given.arrays, **given.options, dropout_p=p, dropout_seed=SEED, return_lse=True)

    assert drop(0.0)[0].tobytes() == plain.tobytes()
    assert not drop(1.0)[0].any()
    for p in (0.0, 0.5, 1.0):
        assert drop(p)[1].tobytes() == plain_lse.tobytes(), "lse knows nothing of dropout"


# The backward


@everywhere("float32", "float64")
@pytest.mark.parametrize("options", [{}, {"window": (37, 11)}], ids=str)
def test_the_backward_drops_what_the_forward_dropped(device: str, dtype: str, options: dict[str, Any]) -> None:
    """Of which rows a key's dv is the sum: with an identity for dout each is seen apart."""
    case = Case("dropped", num_heads_q=2, seqlen_q=90, seqlen_k=170, head_dim=24, head_dim_v=90, options=options)
    call, _ = make(case, dtype, device=device)
    call.inputs.options.update(dropout_p=0.4, dropout_seed=cases.place(SEED))
    call.dout, call.dlse = cases.place(np.broadcast_to(np.eye(90, dtype=dtype), call.out.shape).copy()), None
    weights = call.run()["dv"].swapaxes(-1, -2)
    _check_mask(weights, 0.4, reference.visible_band(90, 170, **options)[0])


# The portable kernels' forward, where there is no GPU


@pytest.mark.uninstrumented
@pytest.mark.skipif(bool(emulated.lacks()), reason=emulated.lacks() or "it can be built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in cases.CASES if name.startswith("dropout")])
def test_portable_kernels_emulated(name: str, dtype: str) -> None:
    case = cases.CASES[name]
    made = cases.inputs(case, DTYPES[dtype])
    result = emulated.attention(emulated.library("portable"), *made.arrays, kernel=b"portable", **made.options)
    assert result is not None
    cases.expected(case, DTYPES[dtype]).check(*result)


# What is refused


def test_refusals_of_the_library() -> None:
    arrays = [np.zeros((1, 1, 4, 8), np.float32) for _ in range(4)]
    for fields, words in (
        ({"dropout_p": -0.5}, "dropout_p is -0.5; allowed: 0 to 1"),
        ({"dropout_p": math.nan}, "dropout_p is nan; allowed: 0 to 1"),
        ({"dropout_p": 0.5}, "dropout_p is 0.5 and dropout_seed is NULL; point it at two 64-bit numbers"),
        ({"dropout_p": 0.5, "dropout_seed": SEED.ctypes.data + 4}, "not aligned to its 8-byte numbers"),
        ({"first_batch": -1}, "first_batch is -1; allowed: 0 to"),
    ):
        assert capi.forward(capi.problem(*arrays, **fields)) == INVALID
        assert words in capi.last_error()
    assert capi.plan(capi.problem(*arrays, dropout_p=0.5))[0] == OK, "planning needs no arrays"


def test_a_gradient_needs_the_seed() -> None:
    arrays = [np.zeros((1, 1, 4, 8), np.float32) for _ in range(4)]
    saved = (*arrays[:3], None, None, None, None, arrays[3], np.zeros((1, 1, 4), np.float32))
    wanted = (True,) * 3 + (False,) * 3
    with pytest.raises(ValueError, match=r"dropout_p is 0.5 and dropout_seed is not given"):
        _C.backward(saved, arrays[3], None, wanted, {"dropout_p": 0.5})
