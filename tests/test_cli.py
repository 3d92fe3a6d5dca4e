"""python -m flashcore: info, paths, selftest, tune."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import capi
import numpy as np
import pytest

import flashcore
from flashcore import _C, _selftest


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


DTYPES = {"float16", "bfloat16", "float32", "float64"}


def lines_of_selftest(text: str) -> dict[tuple[str, str], str]:
    """(kernel, dtype) -> the words from the verdict on."""
    lines = re.findall(r"^\[\d+/\d+\] +((?:backward )?\w+) +(\w+) +(.*)", text, re.MULTILINE)
    assert len(lines) == len(re.findall(r"^\[(\d+)/", text, re.MULTILINE))
    return {(kernel, dtype): words for kernel, dtype, words in lines}


@pytest.mark.uninstrumented
def test_selftest() -> None:
    done = run("selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    expected = set()
    for kernel in flashcore.kernels():
        if kernel.usable and kernel.device == "cpu":
            expected |= {(name, dtype) for name in (kernel.name, f"backward {kernel.name}") for dtype in DTYPES}
        elif kernel.usable:
            (dtype,) = DTYPES & set(kernel.name.split("_"))
            expected |= {(kernel.name, dtype)} | (
                {("backward portable", dtype)} if kernel.family == "portable" else set()
            )
    lines = lines_of_selftest(done.stdout)
    assert set(lines) == expected
    assert all(words.startswith("right") for words in lines.values())
    assert all(f"right {len(_selftest._PROBLEMS)} problems" in lines["backward cpu_baseline", x] for x in DTYPES)
    assert f"\n{len(lines)} of {len(lines)} right" in done.stdout


@pytest.mark.parametrize("problem", _selftest._PROBLEMS, ids=lambda problem: problem.name)
def test_selftest_looks_at_every_gradient(problem: _selftest.Problem) -> None:
    subject = _selftest.Subject("cpu_baseline", "cpu", "float32", True)
    results = _selftest._results(subject, problem, _selftest._place("cpu"))
    options = {"dattn_mask"} if problem.mask is float else set()
    assert set(results) == {"dquery", "dkey", "dvalue"} | options | ({"dsinks"} if problem.sinks else set())


def add(result: int, number: float) -> Callable[[Any], None]:
    """To one number of one of several results."""

    def fault(results: Any) -> None:
        results[result][0, 0, 2, ...].reshape(-1)[-1:] += number  # a view: lse has no last dimension

    return fault


def refuse(_: Any) -> None:
    raise NotImplementedError("no kernel on the CPU serves it")


@pytest.mark.parametrize(
    "direction,fault,words",
    [
        ("", add(0, 0.25), "(out of scale, head_dim 7)"),
        ("", add(0, float("nan")), "worst inf of the allowed error (out of"),
        ("", add(1, 0.25), "(lse of"),
        ("", refuse, "scale, head_dim 7: NotImplementedError: no kernel on the CPU serves it"),
        ("backward ", add(0, 0.25), "(dquery of"),
        ("backward ", add(1, 1.0), "(dkey of"),
        ("backward ", add(2, float("nan")), "(dvalue of"),
        ("backward ", refuse, "NotImplementedError: no kernel on the CPU serves it"),
    ],
)
def test_selftest_finds_the_wrong_kernel(
    direction: str,
    fault: Callable[[Any], None],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name = (_C, "backward") if direction else (flashcore, "attention")
    function = getattr(owner, name)

    def with_fault(*args: Any, **options: Any) -> Any:
        results = function(*args, **options)
        if os.environ["FLASHCORE_FORCE"] == "cpu_baseline":
            fault(results)
        return results

    on_cpu = [kernel for kernel in flashcore.kernels() if kernel.device == "cpu"]
    monkeypatch.setattr(flashcore, "kernels", lambda: on_cpu)  # a GPU's may serve no problem of the one that is left
    monkeypatch.setattr(owner, name, with_fault)
    monkeypatch.setattr(_selftest, "_PROBLEMS", [x for x in _selftest._PROBLEMS if x.name == "scale, head_dim 7"])
    assert _selftest.selftest() == 1
    lines = lines_of_selftest(capsys.readouterr().out)
    wrong = {subject for subject, verdict in lines.items() if verdict.startswith("WRONG")}
    assert {x for x in wrong if x[0].startswith(direction or "cpu")} == {
        (f"{direction}cpu_baseline", x) for x in DTYPES
    }
    assert all(words in lines[f"{direction}cpu_baseline", dtype] for dtype in DTYPES)
    assert all("cpu_baseline" in kernel for kernel, _ in wrong)


def test_selftest_of_kernels_for_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On one that is played: what a kernel refuses is passed over, and who refuses all is not called right."""
    attention = flashcore.attention
    few, none, other = (f"hopper_short_float16_d64_{x}_64x128" for x in ("full", "band", "general"))

    def played(*args: Any, **options: Any) -> Any:
        kernel = os.environ["FLASHCORE_FORCE"]
        if kernel == none or (kernel == few and "is_causal" in options):
            raise NotImplementedError("no kernel on this GPU serves it")
        if kernel == other:
            raise NotImplementedError("something else")
        with monkeypatch.context() as context:
            context.setenv("FLASHCORE_FORCE", "cpu_baseline")
            return attention(*args, **options)

    place = _selftest._place("cpu")
    monkeypatch.setattr(flashcore, "attention", played)
    monkeypatch.setattr(
        flashcore, "kernels", lambda: [flashcore.Kernel(x, "hopper", "cuda", True) for x in (few, none, other)]
    )
    monkeypatch.setattr(_selftest, "_place", lambda device: place)
    assert _selftest.selftest() == 1
    text = capsys.readouterr().out
    lines = lines_of_selftest(text)
    causal = sum("is_causal" in problem.options for problem in _selftest._PROBLEMS)
    assert causal > 0
    assert lines[few, "float16"].startswith(f"right {len(_selftest._PROBLEMS) - causal} problems")
    assert lines[none, "float16"].startswith("WRONG serves no problem")
    assert "WRONG full: NotImplementedError: something else" in lines[other, "float16"]
    assert "\n1 of 3 right" in text


