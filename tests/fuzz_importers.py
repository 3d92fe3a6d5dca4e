"""Hostile arrays by the thousand: whatever they claim, only a documented Python exception may come out.

    python tests/fuzz_importers.py [COUNT] [SEED]

Each round takes a good array, spoils some fields of one protocol with garbage and hands it to attention() as one of its
arguments. Where the garbage still describes an array it lies within real memory: data points at the middle of a
buffer that is larger than any reach that a spoilt stride of a passing shape can have, or else is NULL.
A crash is a crash of this program: run it under AddressSanitizer to see more.
"""

from __future__ import annotations

import ctypes
import random
import sys
import time
from typing import Any

import forge
import numpy as np

import flashcore

ALLOWED = (TypeError, ValueError, NotImplementedError, BufferError, MemoryError, RuntimeError, OverflowError)

# The small sizes and strides below reach at most 4 dimensions x 8 steps x 1000 elements of 8 bytes, either way.
REACH_BYTES = 4 * 8 * 1000 * 8

SIZES = (0, 1, 2, 3, 4, 8)
STRIDES = (0, 1, 2, 8, 32, 96, -1, -8, 1000, -1000)
GARBAGE = (-1, -(2**63), 2**63 - 1, 2**62, 2**61, 2**60, 2**48, 2**40, 2**32, 2**31, -(2**31), 17, 64, 257)


class CudaArray:
    pass


