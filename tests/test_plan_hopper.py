"""The planner's choices on Hopper: which rows serve, which is taken, and how its tiles are dealt. No GPU is asked."""

from __future__ import annotations

import ctypes
import math
import re
from typing import Any

import capi
import emulated
import pytest
from capi import BFLOAT16, BOOL, CAUSAL, FLOAT16, FLOAT32, INVALID, OK, UNSUPPORTED, Plan
from planning import (
    HOPPER,
    SLOW_NO_FAST_KERNEL,
    describe,
    family_of,
    name_of,
    needs_compilers,
    needs_cuda_build,
    needs_hopper_build,
    row_of,
    some_gpu,
    with_tensor,
)

INPUTS = ("query", "key", "value")


def of_hopper(plan: Plan) -> str:
    """The row of one of the two families: which, is a matter of time."""
    assert row_of(plan).startswith("hopper_")
    return row_of(plan).removeprefix("hopper_").removeprefix("short_")


@needs_hopper_build
@pytest.mark.parametrize("dtype,word", [(FLOAT16, "float16"), (BFLOAT16, "bfloat16")])
@pytest.mark.parametrize("head_dim,head_dim_v", [(8, 8), (64, 64), (72, 8), (8, 72), (128, 128), (136, 8), (192, 256)])
@pytest.mark.parametrize("mask,fields", [("full", {}), ("band", {"flags": CAUSAL}), ("general", {"softcap": 5.0})])
def test_hopper_takes_the_least_row(
    mask: str, fields: dict[str, Any], head_dim: int, head_dim_v: int, dtype: int, word: str
) -> None:
    row = min(dim for dim in (64, 128, 256) if dim >= max(head_dim, head_dim_v))
    for forced in (None, b"hopper"):
        problem = capi.shapes_only(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, kernel=forced, **fields)
        status, plan = capi.plan(problem, HOPPER)
        assert status == OK
        assert of_hopper(plan) == f"{word}_d{row}_{mask}"
        assert forced is None or row_of(plan).startswith(f"hopper_{word}")
        assert plan.slow == 0
        assert plan.workspace_bytes == 0


@needs_hopper_build
@pytest.mark.parametrize(
    "fields,mask",
    [
        ({}, "full"),
        ({"diagonal": 7}, "full"),
        ({"flags": CAUSAL | capi.LOWER_RIGHT, "seqlen_q": 1}, "full"),
        ({"seqlen_k": 0}, "full"),
        ({"flags": capi.SCALE, "scale": 1e-3}, "full"),
        ({"flags": capi.SCALE, "scale": 100.0}, "full"),
        ({"flags": CAUSAL}, "band"),
        ({"flags": CAUSAL | capi.SCALE, "scale": 2.0}, "band"),
        ({"flags": CAUSAL, "diagonal": -600}, "band"),  # no row sees a key
        ({"flags": capi.WINDOW_LEFT | capi.WINDOW_RIGHT, "window_left": 0, "window_right": 0}, "band"),
        ({"softcap": 1e-3}, "general"),
        ({"flags": CAUSAL, "softcap": 1.0}, "general"),
        ({"flags": capi.SCALE, "scale": 0.0}, "general"),
        ({"flags": capi.SCALE, "scale": -1e-300}, "general"),
        ({"flags": capi.SCALE, "scale": 1e-300}, "general"),  # nothing, in float32
        ({"flags": capi.SCALE | CAUSAL, "scale": -1.0}, "general"),
    ],
    ids=str,
)
def test_hopper_mask(fields: dict[str, Any], mask: str) -> None:
    status, plan = capi.plan(capi.shapes_only(**fields), HOPPER)
    assert status == OK
    assert of_hopper(plan) == f"float16_d64_{mask}"


