"""python -m flashcore selftest: every kernel that this machine can run, against the formula in float64.

A few problems, chosen so that each option of the call is met and that each kernel has several of its tiles to do; the
project's test suite is the thorough one. Needs NumPy; for GPU kernels also torch or CuPy, to put arrays there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import flashcore
from flashcore import _C

if find_spec("numpy") is None:
    print("selftest needs NumPy: pip install numpy", file=sys.stderr)
    raise SystemExit(2)
import numpy as np

if find_spec("ml_dtypes"):
    import ml_dtypes  # noqa: F401 - lets NumPy know the name bfloat16

# Of a result, relative to its largest number, in steps of the dtype at 1. Rounding probabilities, their gradients and
# the result itself to 16 bits takes up to 0.8 of a step; float32 and float64 lose theirs in sums of hundreds of terms.
_ALLOWED_ERROR = {"float16": 2 * 2.0**-10, "bfloat16": 2 * 2.0**-7, "float32": 64 * 2.0**-23, "float64": 256 * 2.0**-52}

_ARRAYS = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks", "dropout_seed")  # in _C.backward's order
_DIFFERENTIABLE = {"query", "key", "value", "attn_mask", "sinks"}


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """The library reads its variables at each call."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


# What is asked


@dataclass(frozen=True, eq=False)
class Problem:
    name: str
    sizes: tuple[int, int, int, int, int, int]  # batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim
    options: dict[str, Any] = field(default_factory=dict)
    mask: type | None = None  # bool: what is visible; float: added
    alibi: bool = False
    sinks: bool = False


# Several tiles either way, but no more keys at head_dim 128 than hopper_short has room for, 384; tests/test_cli.py
# sees to it that each CUDA kernel serves two of them.
_PROBLEMS = [
    Problem("full", (1, 4, 2, 300, 380, 64)),
    Problem("full, head_dim 128", (1, 2, 2, 270, 370, 128)),
    Problem("full, head_dim 256", (1, 2, 1, 200, 190, 256)),
    Problem("one query", (2, 8, 2, 1, 600, 64)),
    Problem("causal", (2, 2, 2, 290, 290, 64), {"is_causal": True}),
    Problem("lower right, head_dim 128", (1, 4, 1, 270, 380, 128), {"is_causal": "lower_right"}),
    Problem("causal, head_dim 256", (1, 2, 2, 190, 190, 256), {"is_causal": True}),
    Problem("window", (1, 3, 3, 260, 600, 48), {"window": (90, 30)}),
    Problem("softcap", (1, 2, 1, 150, 530, 32), {"window": (400, 5), "softcap": 3.0}),
    Problem("bool mask, sinks", (2, 4, 2, 270, 300, 64), mask=bool, sinks=True),
    Problem("bool mask, head_dim 128", (1, 2, 2, 210, 370, 128), mask=bool),
    Problem("bool mask, head_dim 40", (1, 2, 2, 140, 140, 40), {"is_causal": True}, mask=bool),
    Problem("bool mask, head_dim 256", (1, 2, 1, 150, 140, 256), mask=bool),
    Problem("sinks, head_dim 40", (1, 2, 2, 140, 140, 40), {"is_causal": True}, sinks=True),
    Problem("sinks, head_dim 256", (1, 2, 1, 150, 140, 256), sinks=True),
    Problem("added mask, sinks", (2, 4, 2, 270, 300, 64), mask=float, sinks=True),
    Problem("added mask, head_dim 40", (1, 2, 2, 140, 140, 40), {"is_causal": True}, mask=float),
    Problem("added mask, head_dim 128", (1, 2, 2, 210, 370, 128), mask=float),
    Problem("added mask, head_dim 256", (1, 2, 1, 150, 140, 256), mask=float),
    Problem("added mask, alibi, sinks", (2, 4, 2, 140, 300, 64), mask=float, alibi=True, sinks=True),
    Problem("softcap, head_dim 128", (1, 2, 2, 210, 140, 128), {"softcap": 3.0}),
    Problem("alibi, head_dim 256", (1, 2, 2, 150, 140, 256), alibi=True),
    Problem("scale, head_dim 7", (1, 1, 1, 33, 3, 7), {"scale": -0.5}),
    Problem("dropout", (2, 4, 2, 130, 200, 64), {"dropout_p": 0.3}),
]


