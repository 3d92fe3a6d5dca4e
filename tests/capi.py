"""The public C structs in ctypes, and the shared library that the package carries.

Field for field as include/flashcore.h has them; test_c_api.py checks the sizes against the header with a C compiler.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from reference import Array

import flashcore

OK, INVALID, UNSUPPORTED, NO_DEVICE, OUT_OF_MEMORY, CUDA_ERROR = range(6)
STATUS_NAMES = ("FC_OK", "FC_INVALID", "FC_UNSUPPORTED", "FC_NO_DEVICE", "FC_OUT_OF_MEMORY", "FC_CUDA_ERROR")
NONE, FLOAT16, BFLOAT16, FLOAT32, FLOAT64, BOOL = range(6)
CPU, CUDA = 1, 2
CAUSAL, LOWER_RIGHT, WINDOW_LEFT, WINDOW_RIGHT, SCALE, DETERMINISTIC = (1 << bit for bit in range(6))
DTYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT32, "float64": FLOAT64, "bool": BOOL}


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 4),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        *[
            (name, ctypes.c_int64)
            for name in ("batch", "num_heads_q", "num_heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v")
        ],
        *[(name, Tensor) for name in ("query", "key", "value", "out", "lse", "attn_mask", "alibi_slopes", "sinks")],
        ("flags", ctypes.c_uint32),
        ("block_m", ctypes.c_int32),
        ("block_n", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("diagonal", ctypes.c_int64),
        ("kernel", ctypes.c_char_p),
        ("dropout_p", ctypes.c_double),
        ("dropout_seed", ctypes.c_void_p),
        ("first_batch", ctypes.c_int64),
    ]


class BackwardProblem(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("forward", ctypes.POINTER(Problem)),
        *[(name, Tensor) for name in ("dout", "dlse", "dq", "dk", "dv", "dbias", "dsinks", "dalibi_slopes")],
        ("block_m", ctypes.c_int32),
        ("block_n", ctypes.c_int32),
        ("kernel", ctypes.c_char_p),
    ]


class Device(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("type", ctypes.c_int32),
        ("id", ctypes.c_int32),
        ("name", ctypes.c_char * 64),
        ("compute_capability", ctypes.c_int32),
        ("num_sms", ctypes.c_int32),
        ("smem_bytes_per_block", ctypes.c_int32),
        ("driver_version", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("l2_bytes", ctypes.c_int64),
    ]


class Plan(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        ("workspace_bytes", ctypes.c_uint64),
        ("kernel", ctypes.c_int32),
        ("block_m", ctypes.c_int32),
        ("block_n", ctypes.c_int32),
        ("num_splits", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("slow", ctypes.c_uint32),
        ("num_tiles", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("tuned", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


@cache
def library() -> Any:
    lib = ctypes.CDLL(flashcore.library_path())
    for name in ("fc_version", "fc_revision", "fc_status_name", "fc_last_error", "fc_cuda_archs"):
        getattr(lib, name).restype = ctypes.c_char_p
    for name in ("fc_kernel_name", "fc_kernel_family"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.fc_attention_plan.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    lib.fc_attention_forward.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    lib.fc_attention_run.argtypes = [ctypes.c_void_p, *lib.fc_attention_forward.argtypes]
    lib.fc_attention_backward_plan.argtypes = lib.fc_attention_plan.argtypes
    lib.fc_attention_backward.argtypes = lib.fc_attention_forward.argtypes
    lib.fc_attention_class.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    lib.fc_attention_candidates.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int32, ctypes.c_void_p]
    lib.fc_attention_measure.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p
    ]  # fmt: skip
    lib.fc_tuned_add.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p]
    lib.fc_tuned_clear.restype = None
    lib.fc_plan_describe.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_size_t]
    lib.fc_device_query.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    lib.fc_malloc.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p]
    lib.fc_free.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
    lib.fc_stream_order.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
    return lib


def last_error() -> str:
    return str(library().fc_last_error().decode())


def tensor(array: Any) -> Tensor:
    """[batch, head, row, column], or fewer dimensions from the left; a NumPy array or a torch tensor."""
    if isinstance(array, np.ndarray):
        data, dtype, strides = array.ctypes.data, array.dtype.name, [x // array.itemsize for x in array.strides]
    else:
        # Not data_ptr(), which is 0 where a broadcast leaves no elements.
        data = array.untyped_storage().data_ptr() + array.storage_offset() * array.element_size()
        dtype, strides = str(array.dtype).removeprefix("torch."), array.stride()
    return Tensor(data, (ctypes.c_int64 * 4)(*strides, *[0] * (4 - array.ndim)), DTYPES[dtype], 0)


def broadcast(array: Any, shape: tuple[int, ...]) -> Any:
    return np.broadcast_to(array, shape) if isinstance(array, np.ndarray) else array.expand(shape)


def problem(query: Any, key: Any, value: Any, out: Any, **fields: Any) -> Problem:
    """A CPU problem on [batch, heads, rows, columns] arrays. The caller keeps them alive."""
    made = Problem(struct_size=ctypes.sizeof(Problem), device_type=CPU)
    made.batch, made.num_heads_q, made.seqlen_q, made.head_dim = query.shape
    _, made.num_heads_kv, made.seqlen_k, made.head_dim_v = value.shape
    made.query, made.key, made.value, made.out = map(tensor, (query, key, value, out))
    for name, given in fields.items():
        setattr(made, name, tensor(given) if hasattr(given, "shape") else given)
    return made


def set_options(made: Problem, options: dict[str, Any]) -> None:
    """What attention(**options) says, layout excepted, in a problem that has its sizes. The caller keeps the arrays."""
    is_causal, diagonal = options.get("is_causal"), options.get("diagonal")
    made.flags |= (CAUSAL if is_causal else 0) | (LOWER_RIGHT if "lower_right" in (is_causal, diagonal) else 0)
    if isinstance(diagonal, int):
        made.diagonal = diagonal
    left, right = options.get("window") or (None, None)
    for flag, name, edge in ((WINDOW_LEFT, "window_left", left), (WINDOW_RIGHT, "window_right", right)):
        if edge not in (None, -1):
            made.flags |= flag
            setattr(made, name, edge)
    if options.get("scale") is not None:
        made.flags |= SCALE
        made.scale = options["scale"]
    made.softcap = options.get("softcap") or 0
    made.dropout_p, seed = options.get("dropout_p", 0.0), options.get("dropout_seed")
    if seed is not None:
        made.dropout_seed = seed.ctypes.data if isinstance(seed, np.ndarray) else seed.data_ptr()
    for name, shape in broadcast_shapes(made).items():
        if options.get(name) is not None:
            setattr(made, name, tensor(broadcast(options[name], shape)))


def broadcast_shapes(made: Problem) -> dict[str, tuple[int, ...]]:
    heads = (made.batch, made.num_heads_q)
    return {"attn_mask": (*heads, made.seqlen_q, made.seqlen_k), "sinks": heads, "alibi_slopes": heads}


def shapes_only(
    batch: int = 2,
    num_heads_q: int = 8,
    num_heads_kv: int = 8,
    seqlen_q: int = 512,
    seqlen_k: int = 512,
    head_dim: int = 64,
    head_dim_v: int = 64,
    dtype: int = FLOAT16,
    device_type: int = CUDA,
    **fields: Any,
) -> Problem:
    """A problem without arrays, as planning takes it: strides are those of packed arrays."""
    made = Problem(struct_size=ctypes.sizeof(Problem), device_type=device_type)
    made.batch, made.num_heads_q, made.num_heads_kv = batch, num_heads_q, num_heads_kv
    made.seqlen_q, made.seqlen_k, made.head_dim, made.head_dim_v = seqlen_q, seqlen_k, head_dim, head_dim_v

    def packed(heads: int, rows: int, columns: int) -> Tensor:
        return Tensor(None, (ctypes.c_int64 * 4)(heads * rows * columns, rows * columns, columns, 1), dtype, 0)

    made.query = packed(num_heads_q, seqlen_q, head_dim)
    made.key = packed(num_heads_kv, seqlen_k, head_dim)
    made.value = packed(num_heads_kv, seqlen_k, head_dim_v)
    made.out = packed(num_heads_q, seqlen_q, head_dim_v)
    for name, given in fields.items():
        setattr(made, name, given)
    return made


def cpu_device(isa: int = 0, num_threads: int = 1) -> Device:
    return Device(struct_size=ctypes.sizeof(Device), type=CPU, name=b"CPU", isa=isa, num_threads=num_threads)


def gpu_device(compute_capability: int, num_sms: int = 132) -> Device:
    """An H100's facts, but for the capability."""
    return Device(
        struct_size=ctypes.sizeof(Device),
        type=CUDA,
        name=b"a GPU by hand",
        compute_capability=compute_capability,
        num_sms=num_sms,
        smem_bytes_per_block=232448,
        driver_version=13000,
        l2_bytes=50 << 20,
    )


