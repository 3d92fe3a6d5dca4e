"""What the tests of the planner share: facts of this build, and problems and plans in words."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import capi
import emulated
import pytest
import variants
from capi import CPU, FLOAT32, OK, Plan, Problem

import flashcore

KERNELS = flashcore.kernels()
CPU_KERNELS = [kernel.name for kernel in KERNELS if kernel.device == "cpu"]
CUDA_KERNELS = [kernel.name for kernel in KERNELS if kernel.device == "cuda"]
ARCHS = capi.library().fc_cuda_archs().decode()

HOPPER_KERNELS = [name for name in CUDA_KERNELS if name.startswith("hopper_")]
HOPPER = capi.gpu_device(90)
SLOW_NO_FAST_KERNEL, SLOW_BACKWARD = 1, 2

needs_x86 = pytest.mark.skipif("cpu_avx2" not in CPU_KERNELS, reason="AVX kernels are built for x86-64 alone")
needs_cuda_build = pytest.mark.skipif(not CUDA_KERNELS, reason="this build has no CUDA kernels")
needs_hopper_build = pytest.mark.skipif(not HOPPER_KERNELS, reason="this build has no kernels for sm_90a")
needs_sources = pytest.mark.skipif(not variants.FILE.exists(), reason="needs the source tree")
needs_compilers = pytest.mark.skipif(bool(emulated.lacks()), reason=emulated.lacks())


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


def built_for(capability: int) -> bool:
    """Whether the portable kernels' code for this capability is in the build: its own, an older minor's, or PTX."""
    for word in ARCHS.split():
        arch = int(re.match(r"\d+", word)[0])  # type: ignore[index]
        if word.endswith("a"):
            if arch == capability:
                return True
        elif arch <= capability and (word.endswith("+PTX") or arch // 10 == capability // 10):
            return True
    return False


def some_gpu() -> capi.Device:
    return capi.gpu_device(next(c for c in (90, 80, 86, 89, 75, 100, 120) if built_for(c)))


def family_of(problem: Problem, device: capi.Device = HOPPER) -> str:
    """Of the kernel that is chosen, "hopper" for both of Hopper's."""
    status, plan = capi.plan(problem, device)
    assert status == OK, capi.last_error()
    return row_of(plan).partition("_")[0]


def with_tensor(problem: Problem, name: str, dtype: int = FLOAT32) -> Problem:
    setattr(problem, name, capi.Tensor(None, (ctypes.c_int64 * 4)(), dtype, 0))
    return problem
