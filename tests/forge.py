"""DLPack capsules made by hand, so that every field can lie.

The structs are DLPack's; `Forgery` owns one of each kind with room for its shape and strides, and hands out a fresh
capsule over them whenever it is asked.
"""

from __future__ import annotations

import ctypes
from typing import Any

CPU, CUDA = 1, 2
FLOAT = 2
READ_ONLY = 1
MAX_NDIM = 64  # room behind shape and strides: an importer may believe an ndim before it checks it


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_NAMES: dict[bytes, bytes] = {}  # a capsule keeps the address of its name, not a copy


def capsule(pointer: int, name: bytes | None) -> Any:
    return _new_capsule(pointer, None if name is None else _NAMES.setdefault(name, name), None)


class Forgery:
    """An array with __dlpack__ whose fields the test may set at will; a good float32 [2, 3, 4, 8] to begin with."""

    ELEMENTS = 2 * 3 * 4 * 8

    def __init__(self, versioned: bool = True) -> None:
        self.values = (ctypes.c_float * self.ELEMENTS)(*[0.01 * i for i in range(self.ELEMENTS)])
        self.shape = (ctypes.c_int64 * MAX_NDIM)()
        self.strides = (ctypes.c_int64 * MAX_NDIM)()
        self.deleted = 0
        self._deleter = _DELETER(self._count)
        self.managed: Managed | ManagedVersioned = ManagedVersioned() if versioned else Managed()
        self.said_device: Any = (CPU, 0)
        self.reset()

    def _count(self, _: int) -> None:
        self.deleted += 1

    @property
    def tensor(self) -> Tensor:
        return self.managed.tensor

    def reset(self) -> None:
        managed, tensor = self.managed, self.managed.tensor
        if isinstance(managed, ManagedVersioned):
            managed.major, managed.minor, managed.flags = 1, 0, 0
            self.name: bytes | None = b"dltensor_versioned"
        else:
            self.name = b"dltensor"
        managed.deleter = ctypes.cast(self._deleter, ctypes.c_void_p)
        tensor.data = ctypes.addressof(self.values)
        tensor.device.type, tensor.device.id = CPU, 0
        tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = FLOAT, 32, 1
        tensor.byte_offset = 0
        tensor.shape = ctypes.cast(self.shape, ctypes.POINTER(ctypes.c_int64))
        tensor.strides = ctypes.cast(self.strides, ctypes.POINTER(ctypes.c_int64))
        self.set_shape((2, 3, 4, 8), (96, 32, 8, 1))
        self.said_device = (CPU, 0)

    def set_shape(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.tensor.ndim = len(shape)
        self.shape[: len(shape)] = shape
        self.strides[: len(strides)] = strides

    def __dlpack__(self, **_: Any) -> Any:
        return capsule(ctypes.addressof(self.managed), self.name)

    def __dlpack_device__(self) -> Any:
        return self.said_device