class Fuzzer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.good = np.zeros((2, 3, 4, 8), np.float32)
        self.out = np.zeros((2, 3, 4, 8), np.float32)
        self.arena = (ctypes.c_uint8 * (2 * REACH_BYTES + 4096))()
        self.middle = (ctypes.addressof(self.arena) + REACH_BYTES + 63) & ~63
        self.forgeries = [forge.Forgery(versioned=True), forge.Forgery(versioned=False)]
        self.outcomes: dict[str, int] = {}

    def number(self, small: tuple[int, ...], garbage: float) -> int:
        pick = self.random
        if pick.random() >= garbage:
            return pick.choice(small)
        return pick.choice(GARBAGE) if pick.random() < 0.7 else pick.getrandbits(64) - 2**63

    def forged(self) -> Any:
        pick = self.random
        forgery = pick.choice(self.forgeries)
        forgery.reset()
        tensor = forgery.tensor
        tensor.data = self.middle
        kind = pick.randrange(12)
        if kind <= 5:  # a shape, from harmless to absurd
            garbage = (0.0, 0.0, 0.2, 0.2, 0.5, 1.0)[kind]
            ndim = pick.choice((0, 1, 2, 3, 4, 4, 4, 5, 16, 17))
            # Sizes that are large must not pass beside strides that are: the memory would not be there.
            wild_sizes = pick.random() < 0.5
            shape = tuple(self.number(SIZES, garbage if wild_sizes else 0) for _ in range(ndim))
            strides = tuple(0 if wild_sizes else self.number(STRIDES, garbage) for _ in range(ndim))
            if ndim == 4 and pick.random() < 0.5:  # one that has a chance to fit the other arguments
                shape = (2, 3, 4, 8)
            forgery.set_shape(shape, strides)
            if not self.within_reach(shape, strides):
                tensor.data = None
        elif kind == 6:
            tensor.ndim = pick.choice((-1, -(2**31), 2**31 - 1, 17, 64, 1000))
        elif kind == 7:
            tensor.dtype.code, tensor.dtype.bits = pick.getrandbits(8) % 20, pick.choice((0, 1, 4, 8, 16, 32, 64, 255))
            tensor.dtype.lanes = pick.choice((0, 1, 1, 1, 2, 65535))
        elif kind == 8:
            tensor.device.type, tensor.device.id = (
                self.number((1, 1, 3, 2, 13, 10), 0.3) & 0x7FFFFFFF,
                pick.choice((0, 1, -1, 99)),
            )
            if pick.random() < 0.5:
                forgery.said_device = (tensor.device.type, tensor.device.id)
        elif kind == 9:
            forgery.said_device = pick.choice(
                (None, (), (1,), (1, 0, 0), ("a", 0), (2**40, 0), [1, 0], (1.0, 0), (2, 0), (True, False))
            )
        elif kind == 10:
            forgery.name = pick.choice((b"", b"dltensor", b"dltensor_versioned", b"used_dltensor", b"DLTensor", None))
            if forgery.name in (b"dltensor", b"dltensor_versioned"):  # a struct under the wrong name is beyond telling
                forgery.reset()
            if isinstance(forgery.managed, forge.ManagedVersioned):
                forgery.managed.major = pick.choice((0, 1, 1, 2, 2**32 - 1))
                forgery.managed.flags = pick.getrandbits(64)
        else:
            field = pick.randrange(4)
            if field == 0:
                tensor.shape = None
            elif field == 1:
                tensor.strides = None
            elif field == 2:
                tensor.data = None
                tensor.byte_offset = pick.choice((0, 0, 1, 4, 2**63, 2**64 - 1))
            else:
                forgery.managed.deleter = None
                tensor.byte_offset = pick.choice((0, 1, 2, 4, 64))
        return forgery

    @staticmethod
    def within_reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
        return sum(abs((size - 1) * step) for size, step in zip(shape, strides, strict=True)) * 8 <= REACH_BYTES

    def cuda_array(self) -> Any:
        pick = self.random
        array = CudaArray()
        interface: Any = {"shape": (2, 3, 4, 8), "typestr": "<f4", "data": (self.middle, False), "version": 3}
        for _ in range(pick.randrange(1, 4)):
            field = pick.choice(("shape", "typestr", "data", "strides", "stream", "mask", "version"))
            interface[field] = pick.choice(
                (
                    None,
                    0,
                    -1,
                    2**70,
                    "x",
                    "<f2",
                    ">f4",
                    "|b1",
                    (),
                    (1,),
                    (-1, 2),
                    (2**63, 1),
                    (2**62, 2**62, 1, 1),
                    (1.5,),
                    [2],
                    {},
                    (None, None),
                )
            )
            if pick.random() < 0.1:
                del interface[field]
        array.__cuda_array_interface__ = interface if pick.random() < 0.95 else pick.choice((None, 5, [], "a"))
        return array

    def subclass(self) -> Any:
        """NumPy's own arrays with every stride and dtype that NumPy can make."""
        pick = self.random
        dtype = pick.choice(("<f4", "<f4", "<f2", "<f8", ">f4", "?", "i4", "V3", "O", "U2", "c8"))
        base = np.zeros(4096, np.uint8) if dtype != "O" else np.empty(512, object)
        strides = tuple(pick.choice((0, 1, 2, 3, 4, 8, 32, 128)) for _ in range(4))
        shape = tuple(pick.choice((0, 1, 2, 3, 4, 8)) for _ in range(4))
        try:
            return np.ndarray(shape, dtype, base, offset=pick.choice((0, 0, 1, 4)), strides=strides)
        except (ValueError, TypeError):
            return np.ma.zeros((2, 3, 4, 8))

    def one(self) -> None:
        pick = self.random
        make = pick.choice((self.forged, self.forged, self.forged, self.forged, self.cuda_array, self.subclass))
        name = pick.choice(("query", "key", "value", "attn_mask", "out", "sinks", "alibi_slopes"))
        arguments = {"query": self.good, "key": self.good, "value": self.good, "out": self.out, name: make()}
        try:
            flashcore.attention(**arguments)
            outcome = "ran"
        except ALLOWED as error:
            outcome = type(error).__name__
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


def run(count: int, seed: int) -> dict[str, int]:
    """Exceptions of other kinds pass through, and say which round made them."""
    fuzzer = Fuzzer(seed)
    for i in range(count):
        try:
            fuzzer.one()
        except BaseException as error:
            error.add_note(f"round {i} of seed {seed}")
            raise
    return fuzzer.outcomes


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    start = time.perf_counter()
    outcomes = run(count, seed)
    seconds = time.perf_counter() - start
    print(f"{count} arrays in {seconds:.1f} s ({count / seconds:,.0f} a second), seed {seed}")
    for outcome, times in sorted(outcomes.items()):
        print(f"  {outcome:20} {times}")