def test_selftest_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = flashcore.Kernel("portable_float32_d64_any_64x64", "portable", "cuda", True)
    monkeypatch.setattr(flashcore, "kernels", lambda: [flashcore.Kernel("cpu_baseline", "cpu", "cpu", True), gpu])
    monkeypatch.setattr(_selftest, "find_spec", lambda name: None)
    monkeypatch.setattr(_selftest, "_PROBLEMS", [x for x in _selftest._PROBLEMS if x.name == "scale, head_dim 7"])
    assert _selftest.selftest() == 0
    lines = lines_of_selftest(capsys.readouterr().out)
    skipped = {subject: words for subject, words in lines.items() if words.startswith("skipped")}
    assert skipped == {
        ("cpu_baseline", "bfloat16"): "skipped install ml_dtypes to make its arrays",
        ("backward cpu_baseline", "bfloat16"): "skipped install ml_dtypes to make its arrays",
        (gpu.name, "float32"): "skipped install torch, and ml_dtypes for bfloat16, to make its arrays",
        ("backward portable", "float32"): "skipped install torch, and ml_dtypes for bfloat16, to make its arrays",
    }


CUDA_KERNELS = [kernel for kernel in flashcore.kernels() if kernel.device == "cuda"]


def test_selftest_knows_the_dtype_of_every_kernel() -> None:
    made = [flashcore.Kernel(f"{x}_bfloat16_d64_full_64x64", "", "cuda", True) for x in ("portable", "hopper_short")]
    for kernel in CUDA_KERNELS + made:
        (dtype,) = _selftest._dtypes_of(kernel)
        assert f"_{dtype}_d" in kernel.name


def planned(problem: _selftest.Problem, dtype: str) -> tuple[capi.Problem, Any]:
    """For a plan alone, on a GPU; and the arrays, to be kept."""
    arrays = _selftest._inputs(problem, dtype)
    made = capi.problem(*(arrays[x] for x in ("query", "key", "value", "dout")), device_type=capi.CUDA)
    capi.set_options(
        made, problem.options | {x: arrays[x] for x in arrays if x not in ("query", "key", "value", "dout")}
    )
    return made, arrays


@pytest.mark.skipif(not CUDA_KERNELS, reason="this build has no CUDA kernels")
@pytest.mark.parametrize("row", CUDA_KERNELS, ids=lambda row: row.name)
def test_selftest_has_problems_for_every_cuda_kernel(row: flashcore.Kernel) -> None:
    """Two at least, one of them as wide as the kernel, one of several tiles either way."""
    (dtype,) = _selftest._dtypes_of(row)
    head_dim, block_m, block_n = map(int, re.findall(r"_d(\d+)_\w+_(\d+)x(\d+)$", row.name)[0])
    served = []
    for problem in _selftest._PROBLEMS:
        made, _arrays = planned(problem, dtype)
        made.kernel = row.name.encode()
        plans = [capi.plan(made, capi.gpu_device(x)) for x in (90, 80, 75, 86, 89, 100, 120)]
        if any(status == capi.OK for status, _ in plans):
            served.append(problem.sizes)
    assert len(served) >= 2
    assert any(sizes[5] == head_dim for sizes in served)
    assert any(sizes[3] > block_m and sizes[4] > block_n for sizes in served)


@pytest.mark.skipif(not CUDA_KERNELS, reason="this build has no CUDA kernels")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_selftest_has_problems_for_every_backward_on_a_gpu(dtype: str) -> None:
    met = set()
    for problem in _selftest._PROBLEMS:
        made, arrays = planned(problem, dtype)
        made.lse = capi.tensor(np.empty(arrays["query"].shape[:3], np.float32))
        backward = capi.backward_problem(made, arrays["dout"], dq=arrays["query"])
        for capability in (90, 80, 75, 86, 89, 100, 120):
            status, plan = capi.backward_plan(backward, capi.gpu_device(capability))
            if status == capi.OK:
                met.add(flashcore.kernels()[plan.kernel].name)
    assert met == {
        kernel.name for kernel in CUDA_KERNELS if kernel.family == "portable" and f"_{dtype}_" in kernel.name
    }


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
        (("B1,B2,H2,S16,D8",), "'B1,B2,H2,S16,D8' has B twice"),
        (("B1000000,H8,S1000000,D64", "--device", "cpu"), "B1000000,H8,S1000000,D64,float16: "),
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
