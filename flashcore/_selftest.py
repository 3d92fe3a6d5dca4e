"""python -m flashcore selftest: every kernel that this machine can run, against the formula in float64.

A few problems per kernel, chosen so that each option of the call is met; the project's test suite is the thorough one.
Needs NumPy; for GPU kernels also torch or CuPy, to put arrays there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import flashcore

# Units in the last place of each dtype, relative to 1. The error of a result of size 1 is a small multiple of it; 4
# covers the roundings of scores, probabilities and output, and float32's longer sums.
_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-19, "float64": 2.0**-46}
_ALLOWED_ULPS = 4

# name, (batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim), options
_PROBLEMS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("full", (2, 4, 4, 130, 257, 64), {}),
    ("causal", (1, 4, 2, 193, 193, 64), {"is_causal": True}),
    ("lower right", (1, 2, 1, 70, 200, 128), {"is_causal": "lower_right"}),
    ("window, softcap", (1, 2, 2, 150, 150, 32), {"window": (20, 5), "softcap": 8.0}),
    ("bool mask", (2, 2, 2, 65, 129, 96), {"mask": "bool"}),
    ("added mask, alibi, sinks", (1, 4, 4, 100, 100, 64), {"mask": "added", "alibi": True, "sinks": True}),
    ("head_dim 256", (1, 2, 2, 40, 90, 256), {}),
    ("head_dim 7", (1, 1, 1, 33, 3, 7), {"scale": -0.5}),
]


def _arrays(np: Any, shape: tuple[int, ...], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs in float32 (float64 holds them exactly) and the options that are no arrays."""
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim = shape
    random = np.random.default_rng(42)

    def normal(*size: int) -> Any:
        return random.standard_normal(size).astype(np.float32)

    arrays = {
        "query": normal(batch, heads_q, seqlen_q, head_dim),
        "key": normal(batch, heads_kv, seqlen_k, head_dim),
        "value": normal(batch, heads_kv, seqlen_k, head_dim),
    }
    plain = dict(options)
    match plain.pop("mask", None):
        case "bool":
            arrays["attn_mask"] = random.random((batch, 1, seqlen_q, seqlen_k)) < 0.7
            arrays["attn_mask"][:, :, 3] = False  # a row that sees nothing
        case "added":
            arrays["attn_mask"] = normal(1, heads_q, seqlen_q, seqlen_k)
    if plain.pop("alibi", False):
        arrays["alibi_slopes"] = 2.0 ** -np.arange(1, heads_q + 1, dtype=np.float32)
    if plain.pop("sinks", False):
        arrays["sinks"] = normal(heads_q)
    return arrays, plain


