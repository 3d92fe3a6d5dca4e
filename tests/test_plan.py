"""The planner's choices as tables: a problem and a device by hand in, a plan out. No GPU is asked."""

from __future__ import annotations

import ctypes
import math
import os
import re
from pathlib import Path
from typing import Any

import capi
import pytest
from capi import BFLOAT16, BOOL, CAUSAL, CPU, FLOAT16, FLOAT32, FLOAT64, INVALID, OK, UNSUPPORTED, Plan, Problem

import flashcore

KERNELS = flashcore.kernels()
CPU_KERNELS = [kernel.name for kernel in KERNELS if kernel.device == "cpu"]
CUDA_KERNELS = [kernel.name for kernel in KERNELS if kernel.device == "cuda"]
ARCHS = capi.library().fc_cuda_archs().decode()

needs_x86 = pytest.mark.skipif("cpu_avx2" not in CPU_KERNELS, reason="AVX kernels are built for x86-64 alone")
needs_cuda_build = pytest.mark.skipif(not CUDA_KERNELS, reason="this build has no CUDA kernels")


def cpu(**fields: Any) -> Problem:
    return capi.shapes_only(device_type=CPU, **{"dtype": FLOAT32, **fields})


def name_of(plan: Plan) -> str:
    return KERNELS[plan.kernel].name


def row_of(plan: Plan) -> str:
    """The kernel's name without its tile."""
    return name_of(plan).rpartition("_")[0]


def describe(problem: Problem, device: capi.Device) -> str:
    buffer = ctypes.create_string_buffer(1024)
    capi.library().fc_plan_describe(ctypes.byref(problem), ctypes.byref(device), None, buffer, 1024)
    return buffer.value.decode()


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
    assert plan.grid == tiles
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
    plan = Plan(struct_size=ctypes.sizeof(Plan), grid=123)
    problem = cpu(head_dim=300)
    assert (
        capi.library().fc_attention_plan(ctypes.byref(problem), ctypes.byref(capi.cpu_device()), ctypes.byref(plan))
        == INVALID
    )
    assert plan.grid == 123


def test_device_of_another_type() -> None:
    assert capi.plan(cpu(), capi.gpu_device(90))[0] == INVALID
    assert capi.plan(capi.shapes_only(), capi.cpu_device())[0] == INVALID
    assert "device_type" in capi.last_error()


# Words


FULL, BAND, UNBIASED, GENERAL = "full mask", "band mask", "unbiased mask", "general mask"


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
        ("attn_mask", FLOAT32, GENERAL),
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
    assert explained.copies == explained.slow == ()
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


def _built_for(capability: int) -> bool:
    """Whether the portable kernels' code for this capability is in the build: its own, an older minor's, or PTX."""
    for word in ARCHS.split():
        arch = int(re.match(r"\d+", word)[0])  # type: ignore[index]
        if word.endswith("a"):
            if arch == capability:
                return True
        elif arch <= capability and (word.endswith("+PTX") or arch // 10 == capability // 10):
            return True
    return False


@needs_cuda_build
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 103, 120])
def test_portable_serves_whatever_is_built_for(capability: int) -> None:
    status, plan = capi.plan(capi.shapes_only(kernel=b"portable"), capi.gpu_device(capability))
    if _built_for(capability):
        assert status == OK
        assert name_of(plan).startswith("portable_float16_d64")
    else:
        assert status in (UNSUPPORTED, INVALID)


def _some_gpu() -> capi.Device:
    return capi.gpu_device(next(c for c in (90, 80, 86, 89, 75, 100, 120) if _built_for(c)))


