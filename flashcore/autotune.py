"""Measuring which kernel is fastest here, and remembering it: `autotune`, and the cache file that later processes read.

Nothing is measured but by autotune() and `python -m flashcore tune`. What they find is handed to the C library, which
looks it up without Python (csrc/tuned.c), and stored in a file that `attention` reads once, at the first call that
leaves the choice open:

    $FLASHCORE_CACHE, else $XDG_CACHE_HOME/flashcore, else ~/.cache/flashcore
        tuned-<format>-<version>-<revision>.json

A build has a file of its own, so builds never disturb each other. FLASHCORE_AUTOTUNE=0 turns all of it off.
docs/tuning.md has the rest.
"""

from __future__ import annotations

import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flashcore import _C

FORMAT = 1  # of the file
SAMPLE_US = 2_000  # what a sample should take
MOST_CALLS = 1_000  # in a sample: they become nodes of one CUDA graph
ROUNDS = 9  # samples of each candidate that is left after the first look; odd, for the median
NEAR = 1.25  # times the best of the first look: who is slower is out
MOST_BYTES = 16 << 20  # of the cache file: an entry has some 500, and the library has room for 2,000
ISA_WORDS = ("baseline instructions", "AVX2", "AVX-512")
MARGIN = 1.01  # times: what the planner chooses stays unless it is beaten by more than noise


class TuningCacheWarning(UserWarning):
    """The cache of tuned choices cannot be used or written; once per process. Calls run as if nothing were tuned."""


class Candidate(NamedTuple):
    """One way to run a call. The kernel's name says it all: the rest is what the planner does with it here."""

    kernel: str
    block_m: int
    block_n: int
    num_splits: int

    def __str__(self) -> str:
        return self.kernel + (f" with {self.num_splits} splits" if self.num_splits > 1 else "")


Measure = Callable[[Candidate, int], float]


@dataclass(frozen=True)
class Tuning:
    """What autotune() found. Prints as a sentence."""

    shape_class: str  # in words
    device: str
    planned: Candidate  # what the planner chooses by itself
    best: Candidate  # what calls of this class run from now on
    microseconds: dict[Candidate, float]  # per call; empty where nothing was measured
    saved: str  # the file, "" where it was not written
    note: str = ""  # why nothing was measured

    @property
    def gain(self) -> float:
        """How many times as fast the best is as what was planned; 1.0 where nothing was measured."""
        return self.microseconds[self.planned] / self.microseconds[self.best] if self.microseconds else 1.0

    def __str__(self) -> str:
        if self.note:
            return f"{self.shape_class} on {self.device}: {self.note}"
        planned = "the planner's choice" if self.best == self.planned else f"{self.gain:.2f}x {self.planned}"
        return (
            f"{self.shape_class} on {self.device}: {self.best}, {self.microseconds[self.best]:.2f} us, {planned}, "
            f"best of {len(self.microseconds)}"
        )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def autotune(
    query: Any,
    key: Any,
    value: Any,
    *args: Any,
    measure: Measure | None = None,
    progress: Callable[[str], None] | None = _to_stderr,
    **options: Any,
) -> Tuning:
    """Measures every kernel that can serve attention(query, key, value, *args, **options), and remembers the fastest.

    From the next call on, calls of the same class (dtype, options, mask, and sizes in steps: docs/tuning.md) on this
    kind of device run on it, in this process and in later ones. It takes about a tenth of a second for each candidate
    of a short call, and waits for the GPU. What the planner chooses stays, unless another is faster by 1%.

    Args:
        query, key, value, args, options: as for attention, arrays and dtypes too; values count only in so far as they
            change the clocks: random ones are best. Not: block_m, block_n, deterministic, which leave no choice.
        measure: how to time a candidate: called with (Candidate, num_calls), gives microseconds per call. Default: a
            CUDA graph of that many calls on the GPU, a loop on the CPU.
        progress: called with a line at each step; default: prints to stderr. None: silent.

    Returns:
        A Tuning: what was measured, what was best, and where it was saved.

    Raises:
        What attention raises for these arguments; ValueError for options that leave no choice; RuntimeError inside a
        CUDA graph capture. A cache that cannot be written is a TuningCacheWarning, and the choice holds for this
        process.
    """
    for name in ("block_m", "block_n", "deterministic"):
        if options.get(name):
            raise ValueError(f"{name} is {options[name]!r}, which leaves nothing to tune; leave it out")
    if forced := os.environ.get("FLASHCORE_FORCE"):
        raise ValueError(f"FLASHCORE_FORCE={forced} leaves nothing to tune; unset it")
    found = _C.plan(query, key, value, *args, **options)
    device = _device_facts(found["device_type"], found["device_id"])
    candidates = [Candidate(*each) for each in found["candidates"]]
    planned = best = candidates[0]
    say = progress or (lambda line: None)
    note = ""
    if is_off():
        note = "not tuned, for FLASHCORE_AUTOTUNE=0 turns it off"
    elif len(candidates) == 1:
        note = f"{planned} is all that serves it"
    if note:
        tuning = Tuning(found["class_words"], _device_words(device), planned, planned, {}, "", note)
        say(str(tuning))
        return tuning

    def measure_call(candidate: Candidate, num_calls: int) -> float:
        return _C.measure(candidate.kernel, num_calls, query, key, value, *args, **options)

    say(f"{found['class_words']} on {_device_words(device)}: {len(candidates)} candidates")
    microseconds, best = _race(candidates, measure or measure_call, say)
    entry = {
        "device": device,
        "shape_class": f"{found['shape_class']:#018x}",
        "words": found["class_words"],
        **best._asdict(),
        "microseconds": round(microseconds[best], 3),
        "planned": str(planned),
        "planned_microseconds": round(microseconds[planned], 3),
    }
    _use(entry)
    saved = _save(entry)
    tuning = Tuning(found["class_words"], _device_words(device), planned, best, microseconds, saved)
    say(str(tuning))
    return tuning


