"""CUDA kernels on the CPU: their own source, compiled with tests/emulator in place of the hardware.

attention() and backward() take NumPy arrays and go the way of a call on a GPU: check, plan, the launcher. See
tests/emulator/emulator.h for what that can find and what not. launch_of() stops at the plan, and has what of it only a
launcher is told.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import capi
import numpy as np
import variants
from reference import Array

ROOT = Path(__file__).resolve().parent.parent
INCLUDES = [f"-I{ROOT / folder}" for folder in ("tests/emulator", "kernels", "include", "csrc")]
DEFINES = ["-DFC_WITH_CUDA=1", "-DFC_BUILD_90A=1", '-DFC_CUDA_ARCHS="90a"']


class Launch(ctypes.Structure):
    """kernels/kernels.h's fc_launch."""

    _fields_ = [
        ("plan", capi.Plan),
        ("heads_at_once", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("groups_alternate", ctypes.c_bool),
        ("blocks_per_sm", ctypes.c_int32),
    ]


def lacks() -> str:
    """Why it cannot be built here, or nothing."""
    return "" if shutil.which("g++") and shutil.which("gcc") else "needs gcc and g++"


def build(folder: Path, family: str) -> Any:
    """Compiles every row of the family, two at a time, and loads them with the planner: some 20 seconds. The family ""
    has none: 2 seconds."""
    jobs = []
    for variant in variants.read("forward") + variants.read("backward"):
        if variant.family != family:
            continue
        name = f"{variant.op}_{variant.name}"
        columns = {field: value for field, value in variant._asdict().items() if field not in ("op", "arch")}
        # A namespace of its own, since all rows have functions of the same names.
        defines = [f"-DFC_{field.upper()}={value}" for field, value in columns.items()] + [f"-Dfc=fc_{name}"]
        jobs.append(["g++", "-std=c++17", "-x", "c++", str(ROOT / f"kernels/{family}/{variant.op}.cu"), *defines, name])
    jobs.append(["g++", "-std=c++17", str(ROOT / "tests/emulator/emulator.cpp"), "emulator"])
    for name in (
        "check",
        "check_backward",
        "plan",
        "plan_backward",
        "plan_hopper",
        "plan_hopper_short",
        "error",
        "cpu/backward_layout",
    ):
        jobs.append(["gcc", "-std=c11", "-D_GNU_SOURCE", str(ROOT / f"csrc/{name}.c"), Path(name).name])

    def run(job: list[str]) -> str:
        *command, name = job
        target = str(folder / f"{name}.o")
        subprocess.run([*command, "-O1", "-fPIC", "-w", *INCLUDES, *DEFINES, "-c", "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(run, jobs))
    library = folder / "emulated.so"
    subprocess.run(["g++", "-shared", "-o", str(library), *objects, "-lm"], check=True)
    return ctypes.CDLL(str(library))


@cache
def library(family: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return build(Path(folder), family)


def attention(
    library: Any,
    query: Array,
    key: Array,
    value: Array,
    layout: str = "bhsd",
    num_sms: int = 3,
    kernel: bytes = b"hopper",
    launches: list[Launch] | None = None,
    out: Array | None = None,
    **options: Any,
) -> tuple[Array, Array] | None:
    """Out and lse, NaN where nothing was written; None where no row of the family serves. options: attention()'s. Few
    multiprocessors make many tiles for each. launches: takes what the launcher was told. out: where it is to be
    written, heads outside."""
    if layout == "bshd":
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    if out is None:
        out = np.full((*query.shape[:3], value.shape[3]), np.nan, query.dtype)
    lse = np.full(query.shape[:3], np.nan, np.float32)
    problem = capi.problem(query, key, value, out, lse=lse, kernel=kernel)
    problem.device_type = capi.CUDA
    capi.set_options(problem, options)
    launch = Launch()
    device = capi.gpu_device(90, num_sms)
    status = library.fc_emulate(ctypes.byref(problem), ctypes.byref(device), ctypes.byref(launch))
    if status == capi.UNSUPPORTED:
        return None
    if launches is not None:
        launches.append(launch)
    assert status == capi.OK, f"status {status}: a block is stuck" if status < 0 else f"status {status}"
    return (out.swapaxes(1, 2) if layout == "bshd" else out), lse


def launch_of(problem: capi.Problem, num_sms: int = 132, preferred: int = -1) -> Launch:
    """What a launcher is told of a problem, whose arrays need no data, on a Hopper GPU. preferred: the kernel of a plan
    that was made before."""
    launch, device = Launch(), capi.gpu_device(90, num_sms)
    status = library("").fc_emulate_plan(ctypes.byref(problem), ctypes.byref(device), preferred, ctypes.byref(launch))
    assert status == capi.OK
    return launch


def backward(library: Any, made: capi.BackwardProblem) -> int:
    """As capi.backward, with the workspace its own."""
    return int(library.fc_emulate_backward(ctypes.byref(made), ctypes.byref(capi.gpu_device(90))))
