"""python -m flashcore: info, paths, selftest, tune."""

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
    lines = [line.split() for line in done.stdout.splitlines()]
    for kernel in flashcore.kernels():
        stem, tile = (kernel.name, None) if kernel.device == "cpu" else kernel.name.rsplit("_", 1)
        assert [stem] in lines if tile is None else any(line[:1] == [stem + "_"] and tile in line for line in lines)


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


def test_tune(tmp_path: Path) -> None:
    environment = {"FLASHCORE_AUTOTUNE": "1", "FLASHCORE_CACHE": str(tmp_path)}
    arguments = ("tune", "B1,H4/2,S16,D8,float32", "B1,H2,S70,D8,causal,float32", "--device", "cpu")
    done = run(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert "[1/2, " in done.stdout
    assert "up to 4 heads in groups of 2, 16 queries, 16 keys, full" in done.stdout
    assert "causal of 96 keys" in done.stdout
    if sum(kernel.device == "cpu" and kernel.usable for kernel in flashcore.kernels()) > 1:
        assert "best so far: cpu_" in done.stdout
        assert "2 of 2 shapes measured" in done.stdout
        (saved,) = tmp_path.glob("*.json")
        assert f"saved in {saved}" in done.stdout
        assert "known already" in run(*arguments, **environment).stdout
        assert "2 of 2 shapes measured" in run(*arguments, "--again", **environment).stdout
        assert f"2 shape classes, in {saved}" in run("info", **environment).stdout


def test_what_cannot_be_tuned(tmp_path: Path) -> None:
    environment = {"FLASHCORE_AUTOTUNE": "1", "FLASHCORE_CACHE": str(tmp_path)}
    for arguments, words in (
        (("B1,H2,S16",), "lacks D; a shape is B8,H12,S512,D64"),
        (("B1,H2,S16,D8,float8",), "'float8' in 'B1,H2,S16,D8,float8' is not understood"),
        (("B0,H2,S16,D8",), "'B0'"),
        (("B1,H2,S16,D300,float32", "--device", "cpu"), "B1,H2,S16,D300,float32: head_dim is 300; allowed: 1 to 256"),
        (("B1,H3/2,S16,D8,float32", "--device", "cpu"), "multiple"),
        (("--device", "tpu"), "device is 'tpu'; allowed: cpu, cuda"),
    ):
        done = run("tune", *arguments, **environment)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    done = run("tune", FLASHCORE_AUTOTUNE="0")
    assert done.returncode == 2
    assert "FLASHCORE_AUTOTUNE=0 turns tuning off; unset it" in done.stderr
    done = run("tune", FLASHCORE_FORCE="cpu_baseline", **environment)
    assert done.returncode == 2
    assert "FLASHCORE_FORCE=cpu_baseline leaves nothing to tune; unset it" in done.stderr
    assert "nothing, for FLASHCORE_AUTOTUNE=0" in run("info", FLASHCORE_AUTOTUNE="0").stdout


def test_the_list_of_shapes_to_tune() -> None:
    from flashcore._tune import SHAPES, Shape, shapes_for

    assert len(SHAPES) == len(set(SHAPES)) == 40
    assert [Shape.parse(shape.name) for shape in SHAPES] == SHAPES
    assert shapes_for("cuda:0") == SHAPES
    assert 10 < len(shapes_for("cpu")) < 40