@needs_hopper_build
@pytest.mark.parametrize("flags", [0, CAUSAL])
@pytest.mark.parametrize(
    "name,dtype,fields,mask",
    [
        ("attn_mask", BOOL, {}, "unbiased"),
        ("attn_mask", BOOL, {"softcap": 1.0}, "general"),
        ("attn_mask", BOOL, {"flags": capi.SCALE, "scale": -1.0}, "general"),
        ("attn_mask", FLOAT16, {}, "biased"),
        ("attn_mask", FLOAT32, {}, "biased"),
        ("attn_mask", FLOAT32, {"softcap": 1.0}, "general"),
        ("attn_mask", FLOAT16, {"flags": capi.SCALE, "scale": 0.0}, "general"),
        ("sinks", FLOAT32, {}, None),
        ("sinks", FLOAT32, {"softcap": 1.0}, "general"),
        ("alibi_slopes", FLOAT16, {}, "general"),
    ],
    ids=str,
)
def test_hopper_operands(name: str, dtype: int, fields: dict[str, Any], mask: str | None, flags: int) -> None:
    """A mask of None: as without the operand."""
    mask = mask or ("band" if flags else "full")
    for family in b"hopper", b"hopper_short":
        problem = capi.shapes_only(**fields | {"flags": flags | fields.get("flags", 0)}, kernel=family)
        status, plan = capi.plan(with_tensor(problem, name, dtype), HOPPER)
        assert status == OK
        assert of_hopper(plan) == f"float16_d64_{mask}"


@needs_hopper_build
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 100, 103, 120])
def test_no_other_gpu_gets_hoppers_kernels(capability: int) -> None:
    """An 'a' target runs on exactly that one, not on what comes later."""
    device = capi.gpu_device(capability)
    status, plan = capi.plan(capi.shapes_only(), device)
    if status == OK:
        assert not name_of(plan).startswith("hopper")
        assert plan.slow == 0, "the portable family is all that this GPU has"
    status, _ = capi.plan(capi.shapes_only(kernel=b"hopper"), device)
    assert status in (INVALID, UNSUPPORTED)


@needs_hopper_build
def test_float32_on_hopper() -> None:
    status, plan = capi.plan(capi.shapes_only(dtype=FLOAT32), HOPPER)
    assert (status, row_of(plan)) == (OK, "portable_float32_d64_any")
    assert plan.slow == SLOW_NO_FAST_KERNEL
    words = describe(capi.shapes_only(dtype=FLOAT32), HOPPER)
    assert "no faster kernel serves float32" in words
    assert "aligned" not in words, "strides are not the reason"
    assert capi.plan(capi.shapes_only(dtype=FLOAT32, kernel=b"hopper"), HOPPER)[0] == UNSUPPORTED
    assert "float32" in capi.last_error()


@needs_hopper_build
def test_dropout_on_hopper() -> None:
    problem = capi.shapes_only(dropout_p=0.1)
    status, plan = capi.plan(problem, HOPPER)
    assert (status, row_of(plan)) == (OK, "portable_float16_d64_any")
    assert plan.slow == SLOW_NO_FAST_KERNEL
    assert "Hopper's kernels have no dropout" in describe(problem, HOPPER)
    problem.kernel = b"hopper"
    assert capi.plan(problem, HOPPER)[0] == UNSUPPORTED
    assert "Hopper's kernels have no dropout" in capi.last_error()


def _stride(axis: int, step: int) -> Any:
    def change(tensor: capi.Tensor) -> None:
        tensor.strides[axis] = step

    return change


def _address(address: int) -> Any:
    def change(tensor: capi.Tensor) -> None:
        tensor.data = address

    return change


UNREADABLE = {
    "address": _address(0x10008),
    "odd_rows": _stride(2, 68),
    "odd_heads": _stride(1, 512 * 64 + 4),
    "odd_batch": _stride(0, 8 * 512 * 64 + 1),
    "backwards": _stride(2, -64),
    "backward_heads": _stride(1, -512 * 64),
    "columns": _stride(3, 512),
    "every_second": _stride(3, 2),
    "one_column_repeated": _stride(3, 0),
    "backward_columns": _stride(3, -1),
    "too_far": _stride(0, 2**39),  # elements: 2^40 bytes
}


@needs_hopper_build
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("how", UNREADABLE)
def test_what_hopper_cannot_read(how: str, name: str) -> None:
    problem = capi.shapes_only()
    UNREADABLE[how](getattr(problem, name))
    status, plan = capi.plan(problem, HOPPER)
    assert (status, row_of(plan)) == (OK, "portable_float16_d64_any")
    assert plan.slow == SLOW_NO_FAST_KERNEL
    reason = "last dimension is contiguous", "multiples of 8 elements", "aligned to 16 bytes"
    assert all(part in describe(problem, HOPPER) for part in reason)
    problem.kernel = b"portable"
    assert capi.plan(problem, HOPPER)[1].slow == 0, "what is asked for is not slow"
    for forced in (b"hopper", b"hopper_float16_d64_full_192x128"):
        problem.kernel = forced
        assert capi.plan(problem, HOPPER)[0] == UNSUPPORTED
        assert all(part in capi.last_error() for part in reason)
        assert "no kernel on" in capi.last_error()


