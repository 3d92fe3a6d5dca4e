"""The planner's choices as tables: a problem and a device by hand in, a plan out. No GPU is asked."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import capi
import pytest
import variants
from capi import BFLOAT16, BOOL, CAUSAL, FLOAT16, FLOAT32, FLOAT64, INVALID, OK, UNSUPPORTED, Plan
from planning import (
    CPU_KERNELS,
    CUDA_KERNELS,
    KERNELS,
    built_for,
    cpu,
    describe,
    name_of,
    needs_cuda_build,
    needs_sources,
    needs_x86,
    row_of,
    some_gpu,
    with_tensor,
)

import flashcore

# The CPU


@needs_x86
@pytest.mark.parametrize("isa,name", [(0, "cpu_baseline"), (1, "cpu_avx2"), (2, "cpu_avx512")])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32, FLOAT64])
@pytest.mark.parametrize("head_dim", [1, 64, 256])
def test_cpu_kernel_is_the_widest(isa: int, name: str, dtype: int, head_dim: int) -> None:
    status, plan = capi.plan(cpu(dtype=dtype, head_dim=head_dim), capi.cpu_device(isa))
    assert status == OK
    assert name_of(plan) == name


@needs_x86
@pytest.mark.parametrize(
    "forced,isa,chosen",
    [
        (b"cpu", 2, "cpu_avx512"),
        (b"cpu_baseline", 2, "cpu_baseline"),
        (b"cpu_avx2", 2, "cpu_avx2"),
        (b"cpu_avx512", 1, None),
        (b"cpu_avx2", 0, None),
        (b"portable", 2, None),
        (b"avx2", 2, None),
        (b"", 2, None),
    ],
)
def test_cpu_forced(forced: bytes, isa: int, chosen: str | None) -> None:
    status, plan = capi.plan(cpu(kernel=forced), capi.cpu_device(isa))
    if chosen:
        assert (status, name_of(plan)) == (OK, chosen)
    else:
        assert status == INVALID
        assert f"'{forced.decode()}'" in capi.last_error()
        assert "cpu_baseline" in capi.last_error(), "what is there goes unsaid"


@pytest.mark.parametrize(
    "batch,heads,seqlen_q,tiles",
    [
        (1, 1, 1, 1),
        (1, 1, 64, 1),
        (1, 1, 65, 2),
        (3, 5, 200, 60),
        (0, 8, 64, 0),
        (2, 0, 64, 0),
        (2, 8, 0, 0),
        (70000, 2, 1, 140000),
    ],
)
def test_grid_counts_tiles(batch: int, heads: int, seqlen_q: int, tiles: int) -> None:
    problem = cpu(batch=batch, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen_q)
    status, plan = capi.plan(problem, capi.cpu_device())
    assert (status, plan.block_m, plan.block_n) == (OK, 64, 128)
    assert plan.num_tiles == tiles
    assert plan.num_splits == 1
    assert plan.workspace_bytes == 0
    assert plan.slow == 0


@pytest.mark.parametrize(
    "shape,machine,asked,threads",
    [
        ({"batch": 8, "seqlen_q": 512, "seqlen_k": 512}, 16, 0, 16),
        ({"batch": 8, "seqlen_q": 512, "seqlen_k": 512}, 16, 3, 3),
        ({"batch": 8, "seqlen_q": 512, "seqlen_k": 512}, 2, 64, 64),
        ({"batch": 1, "num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": 128, "seqlen_k": 4096}, 16, 0, 2),  # two tiles
        ({"batch": 1, "seqlen_q": 16, "seqlen_k": 16}, 16, 0, 2),  # less work than a wake-up: who is awake may help
        ({"batch": 1, "seqlen_q": 16, "seqlen_k": 16}, 16, 1, 1),
        ({"batch": 1, "seqlen_q": 8, "seqlen_k": 16}, 16, 8, 1),  # less work than handing it over
        ({"batch": 0}, 16, 0, 1),
    ],
)
def test_cpu_threads(shape: dict[str, int], machine: int, asked: int, threads: int) -> None:
    status, plan = capi.plan(cpu(**shape, num_threads=asked), capi.cpu_device(num_threads=machine))
    assert (status, plan.num_threads) == (OK, threads)


@pytest.mark.parametrize("fields", [{"block_m": 64, "block_n": 128}, {"block_m": 64}, {"block_n": 128}], ids=str)
def test_blocks_may_be_said_if_they_are_right(fields: dict[str, int]) -> None:
    status, plan = capi.plan(cpu(**fields), capi.cpu_device())
    assert (status, plan.block_m, plan.block_n) == (OK, 64, 128)


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"block_m": 128}, "block_m=128: no such tile"),
        ({"block_n": 64}, "block_n=64: no such tile"),
        ({"block_m": 64, "block_n": 64}, "block_m=64, block_n=64: no such tile"),
        ({"block_m": 128, "block_n": 128}, "block_m=128, block_n=128: no such tile"),
        ({"block_m": 128, "kernel": b"cpu_baseline"}, "block_m=128: no such tile"),
        ({"block_m": -1}, "allowed: 0 to let the library choose"),
    ],
    ids=str,
)
def test_blocks_that_there_are_not(fields: dict[str, Any], words: str) -> None:
    assert capi.plan(cpu(**fields), capi.cpu_device())[0] == INVALID
    assert words in capi.last_error()
    if "no such tile" in words:
        assert "there are (block_m, block_n): (64, 128); give one or both of a pair" in capi.last_error()


@pytest.mark.parametrize("name", ["block_m", "block_n"])
def test_blocks_in_python(name: str) -> None:
    import numpy as np

    q = np.zeros((1, 1, 10, 8), np.float32)
    with pytest.raises(ValueError, match=rf"{name}=7: no such tile .*: \(64, 128\)"):
        flashcore.attention(q, q, q, **{name: 7})
    for wrong in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"{name} is {wrong}; allowed: None"):
            flashcore.attention(q, q, q, **{name: wrong})
    right = {"block_m": 64, "block_n": 128}[name]
    assert getattr(flashcore.explain(q, q, q, **{name: right}), name) == right


# Pure


def test_planning_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, device = cpu(), capi.cpu_device(num_threads=7)
    before = bytes(problem), bytes(device)
    plans = []
    for environment in ({}, {"FLASHCORE_FORCE": "cpu_baseline"}, {"OMP_NUM_THREADS": "1"}, {"FLASHCORE_SLOW": "error"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        plans.append(bytes(capi.plan(problem, device)[1]))
    assert len(set(plans)) == 1
    assert (bytes(problem), bytes(device)) == before, "planning wrote to its inputs"


def test_a_failed_plan_is_left_alone() -> None:
    plan = Plan(struct_size=ctypes.sizeof(Plan), num_tiles=123)
    problem = cpu(head_dim=0)
    assert (
        capi.library().fc_attention_plan(ctypes.byref(problem), ctypes.byref(capi.cpu_device()), ctypes.byref(plan))
        == INVALID
    )
    assert plan.num_tiles == 123


def test_device_of_another_type() -> None:
    assert capi.plan(cpu(), capi.gpu_device(90))[0] == INVALID
    assert capi.plan(capi.shapes_only(), capi.cpu_device())[0] == INVALID
    assert "device_type" in capi.last_error()


# Words


FULL, BAND, UNBIASED, BIASED, GENERAL = (f"{word} mask" for word in ("full", "band", "unbiased", "biased", "general"))


@pytest.mark.parametrize(
    "fields,word",
    [
        ({}, FULL),
        ({"flags": CAUSAL}, BAND),
        ({"flags": CAUSAL | capi.LOWER_RIGHT, "seqlen_q": 10, "seqlen_k": 500}, BAND),
        ({"flags": CAUSAL, "seqlen_k": 1}, FULL),  # nothing is hidden
        ({"flags": CAUSAL | capi.LOWER_RIGHT, "seqlen_q": 1}, FULL),  # decoding
        ({"flags": CAUSAL, "diagonal": 2**60}, FULL),
        ({"flags": capi.WINDOW_RIGHT, "window_right": 0}, BAND),
        ({"flags": capi.WINDOW_LEFT, "window_left": 5}, BAND),
        ({"flags": capi.WINDOW_LEFT | CAUSAL, "window_left": 5}, BAND),
        ({"flags": capi.WINDOW_LEFT, "window_left": 511}, FULL),
        ({"flags": capi.WINDOW_LEFT, "window_left": 2**62}, FULL),
        ({"flags": capi.WINDOW_LEFT, "window_left": 2**63 - 1, "diagonal": -(2**60)}, FULL),
        ({"softcap": 5.0}, GENERAL),
        ({"flags": capi.SCALE, "scale": -1.0}, GENERAL),  # turns maxima into minima
        ({"flags": capi.SCALE, "scale": 0.0}, GENERAL),
        ({"diagonal": 7}, FULL),  # a diagonal hides nothing by itself
    ],
    ids=str,
)
def test_mask_class(fields: dict[str, Any], word: str) -> None:
    assert word in describe(cpu(**fields), capi.cpu_device())


@pytest.mark.parametrize(
    "name,dtype,word",
    [
        ("attn_mask", FLOAT32, BIASED),
        ("attn_mask", BOOL, UNBIASED),
        ("sinks", FLOAT32, FULL),
        ("alibi_slopes", FLOAT32, GENERAL),
    ],
)
def test_mask_class_by_operands(name: str, dtype: int, word: str) -> None:
    problem = cpu()
    setattr(problem, name, capi.Tensor(None, (ctypes.c_int64 * 4)(), dtype, 0))
    assert word in describe(problem, capi.cpu_device())


def test_a_plan_reads_as_a_sentence() -> None:
    words = describe(cpu(batch=3, num_heads_q=5, num_heads_kv=5, seqlen_q=200), capi.cpu_device(num_threads=4))
    assert "cpu_baseline" in words
    assert "60 tiles of 64 query rows by 128 keys" in words
    assert "float32" in words
    assert "head_dim 64/64" in words
    assert words.endswith(".")
    assert "is forced" in describe(cpu(kernel=b"cpu"), capi.cpu_device())


def test_explain_says_what_the_plan_says() -> None:
    import numpy as np

    q = np.zeros((3, 5, 200, 64), np.float32)
    explained = flashcore.explain(q, q, q)
    status, plan = capi.plan(cpu(batch=3, num_heads_q=5, num_heads_kv=5, seqlen_q=200, seqlen_k=200))
    assert status == OK
    for field in ("block_m", "block_n", "num_splits", "workspace_bytes"):
        assert getattr(explained, field) == getattr(plan, field)
    assert explained.kernel == name_of(plan)
    assert explained.family == "cpu"
    assert explained.slow == ()
    assert explained.kernel in str(explained)
    assert "200" not in explained.kernel
    assert explained.candidates[0] == (explained.kernel, explained.block_m, explained.block_n, explained.num_splits)
    assert [each.kernel for each in explained.candidates] == [k.name for k in KERNELS if k.device == "cpu" and k.usable]
    assert "up to 16 heads in groups of 1, 256 queries, 256 keys" in explained.shape_class


# GPUs


def test_a_gpu_without_code_for_it() -> None:
    """Kepler, for which nothing is ever built, and every GPU where the build has no CUDA."""
    for capability in [35] if CUDA_KERNELS else [35, 75, 80, 90, 120]:
        status, _ = capi.plan(capi.shapes_only(), capi.gpu_device(capability))
        assert status == UNSUPPORTED
        assert f"{capability // 10}.{capability % 10}" in capi.last_error()
        assert f"FLASHCORE_CUDA_ARCHS={capability}" in capi.last_error()


@needs_cuda_build
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 103, 120])
def test_portable_serves_whatever_isbuilt_for(capability: int) -> None:
    status, plan = capi.plan(capi.shapes_only(kernel=b"portable"), capi.gpu_device(capability))
    if built_for(capability):
        assert status == OK
        assert name_of(plan).startswith("portable_float16_d64")
    else:
        assert status in (UNSUPPORTED, INVALID)


@needs_cuda_build
@pytest.mark.parametrize("dtype,word", [(FLOAT16, "float16"), (BFLOAT16, "bfloat16"), (FLOAT32, "float32")])
@pytest.mark.parametrize(
    "head_dim,head_dim_v,row",
    [(1, 1, 64), (64, 64, 64), (65, 8, 128), (8, 65, 128), (128, 128, 128), (129, 1, 256), (256, 256, 256)],
)
def test_portable_rows(dtype: int, word: str, head_dim: int, head_dim_v: int, row: int) -> None:
    problem = capi.shapes_only(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, kernel=b"portable")
    status, plan = capi.plan(problem, some_gpu())
    assert status == OK
    assert row_of(plan) == f"portable_{word}_d{row}_any"
    assert plan.num_tiles == 2 * 8 * -(-512 // plan.block_m)
    assert plan.workspace_bytes == 0


@needs_cuda_build
def test_float64_on_a_gpu() -> None:
    assert capi.plan(capi.shapes_only(dtype=FLOAT64), some_gpu())[0] == UNSUPPORTED
    assert "float64 is served on the CPU" in capi.last_error()


@needs_cuda_build
def test_grid_beyond_32_bits() -> None:
    problem = capi.shapes_only(batch=2**20, num_heads_q=2**10, num_heads_kv=1, seqlen_q=1000, kernel=b"portable")
    status, plan = capi.plan(problem, some_gpu())
    assert status == OK
    assert plan.num_tiles == 2**30 * -(-1000 // plan.block_m)


@needs_cuda_build
@needs_sources
def test_every_row_of_variants_is_a_kernel() -> None:
    assert [variant.name for variant in variants.read("forward")] == CUDA_KERNELS


@needs_cuda_build
@pytest.mark.parametrize("index", range(len(CUDA_KERNELS)), ids=lambda i: CUDA_KERNELS[i])
def test_every_cuda_kernel_can_be_forced(index: int) -> None:
    dtype, head_dim, mask, _ = CUDA_KERNELS[index].removeprefix("hopper_short_").split("_")[-4:]
    flags = CAUSAL if mask == "band" else 0
    problem = capi.shapes_only(
        dtype=capi.DTYPES[dtype], head_dim=int(head_dim[1:]), head_dim_v=int(head_dim[1:]), flags=flags,
        kernel=CUDA_KERNELS[index].encode(), softcap=1.0 if mask == "general" else 0.0, seqlen_k=128,
    )  # fmt: skip
    if mask == "unbiased":
        problem = with_tensor(problem, "attn_mask", BOOL)
    if mask == "biased":
        problem = with_tensor(problem, "attn_mask", FLOAT32)
    plans = [capi.plan(problem, capi.gpu_device(c)) for c in (75, 80, 86, 89, 90, 100, 120)]
    assert any(status == OK and name_of(plan) == CUDA_KERNELS[index] for status, plan in plans)


def test_kernel_order_is_the_planners() -> None:
    assert os.path.isfile(flashcore.library_path())
    assert CPU_KERNELS[-1] == "cpu_baseline", "the slowest comes last"