def _race(
    candidates: list[Candidate], measure: Measure, say: Callable[[str], None]
) -> tuple[dict[Candidate, float], Candidate]:
    """Microseconds of each, and the best. All have a first look taken at them, then those near the best are measured in
    turn: identical code measured later reads slower on a card that throttles, or a machine with other work. Only what
    was measured in turn is compared."""
    calls: dict[Candidate, int] = {}
    first: dict[Candidate, float] = {}
    for candidate in candidates:
        once = measure(candidate, 1)
        calls[candidate] = max(1, min(MOST_CALLS, round(SAMPLE_US / max(once, 1e-3))))
        first[candidate] = min(once, measure(candidate, calls[candidate]))
        best = min(first, key=first.__getitem__)
        say(f"  [{len(first)}/{len(candidates)}] {candidate}: {first[candidate]:.2f} us; best so far: {best}")
    planned = candidates[0]
    samples: dict[Candidate, list[float]] = {
        candidate: []
        for candidate in candidates
        if candidate == planned or first[candidate] <= NEAR * min(first.values())
    }
    for _ in range(ROUNDS):
        for candidate, taken in samples.items():
            taken.append(measure(candidate, calls[candidate]))
    medians = {candidate: sorted(taken)[ROUNDS // 2] for candidate, taken in samples.items()}
    best = min(medians, key=medians.__getitem__)
    return first | medians, planned if medians[planned] <= MARGIN * medians[best] else best


def is_off() -> bool:
    """FLASHCORE_AUTOTUNE=0: nothing is measured, and what was is not read."""
    return os.environ.get("FLASHCORE_AUTOTUNE") == "0"


# Devices: what makes one another kind. In the order of _C.add_tuned.

DEVICE_FIELDS = ("type", "name", "compute_capability", "num_sms", "isa")


def _device_facts(type: str, id: int) -> dict[str, Any]:
    facts = _C.device("cuda" if type == "cuda" else "cpu", id)
    return {name: facts[name] for name in DEVICE_FIELDS}


def _device_words(device: dict[str, Any]) -> str:
    if device["type"] == "cpu":
        return f"a CPU with {ISA_WORDS[device['isa']]}"
    return f"{device['name']} (sm_{device['compute_capability']}, {device['num_sms']} SMs)"


# The cache. Entries are as autotune() makes them.

Key = tuple[str, str, int, int, int, int]  # device and class, in the order of _C.add_tuned


def cache_path() -> Path:
    """The file of this build's tuned choices, which need not exist. Raises RuntimeError where there is no home."""
    folder = os.environ.get("FLASHCORE_CACHE")
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME", "")
        folder = str((Path(base) if base.startswith("/") else Path.home() / ".cache") / "flashcore")
    return Path(folder) / f"tuned-{FORMAT}-{_C.version}-{_C.revision}.json"


def _key(entry: dict[str, Any]) -> Key:
    """Device and class, what one entry is for. Raises KeyError, TypeError or ValueError for what is no entry."""
    device, shape_class = entry["device"], int(entry["shape_class"], 16)
    if not 0 <= shape_class < 2**64:
        raise ValueError(f"shape_class is {shape_class:#x}, beyond 64 bits")
    type, name, compute_capability, num_sms, isa = (device[field] for field in DEVICE_FIELDS)
    return type, name, compute_capability, num_sms, isa, shape_class


def _use(entry: dict[str, Any]) -> None:
    """Into the C library's table, which refuses kernels that it has not."""
    _C.add_tuned(*_key(entry), entry["kernel"])


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for somebody to write, were it a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def _read(path: Path) -> dict[Key, dict[str, Any]]:
    """The file's entries; none where there is no file. Raises OSError, and ValueError for what is no cache of ours."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is no regular file")
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return {}
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    import json  # only where there is something to parse

    try:
        whole = json.loads(text)
        if (whole["format"], whole["revision"]) != (FORMAT, _C.revision):
            raise ValueError(f"it is of format {whole['format']} and build {whole['revision']}")
        return {_key(entry): entry for entry in whole["entries"]}
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is malformed ({error!r})") from error


def _load() -> None:
    """What earlier processes tuned, into the C library's table. The extension calls it, once."""
    if is_off():
        return
    try:
        entries = _read(cache_path())
    except (OSError, RuntimeError, ValueError) as error:
        _warn("is ignored", error)
        return
    for entry in entries.values():
        try:
            _use(entry)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            _warn("has an entry that is ignored", error)


def summary() -> str:
    """How many choices the file holds, for a bug report."""
    if is_off():
        return "nothing, for FLASHCORE_AUTOTUNE=0 turns it off"
    try:
        entries, path = _read(cache_path()), cache_path()
    except (OSError, RuntimeError, ValueError) as error:
        return f"nothing, for the cache is ignored: {error}"
    return f"{len(entries)} shape classes, in {path}" if entries else "nothing; python -m flashcore tune does it"


def _save(entry: dict[str, Any]) -> str:
    """Adds an entry to the file, which other processes may be writing too. Its path; "" where that is impossible."""
    import json

    try:
        path = cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            try:
                entries = _read(path)
            except ValueError as error:
                _warn("is written anew", error)
                entries = {}
            entries[_key(entry)] = entry
            whole = {"format": FORMAT, "revision": _C.revision, "entries": list(entries.values())}
            written = path.with_suffix(f".{os.getpid()}.tmp")
            written.write_text(json.dumps(whole, indent=1) + "\n")
            os.replace(written, path)  # a reader sees the old file or the new one
    except (OSError, RuntimeError) as error:
        _warn("cannot be written, and the choice holds for this process alone", error)
        return ""
    return str(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield


_has_warned = False


def _warn(what: str, error: Exception) -> None:
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    try:
        path = str(cache_path())
    except RuntimeError:
        path = "in the home folder"
    warnings.warn(f"the cache of tuned choices {path} {what}: {error}", TuningCacheWarning, stacklevel=2)
