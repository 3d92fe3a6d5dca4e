"""flashcore.autotune and its cache. A fake clock chooses; one test each asks the true one, on the CPU and on a GPU."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Array, assert_close

import flashcore
from flashcore import _C, Candidate, TuningCacheWarning
from flashcore import autotune as tune
from flashcore.autotune import ROUNDS, cache_path

module = sys.modules["flashcore.autotune"]  # `flashcore.autotune` is the function

needs_choice = pytest.mark.skipif(
    sum(kernel.device == "cpu" and kernel.usable for kernel in flashcore.kernels()) < 2,
    reason="this CPU has one kernel, and no choice",
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder of its own, which does not exist yet; nothing tuned before or after."""
    monkeypatch.setenv("FLASHCORE_AUTOTUNE", "1")
    monkeypatch.setenv("FLASHCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_has_warned", False)
    _C.clear_tuned()
    yield tmp_path / "cache"
    _C.clear_tuned()


def array(*shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(42).standard_normal(shape).astype(dtype)


Q = array(1, 2, 40, 16)


def clock(**us: float) -> Callable[[Candidate, int], float]:
    """Says that a kernel takes so long: baseline=3.0. Others take 100."""
    return lambda candidate, num_calls: us.get(candidate.kernel.removeprefix("cpu_"), 100.0)


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another process, with q an array like Q."""
    head = "import sys, numpy as np, flashcore\nq = np.ones((1, 2, 40, 16), np.float32)\n"
    package = str(Path(flashcore.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-P", "-c", head + code, *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": package, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


WHAT_RUNS = "e = flashcore.explain(q, q, q); print(e.kernel, e.tuned)"


# What is chosen


@pytest.mark.parametrize("how", ["pipe", "huge"])
def test_a_cache_that_is_no_file_of_ours(how: str) -> None:
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.warns(TuningCacheWarning, match="is ignored: it (is no regular file|has more than 16 MiB)"):
        module._load()


@needs_choice
def test_the_fastest_is_chosen_and_said() -> None:
    planned = flashcore.explain(Q, Q, Q)
    assert not planned.tuned
    tuning = tune(Q, Q, Q, measure=clock(baseline=3.0, avx2=5.0), progress=None)
    assert (tuning.best.kernel, tuning.planned.kernel) == ("cpu_baseline", planned.kernel)
    assert tuning.microseconds[tuning.best] == 3.0
    assert tuning.gain == pytest.approx(100 / 3 if planned.kernel == "cpu_avx512" else 5 / 3)
    explained = flashcore.explain(Q, Q, Q)
    assert (explained.kernel, explained.tuned) == ("cpu_baseline", True)
    assert "measured to be the fastest here" in str(explained)
    assert_close(flashcore.attention(Q, Q, Q), Q, Q, Q)
    assert "cpu_baseline, 3.00 us" in str(tuning)
    assert str(Candidate("name", 64, 128, 2)) == "name with 2 splits"


@needs_choice
@pytest.mark.parametrize(
    "options",
    [{"deterministic": True}, {"block_m": 64}, {"block_n": 128}, {"softcap": 3.0}, {"is_causal": True}],
    ids=str,
)
def test_who_is_not_concerned(options: dict[str, Any]) -> None:
    planned = flashcore.explain(Q, Q, Q)
    tune(Q, Q, Q, measure=clock(baseline=3.0), progress=None)
    explained = flashcore.explain(Q, Q, Q, **options)
    assert (explained.kernel, explained.tuned) == (planned.kernel, False)


@needs_choice
def test_a_class_has_options_of_its_own() -> None:
    tune(Q, Q, Q, None, 0.0, True, measure=clock(baseline=3.0), progress=None, softcap=3.0)
    assert not flashcore.explain(Q, Q, Q).tuned
    assert flashcore.explain(Q, Q, Q, is_causal=True, softcap=5.0).tuned


@needs_choice
@pytest.mark.parametrize("planned_us,stays", [(10.0, True), (10.09, True), (10.2, False), (14.0, False)])
def test_the_planners_choice_stays_unless_it_is_beaten(planned_us: float, stays: bool) -> None:
    planned = flashcore.explain(Q, Q, Q).kernel
    tuning = tune(
        Q, Q, Q, progress=None, measure=lambda candidate, calls: planned_us if candidate.kernel == planned else 10.0
    )
    assert (tuning.best == tuning.planned) == stays


@needs_choice
def test_one_bad_sample_decides_nothing() -> None:
    taken: dict[str, int] = {}

    def noisy(candidate: Candidate, num_calls: int) -> float:
        taken[candidate.kernel] = taken.get(candidate.kernel, 0) + 1
        us = 10.0 if candidate.kernel == "cpu_baseline" else 11.0
        return us * (100 if taken[candidate.kernel] in (4, 5, 6) else 1)

    assert tune(Q, Q, Q, measure=noisy, progress=None).best.kernel == "cpu_baseline"


@needs_choice
def test_a_first_look_is_not_compared_with_later_ones() -> None:
    """The machine becomes busy between them, and all take three times as long."""
    asked = []

    def busier(candidate: Candidate, num_calls: int) -> float:
        asked.append(candidate)
        us = {"cpu_baseline": 10.0, "cpu_avx2": 15.0}.get(candidate.kernel, 16.0)
        return us if len(asked) <= 2 * len(_C.plan(Q, Q, Q)["candidates"]) else 3 * us

    assert tune(Q, Q, Q, measure=busier, progress=None).best.kernel == "cpu_baseline"


@needs_choice
def test_those_near_the_best_are_measured_in_turn() -> None:
    asked: list[tuple[str, int]] = []

    def record(candidate: Candidate, num_calls: int) -> float:
        asked.append((candidate.kernel, num_calls))
        return {"cpu_baseline": 50.0, "cpu_avx2": 45.0}.get(candidate.kernel, 200.0)

    tuning = tune(Q, Q, Q, measure=record, progress=None)
    candidates = list(tuning.microseconds)
    looks, turns = asked[: 2 * len(candidates)], asked[2 * len(candidates) :]
    assert [kernel for kernel, _ in looks] == [each.kernel for each in candidates for _ in range(2)]
    assert {calls for kernel, calls in looks if kernel == "cpu_baseline"} == {1, 40}, "2 ms a sample"
    around = len(turns) // ROUNDS
    assert turns == turns[:around] * ROUNDS
    names = [kernel for kernel, _ in turns[:around]]
    assert len(set(names)) == around
    assert {"cpu_baseline", "cpu_avx2", tuning.planned.kernel} == set(names), "the planner's is always among them"


@needs_choice
def test_progress_says_the_best_so_far() -> None:
    lines: list[str] = []
    tuning = tune(Q, Q, Q, measure=clock(baseline=3.0), progress=lines.append)
    count = len(tuning.microseconds)
    assert f"{count} candidates" in lines[0]
    assert [f"[{i + 1}/{count}]" in line for i, line in enumerate(lines[1:-1])] == [True] * count
    assert f"best so far: {tuning.planned}" in lines[1]
    assert "3.00 us; best so far: cpu_baseline" in lines[count]
    assert lines[-1] == str(tuning)


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    tuning = tune(Q, Q, Q, measure=clock())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f"{tuning}\n")


@pytest.mark.parametrize(
    "options,error,words",
    [
        ({"block_m": 64}, ValueError, "block_m is 64, which leaves nothing to tune"),
        ({"block_n": 128}, ValueError, "block_n is 128"),
        ({"deterministic": True}, ValueError, "deterministic is True"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], error: type[Exception], words: str, cache: Path) -> None:
    with pytest.raises(error, match=words):
        tune(Q, Q, Q, measure=clock(), progress=None, **options)
    assert not cache.exists()


def test_a_forced_kernel_leaves_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_FORCE", "cpu_baseline")
    with pytest.raises(ValueError, match="FLASHCORE_FORCE=cpu_baseline leaves nothing to tune; unset it"):
        tune(Q, Q, Q, progress=None)


def test_nothing_to_choose_from(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    found = _C.plan(Q, Q, Q)
    monkeypatch.setattr(_C, "plan", lambda *args, **options: found | {"candidates": found["candidates"][:1]})
    tuning = tune(Q, Q, Q, measure=clock(), progress=None)
    assert (tuning.best, tuning.microseconds, tuning.gain) == (tuning.planned, {}, 1.0)
    assert str(tuning).endswith("is all that serves it")
    assert not cache.exists()


def test_a_failure_while_measuring_is_the_callers(cache: Path) -> None:
    def fails(candidate: Candidate, num_calls: int) -> float:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        tune(Q, Q, Q, measure=fails, progress=None)
    assert not cache.exists()
    assert not flashcore.explain(Q, Q, Q).tuned


# The cache


@needs_choice
def test_a_later_process_knows(cache: Path) -> None:
    tuning = tune(Q, Q, Q, measure=clock(baseline=3.0), progress=None)
    assert tuning.saved == str(cache_path())
    assert list(cache.glob("*.json")) == [cache_path()]
    assert run(WHAT_RUNS).stdout.split() == ["cpu_baseline", "True"]
    # attention loads it too, and calls that leave no choice do not
    loads = (
        "import flashcore.autotune; m = sys.modules['flashcore.autotune']; m._load = lambda: print('load', end=' ')\n"
    )
    calls = "for o in ({'deterministic': True}, {'block_m': 64}, {}, {}): flashcore.attention(q, q, q, **o); print(o)"
    assert run(loads + calls).stdout.splitlines() == ["{'deterministic': True}", "{'block_m': 64}", "load {}", "{}"]


@needs_choice
def test_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune(Q, Q, Q, measure=clock(baseline=3.0), progress=None)
    before = cache_path().read_bytes()
    assert run(WHAT_RUNS, FLASHCORE_AUTOTUNE="0").stdout.split()[1] == "False"
    monkeypatch.setenv("FLASHCORE_AUTOTUNE", "0")
    tuning = tune(Q, Q, Q, measure=clock(avx2=3.0), progress=None)
    assert tuning.microseconds == {}
    assert "FLASHCORE_AUTOTUNE=0 turns it off" in str(tuning)
    assert cache_path().read_bytes() == before


def test_a_plain_call_neither_measures_nor_writes(cache: Path) -> None:
    code = "flashcore.attention(q, q, q); flashcore.explain(q, q, q); print('json' in sys.modules)"
    assert run(code).stdout == "False\n", "with no cache there is nothing to parse"
    assert not cache.exists()


@needs_choice
def test_entries_add_up(cache: Path) -> None:
    other = array(1, 2, 400, 16)
    tune(Q, Q, Q, measure=clock(baseline=3.0), progress=None)
    tune(other, other, other, measure=clock(baseline=4.0), progress=None)
    tune(Q, Q, Q, measure=clock(baseline=2.0), progress=None)
    entries = json.loads(cache_path().read_text())["entries"]
    assert [entry["microseconds"] for entry in entries] == [2.0, 4.0]
    assert {entry["kernel"] for entry in entries} == {"cpu_baseline"}
    assert [path.name for path in cache.iterdir() if path.suffix == ".tmp"] == []


@needs_choice
def test_many_processes_write_at_once() -> None:
    code = """
for i in map(int, sys.argv[1:]):
    q = np.ones((1, 1, 2**i, 16), np.float32)
    flashcore.autotune(q, q, q, measure=lambda c, n: 1.0 if c.kernel == "cpu_baseline" else 2.0, progress=None)
"""
    package = str(Path(flashcore.__file__).parent.parent)
    head = "import sys, numpy as np, flashcore\n"
    writers = [
        subprocess.Popen(
            [sys.executable, "-P", "-W", "error", "-c", head + code, *map(str, sizes)],
            env={**os.environ, "PYTHONPATH": package},
        )
        for sizes in ((1, 2, 3, 4), (5, 6, 7, 8), (4, 3, 9, 10), (10, 11, 12, 1))
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 4
    assert len(json.loads(cache_path().read_text())["entries"]) == 12


def with_entry(**changes: Any) -> Callable[[str], str]:
    """An edit of a cache's text: the first entry changed, and None takes a field away."""

    def edit(text: str) -> str:
        whole = json.loads(text)
        entry = whole["entries"][0] | changes
        whole["entries"][0] = {name: value for name, value in entry.items() if value is not None}
        return json.dumps(whole)

    return edit


BROKEN: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "not_json": lambda text: "tuned: yes",
    "not_text": lambda text: "\udcff\udcfe\x00",
    "deep": lambda text: "[" * 100_000,
    "list": lambda text: "[]",
    "number": lambda text: "7",
    "another_format": lambda text: text.replace('"format": 1', '"format": 2'),
    "another_build": lambda text: text.replace(_C.revision, "0" * 12),
    "no_entries": lambda text: text.replace("entries", "exits"),
    "entries_of_another_kind": lambda text: json.dumps(json.loads(text) | {"entries": {"a": 1}}),
    "entry_of_another_kind": lambda text: json.dumps(json.loads(text) | {"entries": [None]}),
    "no_device": with_entry(device=None),
    "device_of_another_kind": with_entry(device=["cpu"]),
    "unknown_device": lambda text: text.replace('"type": "cpu"', '"type": "tpu"'),
    "device_without_name": with_entry(device={"type": "cpu"}),
    "class_of_another_kind": with_entry(shape_class=5),
    "class_beyond_64_bits": with_entry(shape_class="0x" + "f" * 17),
    "class_unhashable": with_entry(shape_class=[]),
    "no_kernel": with_entry(kernel=None),
    "unknown_kernel": with_entry(kernel="cpu_avx9"),
    "kernel_of_another_kind": with_entry(kernel=3),
    "kernel_with_zero": with_entry(kernel="cpu\0_avx2"),
}