@needs_hopper_build
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(
    "change",
    [_address(0x10010), _stride(2, 72), _stride(2, 0), _stride(1, 0), _stride(0, 0), _stride(1, 8), _stride(0, 2**38)],
)
def test_what_hopper_can_read(change: Any, name: str) -> None:
    problem = capi.shapes_only()
    change(getattr(problem, name))
    assert family_of(problem) == "hopper"


@needs_hopper_build
@pytest.mark.parametrize("stride", [0, 1, 3, -5])
def test_strides_of_single_things_mean_nothing(stride: int) -> None:
    """A dimension of size 1 is never stepped over."""
    problem = capi.shapes_only(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=1, seqlen_k=1, head_dim=1, head_dim_v=1)
    for name in INPUTS:
        for axis in range(4):
            getattr(problem, name).strides[axis] = stride
    assert family_of(problem) == "hopper"


@needs_hopper_build
def test_out_may_have_any_strides_on_hopper() -> None:
    problem = capi.shapes_only()
    problem.out.data = 0x10002
    problem.out.strides = (ctypes.c_int64 * 4)(8 * 512 * 200, 512 * 200, 200, 3)
    assert family_of(problem) == "hopper"


@needs_hopper_build
@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 12},  # packed rows that do not begin at whole 16 bytes
        {"head_dim_v": 1},
        {"seqlen_k": 2**31 - 1, "num_heads_q": 1, "num_heads_kv": 1, "batch": 1},  # beyond a coordinate
        {"seqlen_k": 2**30, "num_heads_q": 1, "num_heads_kv": 1, "batch": 1},  # beyond one added to a row
        {"batch": 2**20, "num_heads_q": 2**10, "num_heads_kv": 1, "seqlen_q": 1000},  # beyond a tile's number
        {"batch": 2**15, "num_heads_q": 2**12, "num_heads_kv": 1, "seqlen_q": 600},  # beyond one's parts
    ],
    ids=str,
)
def test_shapes_that_hopper_leaves_to_portable(fields: dict[str, int]) -> None:
    assert family_of(capi.shapes_only(**fields)) == "portable"