def plan(made: Problem, device: Device | None = None) -> tuple[int, Plan]:
    result = Plan(struct_size=ctypes.sizeof(Plan))
    status = library().fc_attention_plan(
        ctypes.byref(made), None if device is None else ctypes.byref(device), ctypes.byref(result)
    )
    return status, result


def shape_class(made: Problem) -> tuple[int, str]:
    """The number, and the words for it."""
    number, words = ctypes.c_uint64(), ctypes.create_string_buffer(256)
    status = library().fc_attention_class(ctypes.byref(made), ctypes.byref(number), words, 256)
    assert status == OK, last_error()
    return number.value, words.value.decode()


def candidates(made: Problem, device: Device, capacity: int = 128) -> tuple[int, list[Plan], int]:
    """Status, the plans that were written, and how many there are."""
    plans = (Plan * capacity)(*[Plan(struct_size=ctypes.sizeof(Plan)) for _ in range(capacity)])
    count = ctypes.c_int32(-1)
    status = library().fc_attention_candidates(
        ctypes.byref(made), ctypes.byref(device), plans, capacity, ctypes.byref(count)
    )
    return status, list(plans)[: max(0, count.value)], count.value


def add_tuned(device: Device, made: Problem, kernel: bytes) -> int:
    return int(library().fc_tuned_add(ctypes.byref(device), shape_class(made)[0], kernel))