@needs_cuda_build
@pytest.mark.parametrize("dtype,word", [(FLOAT16, "float16"), (BFLOAT16, "bfloat16"), (FLOAT32, "float32")])
@pytest.mark.parametrize(
    "head_dim,head_dim_v,row",
    [(1, 1, 64), (64, 64, 64), (65, 8, 128), (8, 65, 128), (128, 128, 128), (129, 1, 256), (256, 256, 256)],
)
def test_portable_rows(dtype: int, word: str, head_dim: int, head_dim_v: int, row: int) -> None:
    problem = capi.shapes_only(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, kernel=b"portable")
    status, plan = capi.plan(problem, _some_gpu())
    assert status == OK
    assert row_of(plan) == f"portable_{word}_d{row}_any"
    assert plan.grid == 2 * 8 * -(-512 // plan.block_m)
    assert plan.workspace_bytes == 0


@needs_cuda_build
def test_float64_on_a_gpu() -> None:
    assert capi.plan(capi.shapes_only(dtype=FLOAT64), _some_gpu())[0] == UNSUPPORTED
    assert "float64 is served on the CPU" in capi.last_error()


@needs_cuda_build
def test_grid_beyond_32_bits() -> None:
    problem = capi.shapes_only(batch=2**20, num_heads_q=2**10, num_heads_kv=1, seqlen_q=1000, kernel=b"portable")
    status, plan = capi.plan(problem, _some_gpu())
    assert status == OK
    assert plan.grid == 2**30 * -(-1000 // plan.block_m)


VARIANTS = Path(__file__).parent.parent / "kernels" / "variants.def"


@needs_cuda_build
@pytest.mark.skipif(not VARIANTS.exists(), reason="needs the source tree")
def test_every_row_of_variants_is_a_kernel() -> None:
    columns = r"^FC_VARIANT\(\s*(\w+),\s*(\w+),\s*(\d+),\s*(\w+),\s*(\d+),\s*(\d+),"
    rows = re.findall(columns, VARIANTS.read_text(), re.MULTILINE)
    assert [f"{family}_{dtype}_d{dim}_{mask}_{m}x{n}" for family, dtype, dim, mask, m, n in rows] == CUDA_KERNELS


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
    plans = [capi.plan(problem, capi.gpu_device(c)) for c in (75, 80, 86, 89, 90, 100, 120)]
    assert any(status == OK and name_of(plan) == CUDA_KERNELS[index] for status, plan in plans)


# Hopper's own family


HOPPER_KERNELS = [name for name in CUDA_KERNELS if name.startswith("hopper_")]
HOPPER = capi.gpu_device(90)
SLOW_NO_FAST_KERNEL, SLOW_BACKWARD = 1, 2
INPUTS = ("query", "key", "value")


def of_hopper(plan: Plan) -> str:
    """The row of one of the two families: which, is a matter of time."""
    assert row_of(plan).startswith("hopper_")
    return row_of(plan).removeprefix("hopper_").removeprefix("short_")


needs_hopper_build = pytest.mark.skipif(not HOPPER_KERNELS, reason="this build has no kernels for sm_90a")


def family_of(problem: Problem, device: capi.Device = HOPPER) -> str:
    status, plan = capi.plan(problem, device)
    assert status == OK, capi.last_error()
    return row_of(plan).partition("_")[0]


def with_tensor(problem: Problem, name: str, dtype: int = FLOAT32) -> Problem:
    setattr(problem, name, capi.Tensor(None, (ctypes.c_int64 * 4)(), dtype, 0))
    return problem


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
        ("attn_mask", FLOAT16, {}, "general"),
        ("attn_mask", FLOAT32, {}, "general"),
        ("sinks", FLOAT32, {}, None),
        ("sinks", FLOAT32, {"softcap": 1.0}, "general"),
        ("alibi_slopes", FLOAT16, {}, "general"),
    ],
    ids=str,
)
def test_hopper_operands(name: str, dtype: int, fields: dict[str, Any], mask: str | None, flags: int) -> None:
    """A mask of None: as without the operand."""
    problem = capi.shapes_only(**fields | {"flags": flags | fields.get("flags", 0)})
    status, plan = capi.plan(with_tensor(problem, name, dtype), HOPPER)
    assert status == OK
    assert of_hopper(plan) == f"float16_d64_{mask or ('band' if flags else 'full')}"


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
        {"batch": 2**20, "num_heads_q": 2**10, "num_heads_kv": 1, "seqlen_q": 1000},  # beyond a tile's number
    ],
    ids=str,
)
def test_shapes_that_hopper_leaves_to_portable(fields: dict[str, int]) -> None:
    assert family_of(capi.shapes_only(**fields)) == "portable"


