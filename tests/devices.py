"""Arrays to where a kernel reads them, and results back: NumPy stays on the CPU, the GPU gets torch tensors.

A view from cases.place travels with its whole buffer, so strides, poison and guard bytes are the same on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cases
import ml_dtypes
import numpy as np
from reference import Array


@dataclass(frozen=True)
class Kernel:
    """What the fixture `kernel` gives: a value for FLASHCORE_FORCE, and where its arrays must be."""

    force: str
    device: str  # "cpu" or "cuda"


def may_refuse(kernel: Kernel, error: NotImplementedError) -> bool:
    """A fast family that is forced refuses what it has no row for, which test_plan.py checks; then there is nothing to
    test on it. The portable family and the CPU refuse nothing."""
    return kernel.device == "cuda" and kernel.force != "portable" and "no kernel on" in str(error)


def can_send(view: Array, device: str) -> bool:
    """PyTorch has no negative strides."""
    return device == "cpu" or all(stride >= 0 for stride in view.strides)


def to_torch(x: Any, device: str = "cpu") -> Any:
    """A view made by cases.place as a tensor with a copy of its buffer; numbers and words pass through."""
    if not isinstance(x, np.ndarray):
        return x
    import torch

    buffer = cases.buffer_of(x)
    offset = (x.ctypes.data - buffer.ctypes.data) // x.itemsize
    moved = torch.empty(buffer.size, dtype=torch.uint8, device=device)
    moved.copy_(torch.from_numpy(buffer))
    typed = moved.view(getattr(torch, x.dtype.name))
    return typed.as_strided(x.shape, [stride // x.itemsize for stride in x.strides], offset)


def send(x: Any, device: str) -> Any:
    return x if device == "cpu" else to_torch(x, device)


def bring_back(tensor: Any, view: Array) -> None:
    """What to_torch sent, poison and all, to where it came from."""
    import torch

    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    cases.buffer_of(view)[...] = storage.cpu().numpy()


def fetch(result: Any) -> Array:
    """Any kind of result as a NumPy array."""
    if isinstance(result, np.ndarray):
        return result
    if type(result).__module__.startswith("torch"):
        import torch

        result = result.detach().cpu()
        if result.dtype == torch.bfloat16:
            bits = result.contiguous().view(torch.uint16).numpy()
            return bits.view(ml_dtypes.bfloat16).reshape(result.shape)
        return result.numpy()
    if hasattr(result, "get"):  # CuPy
        return np.asarray(result.get())
    return np.asarray(result)  # JAX


def same_bits(a: Any, b: Any) -> bool:
    a, b = fetch(a), fetch(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