def _formula(
    np: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    *,
    is_causal: Any = False,
    window: Any = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Any:
    """The formula of flashcore.attention's docstring, in float64."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat(group, axis=1), value.repeat(group, axis=1)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    score = np.einsum("bhid,bhjd->bhij", query, key) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        score = softcap * np.tanh(score / softcap)
    diagonal = seqlen_k - seqlen_q if is_causal == "lower_right" else 0
    d = np.arange(seqlen_k)[None, :] - np.arange(seqlen_q)[:, None] - diagonal
    visible = np.ones(score.shape, bool) & (d <= 0 if is_causal else True)
    if window:
        visible &= (d >= -window[0]) & (d <= window[1])
    if attn_mask is not None and attn_mask.dtype == bool:
        visible &= attn_mask
    elif attn_mask is not None:
        score = score + attn_mask
    if alibi_slopes is not None:
        score = score - alibi_slopes[:, None, None] * abs(d)
    score = np.where(visible, score, -np.inf)
    extra = (
        np.full((*score.shape[:3], 1), -np.inf)
        if sinks is None
        else np.broadcast_to(sinks[:, None, None], (*score.shape[:3], 1))
    )
    most = np.maximum(score.max(axis=-1, keepdims=True), extra)
    most = np.where(np.isfinite(most), most, 0.0)
    weight = np.exp(score - most)
    total = weight.sum(axis=-1, keepdims=True) + np.exp(extra - most)
    return np.einsum("bhij,bhjd->bhid", weight, value) / np.where(total == 0, 1, total)


@contextmanager
def _forced(kernel: str) -> Iterator[None]:
    before = os.environ.get("FLASHCORE_FORCE")
    os.environ["FLASHCORE_FORCE"] = kernel
    try:
        yield
    finally:
        os.environ.pop("FLASHCORE_FORCE")
        if before is not None:
            os.environ["FLASHCORE_FORCE"] = before


Place = Callable[[Any], Any]


def _gpu_places() -> tuple[Place, Place] | None:
    """(NumPy to GPU, GPU to NumPy as float32) by torch or CuPy; None where neither can."""
    if find_spec("torch"):
        import torch

        def to_torch(x: Any) -> Any:  # NumPy's bfloat16 is foreign to torch: over as bits
            return (
                torch.from_numpy(x.view("int16")).view(torch.bfloat16).cuda()
                if x.dtype == "bfloat16"
                else torch.from_numpy(x).cuda()
            )

        if torch.cuda.is_available():
            return to_torch, lambda x: x.float().cpu().numpy()
    if find_spec("cupy"):
        import cupy

        return cupy.asarray, lambda x: cupy.asnumpy(x).astype("float32")
    return None


def _dtypes_of(kernel: flashcore.Kernel) -> list[str]:
    """Dtypes to try: a CUDA kernel's own, all that NumPy has for a CPU kernel."""
    if kernel.device == "cpu":
        return ["float16", "float32", "float64"] + (["bfloat16"] if find_spec("ml_dtypes") else [])
    return [kernel.name.split("_")[1]]


def _error(
    np: Any,
    kernel: flashcore.Kernel,
    dtype: str,
    shape: tuple[int, ...],
    options: dict[str, Any],
    to: Place,
    back: Place,
) -> float:
    """Largest difference to the formula, in allowed errors: up to 1.0 is right. NaN where the kernel gives one."""
    if dtype == "bfloat16":
        import ml_dtypes

        kind: Any = ml_dtypes.bfloat16
    else:
        kind = np.dtype(dtype)
    arrays, plain = _arrays(np, shape, options)
    rounded = {name: x if x.dtype == bool else x.astype(kind) for name, x in arrays.items()}
    with _forced(kernel.name):
        result = back(flashcore.attention(**{name: to(x) for name, x in rounded.items()}, **plain)).astype(np.float64)
    exact = _formula(
        np, **{name: x if x.dtype == bool else x.astype(np.float64) for name, x in rounded.items()}, **plain
    )
    return float(abs(result - exact).max() / (_ALLOWED_ULPS * _ULP[dtype] * max(1.0, abs(exact).max())))


def selftest() -> int:
    """Prints a line per kernel; 0 when all are right."""
    if find_spec("numpy") is None:
        print("selftest needs NumPy: pip install numpy", file=sys.stderr)
        return 2
    import numpy as np

    start, failures, tried = time.monotonic(), 0, 0
    gpu = _gpu_places()
    for kernel in flashcore.kernels():
        if not kernel.usable:
            print(f"{kernel.name:32} skipped: this machine cannot run it")
            continue
        if kernel.device == "cuda" and gpu is None:
            print(f"{kernel.name:32} skipped: install cupy or torch to put arrays on the GPU")
            continue
        to, back = gpu if kernel.device == "cuda" and gpu is not None else ((lambda x: x), (lambda x: x))
        for dtype in _dtypes_of(kernel):
            if dtype == "bfloat16" and not find_spec("ml_dtypes"):
                print(f"{kernel.name:32} {dtype:9} skipped: NumPy has no bfloat16 without ml_dtypes")
                continue
            worst, where, count = 0.0, "", 0
            for name, shape, options in _PROBLEMS:
                if kernel.device == "cuda" and shape[-1] > int(kernel.name.split("_d")[1].split("_")[0]):
                    continue
                error = _error(np, kernel, dtype, shape, options, to, back)
                count += 1
                if not error <= worst:
                    worst, where = error, name
            right = worst <= 1.0
            failures += not right
            tried += 1
            print(
                f"{kernel.name:32} {dtype:9} {'right' if right else 'WRONG':5} {count} problems, "
                f"worst {worst:.2f} of the allowed error ({where})",
                flush=True,
            )
    print(f"{tried - failures} of {tried} right, {time.monotonic() - start:.1f} s")
    return 1 if failures else 0