@needs_choice
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_cache_is_ignored_with_one_warning(how: str) -> None:
    tune(Q, Q, Q, measure=clock(baseline=3.0), progress=None)
    path = cache_path()
    path.write_bytes(BROKEN[how](path.read_text()).encode(errors="surrogateescape"))
    _C.clear_tuned()
    with pytest.warns(TuningCacheWarning, match="is ignored: ") as caught:
        module._load()
        module._load()
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert not flashcore.explain(Q, Q, Q).tuned
    tune(Q, Q, Q, measure=clock(baseline=3.0), progress=None)  # mends it
    _C.clear_tuned()
    module._load()
    assert flashcore.explain(Q, Q, Q).tuned


@needs_choice
def test_a_call_survives_a_broken_cache(cache: Path) -> None:
    cache.mkdir()
    cache_path().write_text("{")
    done = run("flashcore.attention(q, q, q); flashcore.attention(q, q, q); " + WHAT_RUNS)
    assert done.stdout.split()[1] == "False"
    assert done.stderr.count("TuningCacheWarning") == 1
    assert cache_path().read_text() == "{", "calls only read"


@needs_choice
@pytest.mark.parametrize("how", ["file_for_folder", "folder_for_file", "read_only"])
def test_a_cache_that_cannot_be_written(how: str, cache: Path, tmp_path: Path) -> None:
    if how == "file_for_folder":
        cache.write_text("in the way")
    elif how == "folder_for_file":
        cache_path().mkdir(parents=True)
    else:
        cache.mkdir()
        cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
        if os.access(cache, os.W_OK):
            pytest.skip("this user may write anywhere")
    with pytest.warns(TuningCacheWarning, match="cannot be written, and the choice holds for this process") as caught:
        tuning = tune(Q, Q, Q, measure=clock(baseline=3.0), progress=None)
        tune(Q, Q, Q, measure=clock(baseline=3.0), progress=None)
    assert len(caught) == 1
    assert tuning.saved == ""
    assert flashcore.explain(Q, Q, Q).tuned


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHCORE_CACHE")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.warns(TuningCacheWarning, match="home"):
        module._load()


