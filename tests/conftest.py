"""Which kernels this machine can run, and a test on each of them.

A test that takes `kernel` runs once per kernel: `kernel.force` goes to FLASHCORE_FORCE, `kernel.device` says where its
arrays must be. CPU kernels are forced by name, CUDA kernels by family, for a family is many rows of one source.
Whatever this machine lacks is skipped, and says why.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # the oracle's matrix products: as many threads as workers is enough
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import pytest
from devices import Kernel, may_refuse
from hypothesis import settings

import flashcore

# A developer's own tuned choices must not decide what is tested, here or in a process that a test starts.
os.environ["FLASHCORE_AUTOTUNE"] = "0"

# Nor what inductor compiled for another version, whose results may have lain otherwise in memory.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="flashcore-inductor-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

# One fixed set of examples for everyday runs: the suite says the same thing twice. HYPOTHESIS_PROFILE=deep searches on.
settings.register_profile("everyday", max_examples=150, deadline=None, derandomize=True, database=None)
settings.register_profile("deep", max_examples=5000, deadline=None)
settings.load_profile("everyday")


def _kernels() -> list[pytest.param]:
    params = {}
    for kernel in flashcore.kernels():
        force = kernel.name if kernel.device == "cpu" else kernel.family
        marks = [pytest.mark.gpu] if kernel.device == "cuda" else []
        if not kernel.usable:
            lacks = "instruction set" if kernel.device == "cpu" else "GPU, or one this kernel is built for"
            marks.append(pytest.mark.skip(reason=f"{force}: this machine lacks its {lacks}"))
        params[force] = pytest.param(Kernel(force, kernel.device), id=force, marks=marks)
    return list(params.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", _kernels(), indirect=True)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setenv("FLASHCORE_FORCE", request.param.force)
    return request.param


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    forced = pyfuncitem.funcargs.get("kernel")
    try:
        return (yield)
    except NotImplementedError as error:
        if forced is None or not may_refuse(forced, error):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own settings must not decide what is tested; slow paths are right paths here."""
    monkeypatch.delenv("FLASHCORE_FORCE", raising=False)
    monkeypatch.setenv("FLASHCORE_SLOW", "allow")


def _gpu() -> str:
    """Why GPU tests cannot run; "" when they can."""
    try:
        import torch
    except ImportError:
        return "needs PyTorch to make GPU arrays"
    if not torch.cuda.is_available():
        return "no GPU that PyTorch can use"
    if not any(kernel.device == "cuda" and kernel.usable for kernel in flashcore.kernels()):
        return "no CUDA kernel of this build runs on this GPU"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _gpu()
    if not reason:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header() -> str:
    return f"flashcore: {flashcore.__version__} from {flashcore.library_path()}"
