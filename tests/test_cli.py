"""python -m flashcore: info, paths, selftest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashcore


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    package = Path(flashcore.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-m", "flashcore", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(package), **environment},
    )


def test_info() -> None:
    done = run("info")
    assert done.returncode == 0, done.stderr
    for words in (flashcore.__version__, "Python", "CPU", "GPU", flashcore.library_path(), "cpu_baseline"):
        assert words in done.stdout
    for kernel in flashcore.kernels():
        assert kernel.name in done.stdout


def test_paths() -> None:
    done = run("paths")
    assert done.returncode == 0
    assert flashcore.library_path() in done.stdout
    assert flashcore.include_path() in done.stdout
    assert Path(flashcore.library_path()).is_file()
    assert (Path(flashcore.include_path()) / "flashcore.h").is_file()


def test_paths_as_compiler_arguments() -> None:
    done = run("paths", "--cflags", "--libs")
    assert done.stdout.count("\n") == 1
    words = done.stdout.split()
    assert f"-I{flashcore.include_path()}" in words
    assert f"-L{Path(flashcore.library_path()).parent}" in words
    assert "-lflashcore" in words


@pytest.mark.uninstrumented
def test_selftest() -> None:
    done = run("selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in flashcore.kernels():
        assert kernel.name in done.stdout


def test_mistyped_commands() -> None:
    for arguments in ((), ("inof",), ("info", "--wrong")):
        done = run(*arguments)
        assert done.returncode == 2
        assert "usage" in done.stderr
        assert "Traceback" not in done.stderr
    assert "selftest" in run("--help").stdout