@needs_compilers
@pytest.mark.parametrize("mask", ["full", "band"])
@pytest.mark.parametrize("num_sms", [1, 2, 114, 132])
@pytest.mark.parametrize(
    "batch,heads,seqlen_q", [(1, 1, 1), (1, 8, 100), (2, 8, 512), (40, 8, 130), (3, 1, 70000), (1, 1, 400_000)]
)
def test_hopper_blocks(batch: int, heads: int, seqlen_q: int, num_sms: int, mask: str) -> None:
    problem = capi.shapes_only(
        batch=batch, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen_q, flags=CAUSAL * (mask == "band"),
        kernel=f"hopper_float16_d64_{mask}_192x128".encode(), diagonal=-1 if mask == "band" else 0,
    )  # fmt: skip
    launch = emulated.launch_of(problem, num_sms)
    assert launch.plan.num_tiles == batch * heads * -(-seqlen_q // launch.plan.block_m)
    assert launch.plan.num_blocks == min(launch.plan.num_tiles, num_sms)
    assert 1 <= launch.heads_at_once <= batch * heads


@needs_hopper_build
@pytest.mark.parametrize("flags", [0, CAUSAL])
@pytest.mark.parametrize("num_sms", [0, 300])  # not known; more than the planner deals tiles to
def test_hopper_on_any_gpu(num_sms: int, flags: int) -> None:
    problem = capi.shapes_only(batch=100, flags=flags, kernel=b"hopper")
    status, plan = capi.plan(problem, capi.gpu_device(90, num_sms))
    assert (status, plan.num_blocks) == (OK, num_sms or plan.num_tiles)


@needs_hopper_build
@pytest.mark.parametrize("fields", [{"batch": 0}, {"seqlen_q": 0}, {"num_heads_q": 0, "num_heads_kv": 0}], ids=str)
def test_hopper_without_tiles(fields: dict[str, int]) -> None:
    status, plan = capi.plan(capi.shapes_only(**fields), HOPPER)
    assert (status, plan.num_tiles, plan.num_blocks) == (OK, 0, 0)


@needs_compilers
@pytest.mark.parametrize(
    "fields,heads,groups",
    [({}, 1, 16), ({"num_heads_kv": 2}, 4, 4), ({"batch": 100, "num_heads_kv": 1}, 8, 100)],
    ids=str,
)
def test_without_a_mask_the_heads_that_share_keys_follow_each_other(
    fields: dict[str, int], heads: int, groups: int
) -> None:
    launch = emulated.launch_of(capi.shapes_only(**fields, kernel=b"hopper"))
    assert (launch.heads_at_once, launch.num_groups) == (heads, groups)


@needs_compilers
@pytest.mark.parametrize("heads_kv,most", [(32, 16), (1, 32)])
def test_causal_heads_at_once_keep_their_keys_in_the_cache(heads_kv: int, most: int) -> None:
    """Those of one head take 2 MiB of 65% of 50; heads that share keys may all come at once."""
    problem = capi.shapes_only(
        batch=1, num_heads_q=32, num_heads_kv=heads_kv, seqlen_q=4096, seqlen_k=4096, head_dim=128, head_dim_v=128,
        flags=CAUSAL, kernel=b"hopper",
    )  # fmt: skip
    launch = emulated.launch_of(problem)
    assert (launch.heads_at_once <= most, launch.num_groups == 1) == (True, most == 32)


@needs_compilers
def test_a_later_size_of_groups_must_gain_clearly() -> None:
    """Smaller groups, or ones that alternate, would be more even here by less than 2%."""
    sizes = {"batch": 8, "num_heads_q": 12, "num_heads_kv": 12, "seqlen_q": 3000, "seqlen_k": 3000}
    launch = emulated.launch_of(
        capi.shapes_only(**sizes, flags=CAUSAL, kernel=b"hopper_float16_d64_band_192x128"), num_sms=114
    )
    assert (launch.heads_at_once, launch.groups_alternate) == (2 * 114 // 11, False)


@needs_compilers
@pytest.mark.parametrize("flags,order", [(0, (4, 8)), (CAUSAL, (32, 1))])
def test_short_calls_begin_with_the_longest_tiles(flags: int, order: tuple[int, int]) -> None:
    """Where tiles differ: of all heads at once. Elsewhere heads that share keys follow each other."""
    problem = capi.shapes_only(batch=4, num_heads_kv=2, flags=flags, seqlen_q=256, seqlen_k=256, kernel=b"hopper_short")
    launch = emulated.launch_of(problem)
    assert (launch.heads_at_once, launch.num_groups) == order


@needs_hopper_build
@pytest.mark.parametrize(
    "dtype,strides,copied",
    [
        (FLOAT16, (0, 1000 * 1000, 1000, 1), 0),
        (FLOAT16, (0, 0, 1001, 1), 1000 * 2000),
        (FLOAT16, (0, 0, 1, 1000), 1000 * 2000),
        (FLOAT32, (0, 1000 * 1001, 1001, 1), 8 * 1000 * 4000),
        (BOOL, (1000 * 1000, 0, 1000, 1), 2 * 1000 * 1008),
        (BOOL, (1000, 0, 0, 1), 0),
    ],
    ids=["aligned", "odd", "transposed", "by_head", "bools_by_batch", "padding"],
)
def test_a_mask_that_hopper_cannot_read_is_copied_once(dtype: int, strides: tuple[int, ...], copied: int) -> None:
    mask = capi.Tensor(None, (ctypes.c_int64 * 4)(*strides), dtype, 0)
    problem = capi.shapes_only(seqlen_q=1000, seqlen_k=1000, attn_mask=mask, kernel=b"hopper")
    status, plan = capi.plan(problem, HOPPER)
    assert (status, plan.workspace_bytes) == (OK, copied)


def _loads(launch: emulated.Launch, heads: int, seqlen: int, head_dim: int) -> list[float]:
    """What each block has to do in a causal call, in keys of a whole tile, by the rule of kernels/hopper/schedule.cuh:
    a tile has a cost of its own, and rows that are not there save 60% of theirs."""
    plan = launch.plan
    own, row_tiles = 2**21 / (plan.block_m * head_dim), -(-seqlen // plan.block_m)
    tiles = []
    for group in range(launch.num_groups):
        is_last = group + 1 == launch.num_groups
        in_group = heads - group * launch.heads_at_once if is_last else launch.heads_at_once
        is_up = launch.groups_alternate and (launch.num_groups - 1 - group) % 2
        for row_tile in sorted(range(row_tiles), reverse=not is_up):
            rows = min(plan.block_m, seqlen - row_tile * plan.block_m)
            cost = (own + row_tile * plan.block_m + rows) * (0.4 + 0.6 * rows / plan.block_m)
            tiles += [cost] * in_group
    loads = [0.0] * plan.num_blocks
    for i, cost in enumerate(tiles):
        round_, place = divmod(i, plan.num_blocks)
        loads[plan.num_blocks - 1 - place if round_ % 2 else place] += cost
    assert len(tiles) == plan.num_tiles
    return loads


@needs_compilers
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen", [300, 512, 1000, 1024, 2048, 3000, 4096, 8192, 16384])
@pytest.mark.parametrize("num_sms", [114, 132])
def test_causal_tiles_are_dealt_evenly(seqlen: int, head_dim: int, num_sms: int) -> None:
    batch, heads = max(1, 16384 // seqlen), 2048 // head_dim
    problem = capi.shapes_only(
        batch=batch, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen, seqlen_k=seqlen, head_dim=head_dim,
        head_dim_v=head_dim, flags=CAUSAL, kernel=b"hopper",
    )  # fmt: skip
    for _ in range(2):  # chosen, and remembered
        loads = _loads(emulated.launch_of(problem, num_sms), batch * heads, seqlen, head_dim)
        least = 0.945 if seqlen > 300 else 0.91  # of ten turns or so, the last is not full
        assert sum(loads) / (max(loads) * len(loads)) > least


@needs_compilers
def test_tiles_that_are_not_full_are_dealt_as_the_shorter_ones_they_are() -> None:
    """Of the four tiles of a head the last has 16 rows of 128: as whole ones they would be dealt to 0.76."""
    sizes = {"seqlen_q": 400, "seqlen_k": 400, "head_dim": 128, "head_dim_v": 128, "flags": CAUSAL}
    launch = emulated.launch_of(capi.shapes_only(num_heads_q=32, num_heads_kv=32, **sizes, kernel=b"hopper"))
    loads = _loads(launch, 64, 400, 128)
    assert sum(loads) / (max(loads) * len(loads)) > 0.88


@needs_hopper_build
@pytest.mark.parametrize("batch,heads,seqlen,tile", [(1, 32, 16384, (256, 64)), (2, 12, 2048, (192, 128))])
def test_windows_take_the_tiles_that_fill_their_rounds(
    batch: int, heads: int, seqlen: int, tile: tuple[int, int]
) -> None:
    """Their tiles are alike: 192 of 256 rows would take as many rounds as 264 of 192 do."""
    problem = capi.shapes_only(
        batch=batch, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen, seqlen_k=seqlen,
        flags=capi.WINDOW_LEFT | capi.WINDOW_RIGHT, window_left=128, window_right=128,
    )  # fmt: skip
    status, plan = capi.plan(problem, HOPPER)
    assert (status, plan.block_m, plan.block_n) == (OK, *tile)


@needs_compilers
def test_a_choice_is_not_mistaken_for_that_of_other_sizes() -> None:
    def choice(batch: int) -> tuple[int, int, bool]:
        launch = emulated.launch_of(capi.shapes_only(batch=batch, seqlen_q=1000, flags=CAUSAL, kernel=b"hopper"))
        return launch.heads_at_once, launch.num_groups, launch.groups_alternate

    batches = range(1, 200)  # more than are remembered
    once = [choice(batch) for batch in batches]
    assert [choice(batch) for batch in reversed(batches)] == once[::-1]
    assert len(set(once)) > 20


# Short sequences: which family, tile and splits. The figures behind the choices are in docs/hopper_short.md.


@needs_hopper_build
@pytest.mark.parametrize(
    "batch,heads,seqlen,flags,name,splits,blocks",
    [
        (1, 8, 128, 0, "hopper_short_float16_d64_full_64x128", 1, 132),
        (8, 8, 128, 0, "hopper_short_float16_d64_full_64x128", 1, 132),
        (16, 8, 128, 0, "hopper_short_float16_d64_full_64x128", 1, 264),
        (32, 8, 128, 0, "hopper_short_float16_d64_full_64x64", 1, 512),
        (1, 8, 256, 0, "hopper_short_float16_d64_full_64x128", 2, 132),
        (8, 8, 256, 0, "hopper_short_float16_d64_full_64x128", 1, 264),
        (16, 8, 256, 0, "hopper_short_float16_d64_full_128x64", 1, 256),
        (32, 8, 256, 0, "hopper_float16_d64_full_256x64", 1, 132),
        (1, 8, 512, 0, "hopper_short_float16_d64_full_64x128", 2, 132),
        (8, 8, 512, 0, "hopper_float16_d64_full_256x64", 1, 128),
        (1, 1, 512, 0, "hopper_short_float16_d64_full_64x128", 4, 132),
        (1, 1, 1024, 0, "hopper_short_float16_d64_full_64x128", 4, 132),
        (1, 1, 2048, 0, "hopper_short_float16_d64_full_128x128", 4, 64),
        (1, 8, 1024, 0, "hopper_short_float16_d64_full_128x128", 2, 128),
        (1, 8, 2048, 0, "hopper_float16_d64_full_128x128", 1, 128),
        (8, 32, 2048, 0, "hopper_float16_d64_full_256x64", 1, 132),
        (1, 32, 16384, 0, "hopper_float16_d64_full_192x128", 1, 132),
        (1, 8, 128, CAUSAL, "hopper_short_float16_d64_band_64x128", 1, 132),
        (8, 8, 256, CAUSAL, "hopper_short_float16_d64_band_64x128", 1, 264),
        (1, 1, 512, CAUSAL, "hopper_short_float16_d64_band_64x128", 4, 132),
        (1, 1, 300, 0, "hopper_short_float16_d64_full_64x64", 2, 132),  # four would have less than 128 keys each
        (4, 1, 700, 0, "hopper_short_float16_d64_full_64x128", 2, 88),  # of which no two fit on a multiprocessor
        (8, 32, 256, CAUSAL, "hopper_short_float16_d64_band_128x64", 1, 512),  # short tiles fill the gaps
        (1, 8, 4096, CAUSAL, "hopper_float16_d64_band_128x128", 1, 132),  # no block is done before the longest tile
        (8, 12, 512, CAUSAL, "hopper_float16_d64_band_192x128", 1, 132),  # 256 rows would not come out even
        (1, 8, 8192, CAUSAL, "hopper_float16_d64_band_256x64", 1, 132),  # and here 192
        (16, 12, 512, CAUSAL, "hopper_float16_d64_band_256x64", 1, 132),
    ],
)
def test_short_or_long(batch: int, heads: int, seqlen: int, flags: int, name: str, splits: int, blocks: int) -> None:
    status, plan = capi.plan(
        capi.shapes_only(
            batch=batch, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen, seqlen_k=seqlen, flags=flags
        ),
        HOPPER,
    )
    assert (status, name_of(plan), plan.num_splits, plan.num_blocks) == (OK, name, splits, blocks)


@needs_hopper_build
@pytest.mark.parametrize(
    "head_dim,flags,tiles",
    [
        (64, 0, ["256x64", "256x64", "256x64", "256x64", "192x128", "192x128"]),
        (64, CAUSAL, ["256x64", "256x64", "256x64", "256x64", "192x128", "192x128"]),
        (128, 0, ["128x128", "128x128", "192x64", "192x64", "128x128", "128x128"]),
        (128, CAUSAL, ["128x128", "128x128", "192x64", "128x128", "128x128", "192x64"]),
    ],
    ids=str,
)
def test_tiles_of_long_calls(head_dim: int, flags: int, tiles: list[str]) -> None:
    """Of 16,384 tokens in sequences of 512 to 16,384, as measured (docs/hopper.md)."""
    chosen = []
    for seqlen in [512, 1024, 2048, 4096, 8192, 16384]:
        sizes = {"num_heads_q": 2048 // head_dim, "num_heads_kv": 2048 // head_dim, "batch": 16384 // seqlen}
        sizes |= {"seqlen_q": seqlen, "seqlen_k": seqlen, "head_dim": head_dim, "head_dim_v": head_dim}
        chosen.append(name_of(capi.plan(capi.shapes_only(**sizes, flags=flags), HOPPER)[1]).split("_")[-1])
    assert chosen == tiles


@needs_hopper_build
@pytest.mark.parametrize("seqlen,tile", [(2048, "192x64"), (2560, "192x64"), (3072, "192x64"), (4096, "128x128")])
def test_causal_tiles_of_medium_length(seqlen: int, tile: str) -> None:
    sizes = {"batch": 4, "num_heads_q": 16, "num_heads_kv": 16, "seqlen_q": seqlen, "seqlen_k": seqlen}
    status, plan = capi.plan(capi.shapes_only(**sizes, head_dim=128, head_dim_v=128, flags=CAUSAL), HOPPER)
    assert (status, name_of(plan).split("_")[-1]) == (OK, tile)


@needs_compilers
def test_large_clusters_leave_room_for_one_more_call() -> None:
    """And no more, though three calls' blocks would fit."""
    problem = capi.shapes_only(batch=1, num_heads_q=1, num_heads_kv=1)
    launch = emulated.launch_of(problem)
    assert (launch.plan.num_splits, launch.blocks_per_sm) == (4, 2)


@needs_compilers
@needs_hopper_build
@pytest.mark.parametrize("flags,calls", [(0, 2), (CAUSAL, 1)])
def test_pairs_that_fill_the_machine_leave_room_for_one_more_call(flags: int, calls: int) -> None:
    """Where tiles are alike: a pair waits for two neighbours, which few blocks leave at once."""
    launch = emulated.launch_of(
        capi.shapes_only(
            batch=1, num_heads_q=8, num_heads_kv=8, seqlen_q=512, seqlen_k=512, flags=flags,
            kernel=f"hopper_short_float16_d64_{'band' if flags else 'full'}_64x128".encode(),
        )
    )  # fmt: skip
    assert (launch.plan.num_splits, launch.plan.num_blocks, launch.blocks_per_sm) == (2, 132, calls)


@needs_compilers
@pytest.mark.parametrize("heads,blocks,per_sm", [(4, 64, 1), (12, 72, 0)])
def test_grids_with_masks_are_filled_up_to_one_block_each(heads: int, blocks: int, per_sm: int) -> None:
    problem = capi.shapes_only(
        num_heads_q=heads, num_heads_kv=heads, seqlen_q=192, seqlen_k=128, kernel=b"hopper_short"
    )
    launch = emulated.launch_of(with_tensor(problem, "attn_mask", FLOAT16), num_sms=64)
    plan = launch.plan
    assert (plan.num_splits, plan.num_blocks, launch.blocks_per_sm) == (1, blocks, per_sm)


@needs_compilers
@needs_hopper_build
@pytest.mark.parametrize("num_sms", [1, 16, 114, 132])
@pytest.mark.parametrize("flags", [0, CAUSAL])
@pytest.mark.parametrize("heads,seqlen", [(h, s) for h in (1, 5, 8, 64, 100, 200, 600) for s in (64, 128, 300, 1000)])
def test_short_grids_are_even(heads: int, seqlen: int, flags: int, num_sms: int) -> None:
    """Where blocks are kept off a multiprocessor, all of the call find room in one turn, no cluster in part."""
    problem = capi.shapes_only(
        batch=1, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen, seqlen_k=seqlen, flags=flags,
        kernel=b"hopper_short",
    )  # fmt: skip
    status, plan = capi.plan(problem, capi.gpu_device(90, num_sms))
    if status != OK:
        assert seqlen == 1000 and flags == 0, "all others fit"
        return
    launch = emulated.launch_of(problem, num_sms)
    used = plan.num_tiles * plan.num_splits
    assert plan.num_blocks % plan.num_splits == 0
    if launch.blocks_per_sm == 0:
        assert plan.num_blocks == used
    else:
        assert used <= plan.num_blocks <= launch.blocks_per_sm * num_sms
        assert -plan.num_blocks % num_sms < plan.num_splits


@needs_compilers
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("flags", [0, CAUSAL])
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(4, 600), (128, 128), (100, 1000), (1024, 1024)])
def test_deterministic_plans_do_not_depend_on_the_batch(
    seqlen_q: int, seqlen_k: int, flags: int, head_dim: int
) -> None:
    """Which kernel it is and how many ways keys are split decides a row's bits; also of a plan that is used again."""
    chosen, free = set(), set()
    for batch in (1, 2, 7, 40, 200, 1000):
        for flag, found in ((capi.DETERMINISTIC, chosen), (0, free)):
            problem = capi.shapes_only(
                batch=batch, num_heads_q=2, num_heads_kv=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim,
                head_dim_v=head_dim, flags=flags | flag,
            )  # fmt: skip
            kernel = emulated.launch_of(problem).plan.kernel
            for preferred in (-1, kernel):
                plan = emulated.launch_of(problem, preferred=preferred).plan
                assert (plan.kernel, plan.num_tiles) == (kernel, batch * 2 * -(-seqlen_q // plan.block_m))
                assert plan.num_blocks % plan.num_splits == 0
                found.add((kernel, plan.num_splits))
    assert len(chosen) == 1
    if (seqlen_k, flags, head_dim) == (600, 0, 64):
        assert len(free) > 1, "or this tests nothing"


@needs_hopper_build
def test_deterministic_plans_serve_the_whole_problem() -> None:
    """Hopper's kernels read one batch of it; from one to the next they cannot step."""
    problem = capi.shapes_only(flags=capi.DETERMINISTIC)
    problem.query.strides[0] += 1
    assert family_of(problem) == "portable"


@needs_hopper_build
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_sms", [1, 16, 132])
@pytest.mark.parametrize("heads,seqlen_q", [(1, 1), (1, 65), (3, 500)])
@pytest.mark.parametrize("mask,mask_bytes", [(0, 0), (BOOL, 1), (FLOAT32, 4)])
def test_splits_fit_in_shared_memory(
    mask: int, mask_bytes: int, heads: int, seqlen_q: int, num_sms: int, head_dim: int
) -> None:
    """With ever more keys: served until eight blocks do not hold them, and never by more than a cluster may have."""
    served = []
    for seqlen_k in [1, 100, 383, 600, 700, 767, 900, 1500, 3000, 6000, 10_000]:
        problem = capi.shapes_only(
            batch=1, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim,
            head_dim_v=head_dim, kernel=b"hopper_short",
        )  # fmt: skip
        status, plan = capi.plan(with_tensor(problem, "attn_mask", mask), capi.gpu_device(90, num_sms))
        served.append(status == OK)
        if status == OK:
            assert plan.num_splits in (1, 2, 4, 8)
            tiles = math.ceil(math.ceil(seqlen_k / plan.block_n) / plan.num_splits)
            parts = max(1, plan.block_m // 16 // plan.num_splits) * (plan.num_splits - 1)
            others = parts * (head_dim // 2 + 4) * 4 * 32 + plan.block_m * plan.block_n * mask_bytes
            assert (plan.block_m + 2 * tiles * plan.block_n) * 2 * head_dim + others < 227 * 1024
            assert plan.num_blocks % plan.num_splits == 0
    assert served == sorted(served, reverse=True)
    assert served[5] and not served[-1]


@needs_cuda_build
def test_portable_blocks() -> None:
    status, plan = capi.plan(capi.shapes_only(batch=1000, kernel=b"portable"), some_gpu())
    assert (status, plan.num_blocks) == (OK, plan.num_tiles)
    status, plan = capi.plan(
        capi.shapes_only(batch=2**20, num_heads_q=2**10, num_heads_kv=1, kernel=b"portable"), some_gpu()
    )
    assert (status, plan.num_blocks) == (OK, 2**31 - 1), "more than a grid takes"


@needs_hopper_build
def test_a_forced_tile_on_hopper() -> None:
    status, plan = capi.plan(capi.shapes_only(), HOPPER)
    assert status == OK
    same = capi.shapes_only(block_m=plan.block_m, block_n=plan.block_n)
    assert name_of(capi.plan(same, HOPPER)[1]) == name_of(plan)
    assert capi.plan(capi.shapes_only(block_m=8, kernel=b"hopper"), HOPPER)[0] == INVALID
    assert "(192, 128), (256, 64), (128, 128)" in capi.last_error()


@needs_hopper_build
@pytest.mark.parametrize("name", ["block_m", "block_n"])
@pytest.mark.parametrize("forced", [None, b"hopper", b"portable"])
def test_one_side_of_a_tile_may_be_forced(forced: bytes | None, name: str) -> None:
    """Each size that the list names can be asked for by itself, and what runs has it."""
    assert capi.plan(capi.shapes_only(kernel=forced, **{name: 9999}), HOPPER)[0] == INVALID
    pairs = re.findall(r"\((\d+), (\d+)\)", capi.last_error())
    assert pairs
    for pair in pairs:
        size = int(pair[name == "block_n"])
        status, plan = capi.plan(capi.shapes_only(kernel=forced, **{name: size}), HOPPER)
        assert (status, getattr(plan, name)) == (OK, size)
        status, plan = capi.plan(capi.shapes_only(kernel=forced, block_m=int(pair[0]), block_n=int(pair[1])), HOPPER)
        assert (status, plan.block_m, plan.block_n) == (OK, int(pair[0]), int(pair[1]))


@needs_hopper_build
def test_hopper_in_words() -> None:
    words = describe(capi.shapes_only(flags=CAUSAL), HOPPER)
    assert re.match(r"hopper_(short_)?float16_d64_band_\d+x\d+ on a GPU by hand \(sm_90\)", words)
    assert "it is estimated the fastest that serves float16, head_dim 64/64, band mask" in words