@needs_hopper_build
@pytest.mark.parametrize("mask", ["full", "band"])
@pytest.mark.parametrize("num_sms", [1, 2, 114, 132])
@pytest.mark.parametrize("batch,heads,seqlen_q", [(1, 1, 1), (1, 8, 100), (2, 8, 512), (40, 8, 130), (3, 1, 70000)])
def test_hopper_blocks(batch: int, heads: int, seqlen_q: int, num_sms: int, mask: str) -> None:
    problem = capi.shapes_only(
        batch=batch, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen_q, flags=CAUSAL * (mask == "band"),
        kernel=f"hopper_float16_d64_{mask}_192x128".encode(), diagonal=-1 if mask == "band" else 0,
    )  # fmt: skip
    status, plan = capi.plan(problem, capi.gpu_device(90, num_sms))
    assert status == OK
    assert plan.grid == batch * heads * -(-seqlen_q // plan.block_m)
    assert plan.num_blocks == min(plan.grid, num_sms)
    assert 1 <= plan.heads_at_once <= batch * heads


@needs_hopper_build
@pytest.mark.parametrize("fields", [{"batch": 0}, {"seqlen_q": 0}, {"num_heads_q": 0, "num_heads_kv": 0}], ids=str)
def test_hopper_without_tiles(fields: dict[str, int]) -> None:
    status, plan = capi.plan(capi.shapes_only(**fields), HOPPER)
    assert (status, plan.grid, plan.num_blocks) == (OK, 0, 0)


@needs_hopper_build
@pytest.mark.parametrize(
    "fields,heads,groups",
    [({}, 1, 16), ({"num_heads_kv": 2}, 4, 4), ({"batch": 100, "num_heads_kv": 1}, 8, 100)],
    ids=str,
)
def test_without_a_mask_the_heads_that_share_keys_follow_each_other(
    fields: dict[str, int], heads: int, groups: int
) -> None:
    status, plan = capi.plan(capi.shapes_only(**fields, kernel=b"hopper"), HOPPER)
    assert status == OK
    assert row_of(plan).endswith("full")
    assert (plan.heads_at_once, plan.num_groups) == (heads, groups)


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


def _loads(plan: capi.Plan, heads: int, seqlen: int, head_dim: int) -> list[float]:
    """What each block has to do in a causal call, in keys of a whole tile, by the rule of kernels/hopper/schedule.cuh:
    a tile has a cost of its own, and rows that are not there save 60% of theirs."""
    own, row_tiles = 2**21 / (plan.block_m * head_dim), -(-seqlen // plan.block_m)
    tiles = []
    for group in range(plan.num_groups):
        is_last = group + 1 == plan.num_groups
        in_group = heads - group * plan.heads_at_once if is_last else plan.heads_at_once
        is_up = plan.groups_alternate and (plan.num_groups - 1 - group) % 2
        for row_tile in sorted(range(row_tiles), reverse=not is_up):
            rows = min(plan.block_m, seqlen - row_tile * plan.block_m)
            cost = (own + row_tile * plan.block_m + rows) * (0.4 + 0.6 * rows / plan.block_m)
            tiles += [cost] * in_group
    loads = [0.0] * plan.num_blocks
    for i, cost in enumerate(tiles):
        turn, place = divmod(i, plan.num_blocks)
        loads[plan.num_blocks - 1 - place if turn % 2 else place] += cost
    assert len(tiles) == plan.grid
    return loads


@needs_hopper_build
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
        status, plan = capi.plan(problem, capi.gpu_device(90, num_sms))
        assert status == OK
        assert row_of(plan).endswith("band")
        loads = _loads(plan, batch * heads, seqlen, head_dim)
        least = 0.945 if seqlen > 300 else 0.91  # of ten turns or so, the last is not full
        assert sum(loads) / (max(loads) * len(loads)) > least


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


@needs_hopper_build
def test_a_choice_is_not_mistaken_for_that_of_other_sizes() -> None:
    def choice(batch: int) -> tuple[int, int, int]:
        plan = capi.plan(capi.shapes_only(batch=batch, seqlen_q=1000, flags=CAUSAL, kernel=b"hopper"), HOPPER)[1]
        return plan.heads_at_once, plan.num_groups, plan.groups_alternate

    batches = range(1, 200)  # more than are remembered
    once = [choice(batch) for batch in batches]
    assert [choice(batch) for batch in reversed(batches)] == once[::-1]
    assert len(set(once)) > 20


# Short sequences: which family, tile and splits. The figures behind the choices are in docs/hopper_short.md.


@needs_hopper_build
@pytest.mark.parametrize(
    "batch,heads,seqlen,flags,name,splits,blocks",
    [
        (1, 8, 128, 0, "hopper_short_float16_d64_full_64x128", 1, 16),
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
        (1, 8, 128, CAUSAL, "hopper_short_float16_d64_band_64x128", 1, 16),
        (8, 8, 256, CAUSAL, "hopper_short_float16_d64_band_64x128", 1, 264),
        (1, 1, 512, CAUSAL, "hopper_short_float16_d64_band_64x128", 4, 132),
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
    used = plan.grid * plan.num_splits
    assert plan.num_blocks % plan.num_splits == 0
    if plan.blocks_per_sm == 0:
        assert plan.num_blocks == used
    else:
        assert used <= plan.num_blocks <= plan.blocks_per_sm * num_sms
        assert -plan.num_blocks % num_sms < plan.num_splits


@needs_hopper_build
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_sms", [1, 16, 132])
@pytest.mark.parametrize("heads,seqlen_q", [(1, 1), (1, 65), (3, 500)])
def test_splits_fit_in_shared_memory(heads: int, seqlen_q: int, num_sms: int, head_dim: int) -> None:
    """With ever more keys: served until eight blocks do not hold them, and never by more than a cluster may have."""
    served = []
    for seqlen_k in [1, 100, 383, 600, 767, 900, 1500, 3000, 6000, 10_000]:
        problem = capi.shapes_only(
            batch=1, num_heads_q=heads, num_heads_kv=heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim,
            head_dim_v=head_dim, kernel=b"hopper_short",
        )  # fmt: skip
        status, plan = capi.plan(problem, capi.gpu_device(90, num_sms))
        served.append(status == OK)
        if status == OK:
            assert plan.num_splits in (1, 2, 4, 8)
            tiles = math.ceil(math.ceil(seqlen_k / plan.block_n) / plan.num_splits)
            assert (plan.block_m + 2 * tiles * plan.block_n) * 2 * head_dim < 227 * 1024
            assert plan.num_blocks % plan.num_splits == 0
    assert served == sorted(served, reverse=True)
    assert served[4] and not served[-1]


@needs_cuda_build
def test_portable_blocks() -> None:
    status, plan = capi.plan(capi.shapes_only(batch=1000, kernel=b"portable"), _some_gpu())
    assert (status, plan.num_blocks, plan.heads_at_once) == (OK, plan.grid, 0)
    status, plan = capi.plan(
        capi.shapes_only(batch=2**20, num_heads_q=2**10, num_heads_kv=1, kernel=b"portable"), _some_gpu()
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


# The backward on GPUs


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
    status, plan = capi.backward_plan(made, _some_gpu())
    assert status == OK, capi.last_error()
    assert row_of(plan) == f"portable_{word}_d{row}_any"
    assert (plan.block_m, plan.block_n, plan.num_splits, plan.slow) == (tile, tile, 1, SLOW_BACKWARD)
    assert plan.num_threads == 2 * tile
    assert plan.workspace_bytes == 16 * 2 * 8 * 512, "of each row of each query head"
    rows, keys = 2 * 8 * (512 // tile), 2 * 2 * (512 // tile)
    assert plan.grid == plan.num_blocks == 2 * rows + 2 * keys, "the rows' facts, dq, dk and dv"
    for forced in (b"portable", name_of(plan).encode()):
        made.kernel = forced
        assert bytes(capi.backward_plan(made, _some_gpu())[1]) == bytes(plan)
    made.block_m, made.block_n = tile, tile
    assert bytes(capi.backward_plan(made, _some_gpu())[1]) == bytes(plan)


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
    assert capi.backward_plan(made, _some_gpu())[1].grid == 0, "nothing is wanted"
    setattr(made, gradient, given.get(gradient, tensor))
    status, plan = capi.backward_plan(made, _some_gpu())
    assert status == OK, capi.last_error()
    assert plan.grid == 2 * 8 * 3 + tiles


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
    status, plan = capi.backward_plan(backward(**fields), _some_gpu())
    assert (status, plan.grid, plan.num_blocks) == (OK, grid, grid)


@needs_cuda_build
def test_a_backward_beyond_32_bits() -> None:
    made = backward(batch=2**20, num_heads_q=2**10, num_heads_kv=1, seqlen_q=1000)
    status, plan = capi.backward_plan(made, _some_gpu())
    assert (status, plan.num_blocks) == (OK, 2**31 - 1), "more than a grid takes"
    assert plan.grid == 2 * 2**30 * 16 + 2 * 2**20 * 8
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
    assert capi.backward_plan(made, _some_gpu())[0] == status
    assert words in capi.last_error()


@needs_cuda_build
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 103, 120])
def test_the_backward_runs_where_the_forward_does(capability: int) -> None:
    status, _ = capi.backward_plan(backward(), capi.gpu_device(capability))
    assert status == (OK if _built_for(capability) else UNSUPPORTED)


@needs_cuda_build
@pytest.mark.skipif(not VARIANTS.exists(), reason="needs the source tree")
def test_every_backward_row_is_a_forwards_other_half() -> None:
    rows = re.findall(r"^FC_BACKWARD_VARIANT\(\s*(\w+),\s*(\w+),\s*(\d+),\s*(\w+),", VARIANTS.read_text(), re.MULTILINE)
    assert rows
    forwards = {name.rpartition("_")[0] for name in CUDA_KERNELS}
    assert {f"{family}_{dtype}_d{head_dim}_{mask}" for family, dtype, head_dim, mask in rows} <= forwards


def test_kernel_order_is_the_planners() -> None:
    assert os.path.isfile(flashcore.library_path())
    assert CPU_KERNELS[-1] == "cpu_baseline", "the slowest comes last"