@cache
def _inputs(problem: Problem, dtype: str) -> dict[str, Any]:
    """The call's arrays, and dout."""
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim = problem.sizes
    random = np.random.default_rng(42)

    def normal(*size: int) -> Any:
        return random.standard_normal(size, np.float32).astype(dtype)

    arrays = {
        "query": normal(batch, heads_q, seqlen_q, head_dim),
        "key": normal(batch, heads_kv, seqlen_k, head_dim),
        "value": normal(batch, heads_kv, seqlen_k, head_dim),
        "dout": normal(batch, heads_q, seqlen_q, head_dim),
    }
    if problem.mask is bool:
        arrays["attn_mask"] = random.random((batch, 1, seqlen_q, seqlen_k)) < 0.7
        arrays["attn_mask"][:, :, 3] = False  # a row that sees nothing
    elif problem.mask is float:
        arrays["attn_mask"] = normal(1, heads_q, seqlen_q, seqlen_k)
    if problem.alibi:
        arrays["alibi_slopes"] = (2.0 ** -np.arange(1, heads_q + 1)).astype(dtype)
    if problem.sinks:
        arrays["sinks"] = normal(heads_q)
    if "dropout_p" in problem.options:
        arrays["dropout_seed"] = np.array([42, 7], np.uint64)
    return arrays


# What is right


@cache
def _expected(problem: Problem, dtype: str) -> dict[str, Any]:
    exact = {name: x.astype(np.float64) if x.dtype == dtype else x for name, x in _inputs(problem, dtype).items()}
    return _formula(**exact, **problem.options)


