"""What the C extension asks of other array libraries, a few lines for each: the current stream, and an empty array.

Only kinds without DLPack's C exchange API or NumPy's C API come here; torch (2.10 on) and NumPy never do. No library is
imported: an array of a library is proof that its owner has loaded it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from flashcore import _C

Finish = Callable[[], Any]


def library_of(array: Any) -> str:
    """Name of the library that an array's type comes from: 'cupy', 'jax', 'numba', 'torch', ..."""
    root = type(array).__module__.partition(".")[0]
    return "jax" if root in ("jax", "jaxlib") else root


def is_writable(array: Any) -> bool:
    """Whether the array's library lets anybody write to it; that an array is read-only, its capsule says."""
    return library_of(array) != "jax"


def stream_of(array: Any, device_id: int) -> int | None:
    """Handle of the stream that the array's library works on now (0: the legacy default), or None."""
    match library_of(array):
        case "cupy":
            cupy = sys.modules["cupy"]
            with cupy.cuda.Device(device_id):
                return int(cupy.cuda.get_current_stream().ptr)
        case "torch":
            return int(sys.modules["torch"]._C._cuda_getCurrentRawStream(device_id))
    return None


def stream_handle(stream: Any) -> int:
    """Handle of a caller's `stream=`: an int, or an object with __cuda_stream__ (CUDA's Python protocol), `ptr` (CuPy)
    or `cuda_stream` (torch)."""
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream < 0:
            raise ValueError(
                f"stream is {stream}; allowed: a cudaStream_t as an int (0: the legacy default stream) or a stream"
            )
        return stream
    if hasattr(stream, "__cuda_stream__"):
        version, handle = stream.__cuda_stream__()
        if version != 0:
            raise ValueError(f"stream speaks version {version} of __cuda_stream__; understood: 0")
        return int(handle)
    for attribute in ("ptr", "cuda_stream"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise TypeError(
        f"stream is a {type(stream).__name__}; allowed: a cudaStream_t as an int, or an object with __cuda_stream__, "
        "ptr or cuda_stream"
    )


def empty(query: Any, shape: tuple[int, ...], dtype: str, device_id: int, stream: int) -> tuple[Any, Finish | None]:
    """An array of the query's kind to write a result to, on GPU `device_id` (-1: the CPU).

    Returns (destination, finish): the extension writes to destination, then finish(), where not None, gives the array
    to return.
    """
    library = library_of(query)
    if library == "jax":
        # JAX arrays cannot be written; the result is made in memory of our own and handed over through DLPack.
        buffer = _C.Buffer(shape, dtype, device_id, stream)
        jax = sys.modules["jax"]
        return buffer, lambda: jax.dlpack.from_dlpack(buffer)
    if library == "torch":  # before 2.10
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=query.device), None
    if library == "cupy":
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device_id):
            return cupy.empty(shape, dtype=query.dtype if str(query.dtype) == dtype else dtype), None
    if library == "numba":
        cuda = sys.modules["numba"].cuda
        with cuda.gpus[device_id]:
            return cuda.device_array(shape, dtype=dtype), None
    if hasattr(query, "__array_namespace__"):
        namespace = query.__array_namespace__()
        return namespace.empty(shape, dtype=getattr(namespace, dtype), device=query.device), None
    raise TypeError(
        f"query is a {type(query).__module__}.{type(query).__qualname__}, and how to make a result of it is unknown; "
        f"pass out=, an array of shape {shape} and dtype {dtype}"
    )


def torch_function_modes_are_harmless() -> bool:
    """True where every active torch function mode is set_default_device's, which leaves calls alone."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def torch_has_tangent(tensor: Any) -> bool:
    """True where a tensor carries a forward-mode tangent. Asked only inside torch.autograd.forward_ad.dual_level()."""
    from torch.autograd.forward_ad import unpack_dual

    return unpack_dual(tensor).tangent is not None