@pytest.mark.parametrize(
    "environment,folder",
    [
        ({"FLASHCORE_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/flashcore"),
        ({"XDG_CACHE_HOME": "relative"}, "/h/.cache/flashcore"),  # which the XDG specification says to ignore
        ({"XDG_CACHE_HOME": ""}, "/h/.cache/flashcore"),
        ({}, "/h/.cache/flashcore"),
        ({"FLASHCORE_CACHE": ""}, "/h/.cache/flashcore"),
    ],
    ids=str,
)
def test_where_it_is(environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHCORE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache_path()) == f"{folder}/tuned-1-{flashcore.__version__}-{_C.revision}.json"


# The true clock


def test_measuring_on_the_cpu(cache: Path) -> None:
    q = array(1, 2, 64, 32)
    tuning = tune(q, q, q, progress=None)
    candidates = [Candidate(*each) for each in _C.plan(q, q, q)["candidates"]]
    if len(candidates) > 1:
        assert list(tuning.microseconds) == candidates
        assert all(0.1 < us < 1e6 for us in tuning.microseconds.values())
        assert tuning.gain >= 1
        assert Path(tuning.saved).exists()


@pytest.mark.parametrize("kind", ["float16", "return_lse", "out", "batches", "empty", "torch"])
def test_every_kind_of_call_can_be_measured(kind: str) -> None:
    q, options = array(2, 3, 20, 8), {}
    if kind == "float16":
        q = q.astype(np.float16)
    elif kind == "return_lse":
        options = {"return_lse": True}
    elif kind == "out":
        options = {"out": np.full_like(q, np.nan)}
    elif kind == "batches":  # that do not fold
        q = array(2, 5, 3, 2, 20, 8)[:, ::2, :, :].swapaxes(0, 1)
    elif kind == "empty":
        q = q[:0]
    elif kind == "torch":
        q = pytest.importorskip("torch").from_numpy(q)
    kernel = _C.plan(q, q, q, **options)["candidates"][0]
    assert _C.measure(kernel[0], 3, q, q, q, **options) > 0
    if kind == "out":
        assert_close(options["out"], q, q, q)


@pytest.mark.parametrize(
    "arguments,error,words",
    [
        ((), TypeError, "takes a kernel's name"),
        ((64, 1, Q, Q, Q), TypeError, "takes a kernel's name"),
        (("cpu_baseline", "1", Q, Q, Q), TypeError, "int"),
        (("cpu_baseline", 0, Q, Q, Q), ValueError, "num_calls is 0; allowed: 1 to 10000"),
        (("cpu_baseline", -7, Q, Q, Q), ValueError, "allowed: 1 to 10000"),
        (("cpu_baseline", 2**40, Q, Q, Q), ValueError, "allowed: 1 to 10000"),
        (("cpu_baseline", 2**70, Q, Q, Q), OverflowError, "too large"),
        (("cpu_baseline", 1, Q, Q), TypeError, "value"),
        (("cpu_nonsense", 1, Q, Q, Q), ValueError, "no such kernel"),
    ],
)
def test_what_cannot_be_measured(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _C.measure(*arguments)


@pytest.mark.gpu
def test_tuning_on_a_gpu() -> None:
    import torch

    q, k, v = (torch.randn(2, 8, 256, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    tuning = tune(q, k, v, progress=None)
    assert len(tuning.microseconds) > 1
    assert all(0.5 < us < 1e4 for us in tuning.microseconds.values())
    assert tuning.gain >= 1
    assert torch.cuda.get_device_name() in str(tuning)
    explained = flashcore.explain(q, k, v)
    assert (explained.kernel, explained.tuned) == (tuning.best.kernel, True)
    assert_close(*(x.cpu().numpy() for x in (flashcore.attention(q, k, v), q, k, v)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module._load()  # what was written can be read
    assert flashcore.explain(q, k, v).tuned


@pytest.mark.gpu
def test_device_time_is_that_of_the_kernel() -> None:
    """Beside torch's events around as many calls: large enough that the host is ahead."""
    import torch

    q = torch.randn(4, 16, 2048, 64, device="cuda", dtype=torch.float16)
    kernel = _C.plan(q, q, q)["candidates"][0]
    ours = min(_C.measure(kernel[0], 20, q, q, q) for _ in range(3))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    theirs = []
    for _ in range(3):
        begin.record()
        for _ in range(20):
            flashcore.attention(q, q, q)
        end.record()
        torch.cuda.synchronize()
        theirs.append(begin.elapsed_time(end) * 1e3 / 20)
    assert ours == pytest.approx(min(theirs), rel=0.25)


@pytest.mark.gpu
def test_measuring_waits_for_the_callers_stream() -> None:
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        q = torch.full((1, 2, 64, 64), float("nan"), device="cuda", dtype=torch.float16)
        torch.cuda._sleep(20_000_000)
        q.fill_(1.0)
        out = torch.empty_like(q)
        _C.measure(_C.plan(q, q, q)["candidates"][0][0], 1, q, q, q, out=out)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.gpu
def test_measuring_inside_a_capture_is_refused() -> None:
    """In a process of its own: a capture that fails leaves PyTorch's allocator in a state that is its own affair."""
    code = """
import torch
q = torch.ones(1, 2, 64, 64, device="cuda", dtype=torch.float16)
out = torch.empty_like(q)
flashcore.attention(q, q, q)
kernel = flashcore.explain(q, q, q).kernel
graph, said = torch.cuda.CUDAGraph(), None
try:
    with torch.cuda.graph(graph):
        try:
            flashcore._C.measure(kernel, 1, q, q, q, out=out)
        except RuntimeError as error:
            said = str(error)
except RuntimeError:
    pass  # PyTorch's word on the capture
print(said)
torch.cuda.synchronize()
print(torch.equal(flashcore.attention(q, q, q, out=out), q))
"""
    first, second = run(code).stdout.splitlines()
    assert "while preparing to measure" in first
    assert second == "True", "the call after it"
