"""FlashCore: exact attention for CPUs and NVIDIA GPUs.

    import flashcore
    out = flashcore.attention(query, key, value, is_causal=True)  # torch, NumPy, CuPy, JAX, ... in; the same kind out

`attention` is a C function; this package adds `explain`, which says what would run and why, `autotune`, which measures
what runs best, and the facts of the build.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcore import _dynamo

try:
    from flashcore._C import attention
except ModuleNotFoundError as error:
    if error.name != "flashcore._C":
        raise
    raise ImportError(
        f"{Path(__file__).parent} holds flashcore's source, which is not built there. `make build` builds it in place; "
        "to import what pip installed instead, leave this folder, or run python -P"
    ) from None
from flashcore._C import kernels as _kernels
from flashcore._C import plan as _plan
from flashcore._C import version as __version__
from flashcore.autotune import Candidate, Tuning, TuningCacheWarning, autotune

__all__ = [
    "Candidate",
    "Explanation",
    "Kernel",
    "SlowPathWarning",
    "Tuning",
    "TuningCacheWarning",
    "__version__",
    "attention",
    "autotune",
    "explain",
    "include_path",
    "kernels",
    "library_path",
]


class SlowPathWarning(UserWarning):
    """A call runs on a kernel that is not this GPU's fast one; once per reason. FLASHCORE_SLOW=error|warn|allow."""


# Bits of fc_plan.slow, in words.
_SLOW = {1: "no fast kernel of this architecture serves the call"}  # the other is the backward's


@dataclass(frozen=True)
class Explanation:
    """What a call would run. Prints as a sentence."""

    kernel: str
    family: str  # "cpu", "portable", "hopper" or "hopper_short"
    block_m: int  # query rows per tile
    block_n: int  # keys per tile
    num_splits: int
    num_threads: int  # CPU threads, or CUDA threads per block
    num_tiles: int
    num_calls: int  # more than 1 where batch dimensions do not fold into one stride; all else here is of the first
    workspace_bytes: int
    slow: tuple[str, ...]  # why this is not the fast path; empty where it is
    tuned: bool  # autotune() chose, in this process or an earlier one; else the planner
    candidates: tuple[Candidate, ...]  # what could run it: the planner's own choice, then the others that serve it
    shape_class: str  # in words: what a tuned choice for it holds for
    reason: str

    def __str__(self) -> str:
        calls = f" Batch dimensions that share no stride take {self.num_calls} calls." if self.num_calls > 1 else ""
        return self.reason + calls


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Says what attention(...) with the same arguments would run, and why, without running it.

    Raises what attention(...) would raise for these arguments.
    """
    plan = _plan(*args, **kwargs)
    del plan["device_type"], plan["device_id"]  # the caller knows
    slow = plan.pop("slow")
    plan["slow"] = tuple(text for bit, text in _SLOW.items() if slow & bit)
    plan["candidates"] = tuple(Candidate(*each) for each in plan["candidates"])
    plan["shape_class"] = plan.pop("class_words")
    return Explanation(**plan)


@dataclass(frozen=True)
class Kernel:
    """A kernel of this build. FLASHCORE_FORCE=<name or family> makes every call use it."""

    name: str
    family: str
    device: str  # "cpu" or "cuda"
    usable: bool  # on this machine


def kernels() -> list[Kernel]:
    """The kernels of this build, in the planner's order, and which of them this machine can run."""
    return [Kernel(*each) for each in _kernels()]


def library_path() -> str:
    """Path of libflashcore.so, for C, Rust and others who link to it."""
    return str(Path(__file__).parent / "lib" / "libflashcore.so")


def include_path() -> str:
    """Folder that holds flashcore.h."""
    return str(Path(__file__).parent / "include")


_dynamo.watch()
