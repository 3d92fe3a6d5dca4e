"""The planner's choices for the backward on GPUs. No GPU is asked."""

from __future__ import annotations

import ctypes
from typing import Any

import capi
import pytest
import variants
from capi import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INVALID, OK, UNSUPPORTED
from planning import CUDA_KERNELS, SLOW_BACKWARD, built_for, name_of, needs_cuda_build, needs_sources, row_of, some_gpu


def backward(**fields: Any) -> capi.BackwardProblem:
    """Without arrays; asks for dq, dk and dv."""
    forward = capi.shapes_only(**fields)
    forward.lse = capi.Tensor(None, (ctypes.c_int64 * 4)(*forward.query.strides[:3], 0), FLOAT32, 0)
    made = capi.BackwardProblem(struct_size=ctypes.sizeof(capi.BackwardProblem), forward=ctypes.pointer(forward))
    made.dout, made.dq, made.dk, made.dv = forward.out, forward.query, forward.key, forward.value
    return made


@needs_cuda_build
@pytest.mark.parametrize("dtype,word", [(FLOAT16, "float16"), (BFLOAT16, "bfloat16"), (FLOAT32, "float32")])
@pytest.mark.parametrize(
    "head_dim,head_dim_v,row,tile",
    [
        (1, 1, 64, 64),
        (64, 64, 64, 64),
        (65, 8, 128, 64),
        (8, 65, 128, 64),
        (128, 128, 128, 64),
        (129, 1, 256, 32),
        (1, 256, 256, 32),
    ],
)
def test_backward_rows(dtype: int, word: str, head_dim: int, head_dim_v: int, row: int, tile: int) -> None:
    """What the forward is forced to is not the backward's; there is no fast one yet, and the plan says so."""
    made = backward(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, num_heads_kv=2, kernel=b"hopper")
    status, plan = capi.backward_plan(made, some_gpu())
    assert status == OK, capi.last_error()
    assert row_of(plan) == f"portable_{word}_d{row}_any"
    assert (plan.block_m, plan.block_n, plan.num_splits, plan.slow) == (tile, tile, 1, SLOW_BACKWARD)
    assert plan.num_threads == 2 * tile
    assert plan.workspace_bytes == 16 * 2 * 8 * 512, "of each row of each query head"
    rows, keys = 2 * 8 * (512 // tile), 2 * 2 * (512 // tile)
    assert plan.num_tiles == plan.num_blocks == 2 * rows + 2 * keys, "the rows' facts, dq, dk and dv"
    for forced in (b"portable", name_of(plan).encode()):
        made.kernel = forced
        assert bytes(capi.backward_plan(made, some_gpu())[1]) == bytes(plan)
    made.block_m, made.block_n = tile, tile
    assert bytes(capi.backward_plan(made, some_gpu())[1]) == bytes(plan)


WANTED: dict[str, tuple[tuple[int, ...], int]] = {  # name: strides, tiles of 64 beside those of the rows
    "dq": ((0, 0, 64, 1), 2 * 8 * 3),
    "dk": ((0, 0, 64, 1), 2 * 4 * 5),
    "dv": ((0, 0, 64, 1), 2 * 4 * 5),
    "dbias": ((8 * 150 * 270, 150 * 270, 270, 1), 2 * 8 * 3 * 5),
    "dbias over batch": ((0, 150 * 270, 270, 1), 8 * 3 * 5),
    "dbias over batch and heads": ((0, 0, 270, 1), 3 * 5),
    "dbias over rows": ((8 * 270, 270, 0, 1), 2 * 8 * 5),
    "dbias over keys": ((8 * 150, 150, 1, 0), 2 * 8 * 3),
    "dbias over all": ((0, 0, 0, 0), 1),
    "dsinks": ((8, 1, 0, 0), 2 * 8),
    "dsinks over batch": ((0, 1, 0, 0), 8),
}


@needs_cuda_build
@pytest.mark.parametrize("name", WANTED)
def test_backward_tiles_are_those_of_what_is_wanted(name: str) -> None:
    made = backward(num_heads_kv=4, seqlen_q=150, seqlen_k=270, dtype=FLOAT32)
    forward = made.forward.contents
    gradient, (strides, tiles) = name.split()[0], WANTED[name]
    tensor = capi.Tensor(None, (ctypes.c_int64 * 4)(*strides), FLOAT32, 0)
    forward.attn_mask, forward.sinks = (capi.Tensor(None, (ctypes.c_int64 * 4)(), FLOAT32, 0) for _ in range(2))
    given = {"dq": forward.query, "dk": forward.key, "dv": forward.value}
    made.dq = made.dk = made.dv = capi.Tensor()
    assert capi.backward_plan(made, some_gpu())[1].num_tiles == 0, "nothing is wanted"
    setattr(made, gradient, given.get(gradient, tensor))
    status, plan = capi.backward_plan(made, some_gpu())
    assert status == OK, capi.last_error()
    assert plan.num_tiles == 2 * 8 * 3 + tiles


@needs_cuda_build
@pytest.mark.parametrize(
    "fields,grid",
    [
        ({"batch": 0}, 0),
        ({"num_heads_q": 0, "num_heads_kv": 0}, 0),
        ({"seqlen_q": 0}, 2 * 2 * 8 * 8),  # dk and dv are zeros, to be written
        ({"seqlen_k": 0}, 2 * 2 * 8 * 8),  # dq
    ],
    ids=str,
)
def test_backward_of_nothing(fields: dict[str, int], grid: int) -> None:
    status, plan = capi.backward_plan(backward(**fields), some_gpu())
    assert (status, plan.num_tiles, plan.num_blocks) == (OK, grid, grid)


@needs_cuda_build
def test_a_backward_beyond_32_bits() -> None:
    made = backward(batch=2**20, num_heads_q=2**10, num_heads_kv=1, seqlen_q=1000)
    status, plan = capi.backward_plan(made, some_gpu())
    assert (status, plan.num_blocks) == (OK, 2**31 - 1), "more than a grid takes"
    assert plan.num_tiles == 2 * 2**30 * 16 + 2 * 2**20 * 8
    assert plan.workspace_bytes == 16 * 2**30 * 1000


@needs_cuda_build
@pytest.mark.parametrize(
    "fields,forward,status,words",
    [
        (
            {},
            {"dtype": FLOAT64},
            UNSUPPORTED,
            "serves float64 with head_dim 64 and head_dim_v 64; there are: portable_",
        ),
        ({}, {"dtype": FLOAT64}, UNSUPPORTED, "float64 is served on the CPU"),
        (
            {"kernel": b"portable_float16_d64_any_64x64"},
            {"head_dim": 65},
            UNSUPPORTED,
            "there are: portable_float16_d64_any",
        ),
        ({"kernel": b"warp_drive"}, {}, INVALID, "'warp_drive' is forced, but this GPU has no such backward kernel"),
        ({"kernel": b"hopper"}, {}, INVALID, "there are: portable_float16_d64_any_64x64, "),
        ({"kernel": b"cpu"}, {}, INVALID, "'cpu' is forced"),
        ({"block_m": 128}, {}, INVALID, "block_m=128, block_n=0: no such tile for this problem's backward on this GPU"),
        ({"block_n": 48}, {}, INVALID, "there are (block_m, block_n): (64, 64), (32, 32); 0 lets"),
    ],
    ids=str,
)
def test_backward_refusals(fields: dict[str, Any], forward: dict[str, Any], status: int, words: str) -> None:
    made = backward(**forward)
    if made.dq.dtype == FLOAT64:
        made.forward.contents.lse.dtype = FLOAT64
    for name, value in fields.items():
        setattr(made, name, value)
    assert capi.backward_plan(made, some_gpu())[0] == status
    assert words in capi.last_error()


@needs_cuda_build
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 103, 120])
def test_the_backward_runs_where_the_forward_does(capability: int) -> None:
    status, _ = capi.backward_plan(backward(), capi.gpu_device(capability))
    assert status == (OK if built_for(capability) else UNSUPPORTED)


@needs_cuda_build
@needs_sources
def test_every_backward_row_is_a_forwards_other_half() -> None:
    rows = {variant.row for variant in variants.read("backward")}
    assert rows
    assert rows <= {name.rpartition("_")[0] for name in CUDA_KERNELS}