def forward(made: Problem) -> int:
    return int(library().fc_attention_forward(ctypes.byref(made), None, 0, None))


def run(made: Problem, plan: Plan) -> int:
    return int(library().fc_attention_run(ctypes.byref(made), ctypes.byref(plan), None, 0, None))


def backward_problem(forward: Problem, dout: Any, **fields: Any) -> BackwardProblem:
    """The gradients of a problem whose out and lse are made. The caller keeps the arrays alive."""
    made = BackwardProblem(struct_size=ctypes.sizeof(BackwardProblem), forward=ctypes.pointer(forward))
    made.dout = tensor(dout)
    for name, given in fields.items():
        setattr(made, name, tensor(given) if hasattr(given, "shape") else given)
    return made


def backward_plan(made: BackwardProblem, device: Device | None = None) -> tuple[int, Plan]:
    result = Plan(struct_size=ctypes.sizeof(Plan))
    status = library().fc_attention_backward_plan(
        ctypes.byref(made), None if device is None else ctypes.byref(device), ctypes.byref(result)
    )
    return status, result


def backward(made: BackwardProblem, workspace: Array | None = None) -> int:
    """Without a workspace it gets one of the planned size, full of NaN, whose guards are looked at afterwards."""
    status, planned = backward_plan(made)
    if workspace is not None or status != OK:
        data, size = (workspace.ctypes.data, workspace.nbytes) if workspace is not None else (None, 0)
        return int(library().fc_attention_backward(ctypes.byref(made), data, size, None))
    size = planned.workspace_bytes
    if getattr(made, "known", made).forward.contents.device_type == CUDA:  # a newer struct begins with the known one
        import torch

        buffer: Any = torch.full((size + 512,), 0xFF, dtype=torch.uint8, device="cuda")
        start, stream = 256, torch.cuda.current_stream().cuda_stream
    else:
        buffer = np.full(size + 256, 0xFF, np.uint8)
        start, stream = 64 + -buffer.ctypes.data % 64, None
    data = start + (buffer.ctypes.data if isinstance(buffer, np.ndarray) else buffer.data_ptr())
    status = library().fc_attention_backward(ctypes.byref(made), data, size, stream)
    assert (buffer[:start] == 0xFF).all() and (buffer[start + size :] == 0xFF).all(), "wrote outside the workspace"
    return int(status)