def _formula(
    query: Any,
    key: Any,
    value: Any,
    dout: Any,
    attn_mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_seed: Any = None,
    *,
    is_causal: bool | str = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> dict[str, Any]:
    """The formula of flashcore.attention's docstring, and the gradients of sum(dout * out)."""
    heads_kv, group = key.shape[1], query.shape[1] // key.shape[1]
    key, value = key.repeat(group, axis=1), value.repeat(group, axis=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    score = scale * (query @ key.swapaxes(-1, -2))
    slope: Any = 1.0
    if softcap is not None:
        capped = np.tanh(score / softcap)
        score, slope = softcap * capped, 1 - capped**2
    seqlen_q, seqlen_k = score.shape[-2:]
    diagonal = seqlen_k - seqlen_q if is_causal == "lower_right" else 0
    d = np.arange(seqlen_k) - np.arange(seqlen_q)[:, None] - diagonal
    visible = np.full(score.shape, True) & (d <= 0 if is_causal else True)
    if window is not None:
        visible &= (-window[0] <= d) & (d <= window[1])
    if attn_mask is not None and attn_mask.dtype == bool:
        visible &= attn_mask
    elif attn_mask is not None:
        score = score + attn_mask
    if alibi_slopes is not None:
        score = score - alibi_slopes[:, None, None] * abs(d)

    # A sink is one more key, whose value is zero.
    sink: Any = -np.inf if sinks is None else sinks[:, None, None]
    score = np.concatenate([np.where(visible, score, -np.inf), np.broadcast_to(sink, (*score.shape[:-1], 1))], axis=-1)
    top = score.max(axis=-1, keepdims=True)
    weight = np.exp(score - np.where(np.isneginf(top), 0, top))
    total = weight.sum(axis=-1, keepdims=True)
    lse = np.where(total == 0, -np.inf, top + np.log(np.where(total == 0, 1, total)))
    probability = weight / np.where(total == 0, 1, total)
    probability, sink = probability[..., :-1], probability[..., -1:]
    drop = _kept(probability.shape, dropout_p, dropout_seed) / (1 - dropout_p) if dropout_p else 1.0
    out = (probability * drop) @ value

    delta = (dout * out).sum(axis=-1, keepdims=True)
    dscore = probability * (drop * (dout @ value.swapaxes(-1, -2)) - delta)
    dproduct = scale * slope * dscore

    def over_group(x: Any) -> Any:
        return x.reshape(-1, heads_kv, group, *x.shape[-2:]).sum(axis=2)

    return {
        "out": out,
        "lse": lse[..., 0],
        "dquery": dproduct @ key,
        "dkey": over_group(dproduct.swapaxes(-1, -2) @ query),
        "dvalue": over_group((probability * drop).swapaxes(-1, -2) @ dout),
        "dattn_mask": dscore.sum(axis=0, keepdims=True),
        "dsinks": -(sink * delta).sum(axis=(0, 2, 3)),
    }


def _kept(shape: tuple[int, int, int, int], dropout_p: float, dropout_seed: Any) -> Any:
    """The weights that dropout leaves: with an identity for value, out is the weights. Every kernel draws the same
    numbers, so that one of them says it for all."""
    batch, heads, seqlen_q, seqlen_k = shape
    query, key = (np.zeros((batch, heads, seqlen, 1), np.float32) for seqlen in (seqlen_q, seqlen_k))
    value = np.tile(np.eye(seqlen_k, dtype=np.float32), (batch, heads, 1, 1))
    with _environment(FLASHCORE_FORCE="cpu_baseline"):
        kept = flashcore.attention(query, key, value, dropout_p=dropout_p, dropout_seed=dropout_seed) != 0
    if abs(kept.mean() - (1 - dropout_p)) > 0.005:
        raise ArithmeticError(f"dropout_p={dropout_p} leaves {kept.mean():.3f} of the weights")
    return kept


# Who is asked


@dataclass(frozen=True)
class Place:
    """How arrays get to a device and back to NumPy."""

    to: Callable[[Any], Any]
    back: Callable[[Any], Any]
    dtypes: list[str]  # of which it can have arrays


def _place(device: str) -> Place:
    dtypes = [dtype for dtype in _ALLOWED_ERROR if dtype != "bfloat16" or find_spec("ml_dtypes")]
    if device == "cpu":
        return Place(lambda x: x, lambda x: x, dtypes)
    if find_spec("torch"):
        import torch

        def to_torch(x: Any) -> Any:  # NumPy's bfloat16 is foreign to torch: over as bits
            if x.dtype.name == "bfloat16":
                return torch.from_numpy(x.view("int16")).view(torch.bfloat16).cuda()
            return torch.from_numpy(x).cuda()

        if torch.cuda.is_available():
            return Place(to_torch, lambda x: x.float().cpu().numpy(), dtypes)
    if find_spec("cupy"):
        import cupy

        return Place(cupy.asarray, cupy.asnumpy, ["float16", "float32"])
    return Place(lambda x: x, lambda x: x, [])


@dataclass(frozen=True)
class Subject:
    """What a line is about: one direction of a kernel, in one dtype."""

    kernel: str  # for FLASHCORE_FORCE
    device: str
    dtype: str
    is_backward: bool

    @property
    def name(self) -> str:
        return f"{'backward ' if self.is_backward else ''}{self.kernel}"


def _dtypes_of(kernel: flashcore.Kernel) -> list[str]:
    """A CPU kernel serves all; a CUDA kernel's name says its own."""
    return [dtype for dtype in _ALLOWED_ERROR if kernel.device == "cpu" or dtype in kernel.name.split("_")]


def _subjects() -> list[Subject]:
    tried = [(kernel, dtype) for kernel in flashcore.kernels() if kernel.usable for dtype in _dtypes_of(kernel)]
    forward = [Subject(kernel.name, kernel.device, dtype, False) for kernel, dtype in tried]
    # Which of a GPU's backward kernels runs cannot be forced: it follows from dtype and head_dim.
    backward = dict.fromkeys(
        Subject(kernel.name if kernel.device == "cpu" else kernel.family, kernel.device, dtype, True)
        for kernel, dtype in tried
        if kernel.family in ("cpu", "portable")
    )
    return forward + list(backward)


def _results(subject: Subject, problem: Problem, place: Place) -> dict[str, Any]:
    """What the kernel makes of a problem, by _formula's names."""
    inputs = _inputs(problem, subject.dtype)
    arrays = {name: place.to(x) for name, x in inputs.items()}
    dout = arrays.pop("dout")
    with _environment(FLASHCORE_FORCE=subject.kernel, FLASHCORE_SLOW="allow"):
        out, lse = flashcore.attention(**arrays, **problem.options, return_lse=True)
        results = {"out": out, "lse": lse}
        if subject.is_backward:
            saved = (*(arrays.get(name) for name in _ARRAYS), out, lse)
            wanted = tuple(
                name in _DIFFERENTIABLE and name in inputs and inputs[name].dtype != bool for name in _ARRAYS
            )
            gradients = _C.backward(saved, dout, None, wanted, problem.options)
            results = {f"d{name}": x for name, x in zip(_ARRAYS, gradients, strict=True) if x is not None}
    return {name: place.back(x).astype(np.float64) for name, x in results.items()}


def _error(result: Any, exact: Any, dtype: str) -> float:
    """The largest, in allowed errors: up to 1 is right."""
    with np.errstate(invalid="ignore"):
        error = np.where(result == exact, 0.0, abs(result - exact)).max()  # an lse may be -inf
    largest = abs(exact[np.isfinite(exact)]).max()
    return float(error / (_ALLOWED_ERROR[dtype] * largest)) if np.isfinite(error) else np.inf


def _judge(subject: Subject, place: Place) -> tuple[bool, str]:
    """Whether it is right, and the words for it."""
    worst, where, count = 0.0, "", 0
    for problem in _PROBLEMS:
        try:
            results = _results(subject, problem, place)
            expected = _expected(problem, subject.dtype)
        except Exception as error:
            # A CUDA kernel is made for some masks and sizes; the other problems are for others.
            if subject.device == "cuda" and isinstance(error, NotImplementedError) and "no kernel on" in str(error):
                continue
            return False, f"{problem.name}: {type(error).__name__}: {error}"
        count += 1
        for name, result in results.items():
            error_here = _error(result, expected[name], subject.dtype)
            if error_here >= worst:
                worst, where = error_here, f"{name} of {problem.name}"
    if count == 0:
        return False, "serves no problem of this test, so nothing is known of it"
    return worst <= 1, f"{count} problems, worst {worst:.2f} of the allowed error ({where})"


def selftest() -> int:
    """Prints a line for each kernel, direction and dtype; 0 when all are right."""
    start, subjects = time.monotonic(), _subjects()
    places = {device: _place(device) for device in dict.fromkeys(subject.device for subject in subjects)}
    others = sum(not kernel.usable for kernel in flashcore.kernels())
    if others:
        print(f"{others} kernels of this build do not run on this machine; python -m flashcore info names them")
    tried = right = 0
    for number, subject in enumerate(subjects, 1):
        place = places[subject.device]
        if subject.dtype not in place.dtypes:
            needs = {"cpu": "ml_dtypes", "cuda": "torch, and ml_dtypes for bfloat16,"}[subject.device]
            verdict, words = "skipped", f"install {needs} to make its arrays"
        else:
            is_right, words = _judge(subject, place)
            verdict, tried, right = "right" if is_right else "WRONG", tried + 1, right + is_right
        count = f"[{number}/{len(subjects)}]"
        print(f"{count:9} {subject.name:40} {subject.dtype:8} {verdict} {words}", flush=True)
    print(f"{right} of {tried} right, {time.monotonic() - start:.1f} s")
    return 0 if right == tried else 1
