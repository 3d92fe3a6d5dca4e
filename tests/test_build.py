"""The ways to build and install, each in a copy of the sources and new virtual environments: `make test-build`.

Marked `build` and left out of `make test`, for they take minutes. What is asked of every wheel: its tag, its files,
what its libraries export and need, and a right answer in an environment that never saw the sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.build, pytest.mark.timeout(3000)]

ROOT = Path(__file__).resolve().parent.parent
LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "results", ".hypothesis", "lib"
)

RIGHT_ANSWER = """
import numpy, flashcore
q, k, v = numpy.random.default_rng(0).standard_normal((3, 1, 4, 100, 64), dtype=numpy.float32)
s = q @ k.swapaxes(-1, -2) / 8
p = numpy.exp(s - s.max(-1, keepdims=True))
assert abs(flashcore.attention(q, k, v) - p / p.sum(-1, keepdims=True) @ v).max() < 1e-5
print(flashcore.__file__)
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the checkout with nothing built in it."""
    copy = tmp_path / "sources"
    shutil.copytree(ROOT, copy, ignore=LEFT_BEHIND)
    return copy


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip and NumPy, and nothing of ours."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "numpy>=2.0"], check=True)
    return python


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment without a developer's own settings, and with the changes; None removes."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FLASHCORE_", "CUDA_"))}
    for name, value in changes.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return env


def path_without(program: str) -> str:
    """The PATH less the folders that hold a program; what else those hold is linked into one new folder."""
    kept = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, program).exists()]
    return os.pathsep.join(kept)


def build_wheel(python: Path | str, sources: Path, env: dict[str, str]) -> tuple[Path, str]:
    """`pip wheel .`: the wheel and what the build said."""
    dist = sources.parent / "dist"
    start = time.monotonic()
    command = [python, "-m", "pip", "wheel", "-v", "--no-deps", "--disable-pip-version-check", "-w", dist, sources]
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    (wheel,) = dist.glob("*.whl")
    print(f"\n{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")
    return wheel, run.stdout + run.stderr


def check_wheel(wheel: Path, tmp_path: Path) -> None:
    """One abi3 wheel with the library, the extension and the header; clean exports and needs."""
    assert "-cp311-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "unpacked")
    package = tmp_path / "unpacked" / "flashcore"
    for name in ("_C.abi3.so", "lib/libflashcore.so", "include/flashcore.h", "py.typed", "_C.pyi"):
        assert f"flashcore/{name}" in names, sorted(names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/"))]
    exported = exports(package / "lib/libflashcore.so")
    assert exported and all(name.startswith("fc_") for name in exported), exported
    assert exports(package / "_C.abi3.so") == {"PyInit__C"}
    needed = subprocess.run(
        ["ldd", package / "_C.abi3.so", package / "lib/libflashcore.so"], capture_output=True, text=True
    ).stdout
    assert not re.search(r"torch|cudart|libcuda|stdc\+\+|not found", needed), needed


def exports(library: Path) -> set[str]:
    listing = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listing.splitlines() if line.split()[-2] not in ("A",)}


def install_and_run(python: Path, wheel: Path, tmp_path: Path) -> None:
    """The wheel into an environment of its own, away from the sources; then a right answer there."""
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--force-reinstall", "--no-deps", wheel],
        check=True,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = subprocess.run([python, "-c", RIGHT_ANSWER], capture_output=True, text=True, cwd=elsewhere, env=environment())
    assert run.returncode == 0, run.stderr
    assert "site-packages" in run.stdout


def test_cpu_only(sources: Path, fresh_python: Path, tmp_path: Path) -> None:
    wheel, said = build_wheel(fresh_python, sources, environment(FLASHCORE_CUDA="0", FLASHCORE_STRICT="1"))
    assert "the CPU kernels alone" in said
    check_wheel(wheel, tmp_path)
    install_and_run(fresh_python, wheel, tmp_path)


def test_no_nvcc_and_no_gpu_builds_for_the_cpu_and_says_so(sources: Path, fresh_python: Path, tmp_path: Path) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU, so CUDA kernels would be built")
    _, said = build_wheel(fresh_python, sources, environment(PATH=path_without("nvcc")))
    assert "no nvcc and no GPU" in said and "FLASHCORE_CUDA=1" in said


def test_pip_brings_nvcc(sources: Path, fresh_python: Path, tmp_path: Path) -> None:
    env = environment(PATH=path_without("nvcc"), FLASHCORE_CUDA="1", FLASHCORE_CUDA_ARCHS="75", FLASHCORE_STRICT="1")
    wheel, said = build_wheel(fresh_python, sources, env)
    assert re.search(r"CUDA 13\.\d+ kernels for 75", said)
    check_wheel(wheel, tmp_path)
    install_and_run(fresh_python, wheel, tmp_path)


def test_all_architectures(sources: Path, fresh_python: Path, tmp_path: Path) -> None:
    """What is built where no GPU is present. The budget is 6 minutes on 2 cores; twice that fails on any machine."""
    start = time.monotonic()
    wheel, said = build_wheel(
        fresh_python,
        sources,
        environment(FLASHCORE_CUDA="1", FLASHCORE_CUDA_ARCHS="80 90a 75+PTX", FLASHCORE_STRICT="1"),
    )
    assert time.monotonic() - start < 720
    assert "[1/" in said
    check_wheel(wheel, tmp_path)
    install_and_run(fresh_python, wheel, tmp_path)


def test_source_distribution_builds(sources: Path, fresh_python: Path, tmp_path: Path) -> None:
    """Everything that a build needs is in the sdist."""
    code = "import setuptools.build_meta as b; print(b.build_sdist('.'))"
    environment_ = environment(FLASHCORE_CUDA="0")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=sources, env=environment_, capture_output=True)
    (archive,) = sources.glob("flashcore-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "sdist")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    wheel, _ = build_wheel(fresh_python, unpacked, environment_)
    install_and_run(fresh_python, wheel, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"FLASHCORE_CUDA": "maybe"}, "allowed: 0, 1, or unset"),
        ({"FLASHCORE_CUDA": "1", "FLASHCORE_CUDA_ARCHS": "70"}, "allowed: 75 and up"),
        ({"FLASHCORE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "has no bin/nvcc"),
        ({"FLASHCORE_CUDA": "0", "CC": "no-such-compiler"}, "there is no C compiler"),
        ({"FLASHCORE_CUDA": "1", "NVCC": "no-such-nvcc"}, "is no program"),
    ],
)
def test_a_failed_build_says_what_to_do(sources: Path, changes: dict[str, str], words: str) -> None:
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=sources,
        env=environment(**changes),
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert words in run.stdout + run.stderr
