"""Nothing leaks, nothing races, and nobody's lies get further than an exception."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forge
import fuzz_importers
import numpy as np
import pytest
from devices import same_bits
from processes import run_python

import flashcore


def qkv(batch: int = 2, rows: int = 5, dim: int = 16, seed: int = 42) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, 3, rows, dim)).astype(np.float32) for _ in range(3)]


# References and memory


def _refused() -> None:
    q, k, v = qkv()
    for bad in ({"scale": float("nan")}, {"attn_mask": np.zeros((9, 9), np.float32)}, {"window": "a"}, {"out": q}):
        try:
            flashcore.attention(q, k, v, **bad)
        except (ValueError, TypeError):
            continue
        raise AssertionError(f"{bad} was accepted")


def _numpy_calls() -> Callable[[], Any]:
    arrays = qkv()
    mask, sinks = np.ones((5, 5), bool), np.zeros(3, np.float32)
    return lambda: flashcore.attention(
        *arrays, attn_mask=mask, sinks=sinks, window=(2, 1), return_lse=True, layout="bhsd"
    )


def _torch_calls() -> Callable[[], Any]:
    torch = pytest.importorskip("torch")
    arrays = [torch.from_numpy(x) for x in qkv()]
    return lambda: flashcore.attention(*arrays, is_causal="lower_right", return_lse=True)


def _jax_calls() -> Callable[[], Any]:
    jax = pytest.importorskip("jax")
    arrays = [jax.numpy.asarray(x) for x in qkv()]
    return lambda: flashcore.attention(*arrays, return_lse=True)


def _forged_calls() -> Callable[[], Any]:
    forgeries = [forge.Forgery(versioned) for versioned in (True, False)]
    query = np.zeros((2, 3, 4, 8), np.float32)
    return lambda: flashcore.attention(query, *forgeries)


CALLS = {
    "numpy": _numpy_calls,
    "torch": _torch_calls,
    "jax": _jax_calls,
    "dlpack": _forged_calls,
    "refused": lambda: _refused,
    "explain": lambda: lambda: flashcore.explain(*qkv()),
}

# A loop over 10,000 that leaks 64 bytes a call grows by 0.6 MiB; an allocator at rest stays within a few pages.
NUM_CALLS = 10_000
ALLOWED_GROWTH = 512 << 10


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.uninstrumented
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read the process's memory")
@pytest.mark.parametrize("kind", CALLS)
def test_memory_does_not_grow(kind: str) -> None:
    call = CALLS[kind]()
    number = NUM_CALLS // 5 if kind in ("jax", "refused", "explain") else NUM_CALLS
    growths = []
    for _ in range(4):  # the first rounds fill pools and caches
        gc.collect()
        before = _resident_bytes()
        for _ in range(number):
            call()
        growths.append(_resident_bytes() - before)
    assert min(growths) < ALLOWED_GROWTH * number / NUM_CALLS + (64 << 10), f"bytes per round: {growths}"


@pytest.mark.parametrize("kind", CALLS)
def test_references_stay(kind: str) -> None:
    call = CALLS[kind]()
    call()
    shared = [None, True, False, (), np.ndarray, np.dtype(np.float32), flashcore.attention, float, forge.Forgery]
    shared += [sys.intern(word) for word in ("torch", "numpy", "query", "window", "lower_right", "bhsd", "__dlpack__")]
    gc.collect()
    before = [sys.getrefcount(x) for x in shared]
    for _ in range(500):
        call()
    gc.collect()
    after = [sys.getrefcount(x) for x in shared]
    moved = {repr(x): b - a for x, a, b in zip(shared, before, after, strict=True) if abs(b - a) >= 400}
    assert not moved, f"references gained in 500 calls: {moved}"


def test_references_of_arguments() -> None:
    arrays = qkv()
    out, mask = np.empty_like(arrays[0]), np.ones((5, 5), bool)
    left, right, diagonal, scale = int("1000"), int("2000"), int("3000"), float("0.5")
    window = (left, right)
    everything = [*arrays, out, mask, left, right, diagonal, scale, window]
    before = [sys.getrefcount(x) for x in everything]
    for _ in range(100):
        options = {"attn_mask": mask, "out": out, "window": window, "diagonal": diagonal, "softcap": scale}
        flashcore.attention(*arrays, **options, scale=scale)
        flashcore.explain(*arrays, **options, scale=scale)
        with pytest.raises(ValueError, match="scale"):
            flashcore.attention(*arrays, **options, scale=float("inf"))
    del options
    assert [sys.getrefcount(x) for x in everything] == before
    result = flashcore.attention(*arrays)
    assert sys.getrefcount(result) == 2


@pytest.mark.parametrize("versioned", [True, False])
def test_every_capsule_is_given_back_once(versioned: bool) -> None:
    good, bad = forge.Forgery(versioned), forge.Forgery(versioned)
    query = np.zeros((2, 3, 4, 8), np.float32)
    flashcore.attention(query, good, good)
    assert good.deleted == 2
    bad.tensor.ndim = -1
    with pytest.raises(ValueError, match="dimensions"):
        flashcore.attention(query, good, bad)
    assert (good.deleted, bad.deleted) == (3, 1)
    with pytest.raises(ValueError, match="scale"):
        flashcore.attention(query, good, good, scale=float("nan"))
    assert good.deleted == 5
    bad.reset()
    bad.managed.deleter = None
    flashcore.attention(query, bad, bad)


# Threads and processes


def test_eight_threads_at_once() -> None:
    problems = [qkv(batch=1 + i % 3, rows=40 + 37 * i, dim=32, seed=i) for i in range(8)]
    want = [flashcore.attention(*problem, is_causal=True) for problem in problems]
    wrong: list[int] = []
    start = threading.Barrier(8)

    def work(mine: int) -> None:
        start.wait()
        for i in range(60):
            at = (mine + i) % 8
            if not same_bits(flashcore.attention(*problems[at], is_causal=True), want[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not wrong


def test_the_gil_is_released() -> None:
    q, k, v = qkv(batch=1, rows=3000, dim=64)
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            time.sleep(0.001)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    before = ticks
    while time.perf_counter() - start < 0.3:
        flashcore.attention(q, k, v)
    seen = ticks - before
    done.set()
    thread.join()
    assert seen > 20, f"{seen} ticks of another thread in 0.3 s"


FORK = """
import os, sys, threading, time
import numpy as np, flashcore
q = np.random.default_rng(0).standard_normal((2, 4, 400, 64)).astype(np.float32)
want = flashcore.attention(q, q, q)              # the parent's pool is up
stop = False
def churn():
    while not stop: flashcore.attention(q, q, q)
busy = threading.Thread(target=churn); busy.start()  # and busy, now and then, while we fork
children = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        same = all((flashcore.attention(q, q, q) == want).all() for _ in range(3))
        if os.path.exists("/proc/self/task"):  # the parent's helpers are gone, the child has its own
            same = same and len(os.listdir("/proc/self/task")) == int(os.environ["OMP_NUM_THREADS"])
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if (flashcore.attention(q, q, q) == want).all() else 1)
        status = os.waitpid(grandchild, 0)[1]
        os._exit(0 if same and status == 0 else 1)
    children.append(child)
statuses = []
deadline = time.time() + 30
for child in children:
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid: break
        if time.time() > deadline:
            os.kill(child, 9); os.waitpid(child, 0); status = 'hangs'; break
        time.sleep(0.005)
    statuses.append(status)
stop = True; busy.join()
assert (flashcore.attention(q, q, q) == want).all()
print(statuses)
sys.exit(any(statuses))
"""


@pytest.mark.uninstrumented  # forked while another thread allocates, the sanitizer's allocator stays locked
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("threads", ["1", "2", "4"])
def test_fork_after_calls(threads: str) -> None:
    run_python(FORK, OMP_NUM_THREADS=threads, PYTHONWARNINGS="ignore::DeprecationWarning")


def test_bits_do_not_depend_on_omp_num_threads() -> None:
    code = (
        "import numpy as np, flashcore, hashlib;"
        "q = np.random.default_rng(0).standard_normal((2, 4, 400, 64)).astype(np.float32);"
        "print(hashlib.sha256(flashcore.attention(q, q, q, is_causal=True)).hexdigest())"
    )
    digests = {
        run_python(code, OMP_NUM_THREADS=threads) for threads in ("1", "2", "3", "16", "", "nonsense", "-1", "2,3")
    }
    assert len(digests) == 1


SUBINTERPRETER = """
import importlib, sys
import numpy as np, flashcore
q = np.ones((1, 1, 4, 8), np.float32)
flashcore.attention(q, q, q)
for name in ("_interpreters", "_xxsubinterpreters"):
    try: interpreters = importlib.import_module(name)
    except ImportError: continue
    break
else: sys.exit(0)
code = '''
try:
    import flashcore
except ImportError as error:  # an isolated interpreter may refuse the module, in words
    assert "interpreter" in str(error), error
else:
    for _ in range(100):
        try: flashcore.attention([], [], [])
        except TypeError as error: assert "query" in str(error)
        flashcore.kernels()
'''
for _ in range(5):
    made = interpreters.create()
    problem = interpreters.run_string(made, code)
    assert not problem, problem
    interpreters.destroy(made)
    assert (flashcore.attention(q, q, q) == 1).all()
print("fine")
"""


def test_subinterpreters() -> None:
    assert "fine" in run_python(SUBINTERPRETER, PYTHONWARNINGS="ignore") or sys.version_info >= (3, 15)


def test_imported_twice() -> None:
    code = """
import sys, gc, numpy as np, flashcore
q = np.ones((1, 1, 4, 8), np.float32)
old = flashcore.attention
for _ in range(20):
    for name in [name for name in sys.modules if name.startswith("flashcore")]: del sys.modules[name]
    import flashcore
    assert (flashcore.attention(q, q, q) == 1).all() and (old(q, q, q) == 1).all()
    gc.collect()
"""
    run_python(code)


def test_import_brings_no_framework() -> None:
    loaded = run_python("import sys, flashcore; print(*sys.modules)").split()
    assert not {"torch", "numpy", "jax", "cupy", "ml_dtypes"} & set(loaded)


def test_exits_cleanly_with_calls_in_flight() -> None:
    code = """
import threading, numpy as np, flashcore
q = np.zeros((1, 4, 2000, 64), np.float32)
def work():
    for _ in range(100): flashcore.attention(q, q, q)
for _ in range(4): threading.Thread(target=work, daemon=True).start()
flashcore.attention(q, q, q)
"""
    run_python(code)


# Objects that raise and lie


class Raises:
    """Its attribute `name` raises `error` when it is read, or when it is called."""

    def __init__(self, name: str, error: BaseException, on_call: bool) -> None:
        self._name, self._error, self._on_call = name, error, on_call

    def __getattribute__(self, name: str) -> Any:
        get = object.__getattribute__
        if name.startswith("__dlpack") or name == "__cuda_array_interface__":
            if name != get(self, "_name"):
                if name == "__dlpack_device__":
                    return lambda: (1, 0)
                raise AttributeError(name)
            error = get(self, "_error")
            if not get(self, "_on_call"):
                raise error

            def call(*_: Any, **__: Any) -> Any:
                raise error

            return call
        return get(self, name)


@pytest.mark.parametrize(
    "error",
    [ValueError("mine"), RuntimeError("mine"), BufferError("mine"), KeyError("mine"), SystemError("mine")],
    ids=repr,
)
@pytest.mark.parametrize("name", ["__dlpack__", "__dlpack_device__"])
def test_a_producers_own_exception_comes_through(name: str, error: Exception) -> None:
    q, k, v = qkv()

    class Producer:
        def __dlpack__(self, **_: Any) -> Any:
            if name == "__dlpack__":
                raise error
            return k.__dlpack__()

        def __dlpack_device__(self) -> Any:
            if name == "__dlpack_device__":
                raise error
            return (1, 0)

    with pytest.raises(type(error), match="mine"):
        flashcore.attention(q, Producer(), v)


def test_keyboard_interrupt_is_not_swallowed() -> None:
    q, _k, v = qkv()
    for name in ("__dlpack__", "__dlpack_device__"):
        with pytest.raises((KeyboardInterrupt, TypeError)):
            flashcore.attention(q, Raises(name, KeyboardInterrupt(), on_call=True), v)


@pytest.mark.parametrize("on_call", [True, False])
@pytest.mark.parametrize("name", ["__dlpack__", "__dlpack_device__", "__cuda_array_interface__"])
def test_attributes_that_raise(name: str, on_call: bool) -> None:
    q, _k, v = qkv()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        flashcore.attention(q, Raises(name, RuntimeError("no"), on_call), v)


@pytest.mark.parametrize("returned", [None, 1, "capsule", object(), (), b"dltensor"], ids=lambda x: type(x).__name__)
def test_dlpack_returns_no_capsule(returned: Any) -> None:
    q, _, v = qkv()

    class Liar:
        def __dlpack__(self, **_: Any) -> Any:
            return returned

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    with pytest.raises(TypeError, match=r"key.*capsule"):
        flashcore.attention(q, Liar(), v)


def test_the_same_capsule_twice() -> None:
    good = forge.Forgery()
    once = good.__dlpack__()
    good.__dlpack__ = lambda **_: once  # type: ignore[method-assign]
    query = np.zeros((2, 3, 4, 8), np.float32)

    class Same:
        def __dlpack__(self, **_: Any) -> Any:
            return once

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    with pytest.raises(TypeError, match=r"value.*capsule"):
        flashcore.attention(query, Same(), Same())
    assert good.deleted == 1


LIES: list[tuple[str, Callable[[forge.Forgery], Any], str]] = [
    ("negative ndim", lambda f: setattr(f.tensor, "ndim", -1), "-1 dimensions"),
    ("huge ndim", lambda f: setattr(f.tensor, "ndim", 2**31 - 1), "2147483647 dimensions"),
    ("NULL shape", lambda f: setattr(f.tensor, "shape", None), "shape is NULL"),
    ("NULL data", lambda f: setattr(f.tensor, "data", None), "NULL"),
    ("NULL data, offset", lambda f: (setattr(f.tensor, "data", None), setattr(f.tensor, "byte_offset", 64)), "NULL"),
    ("negative size", lambda f: f.set_shape((2, 3, -4, 8), (96, 32, 8, 1)), "-4"),
    ("size of 2^63 - 1", lambda f: f.set_shape((2, 3, 2**63 - 1, 8), (96, 32, 8, 1)), "value"),
    ("overflowing size", lambda f: f.set_shape((2**33, 2**33, 4, 8), (96, 32, 8, 1)), "value|batch|address"),
    ("overflowing stride", lambda f: f.set_shape((2, 3, 4, 8), (2**62, 2**62, 8, 1)), "address"),
    ("least stride", lambda f: f.set_shape((2, 3, 4, 8), (-(2**63), 32, 8, 1)), "address"),
    ("odd offset", lambda f: setattr(f.tensor, "byte_offset", 1), "aligned"),
    ("four lanes", lambda f: setattr(f.tensor.dtype, "lanes", 4), "4 lanes"),
    ("int", lambda f: setattr(f.tensor.dtype, "code", 0), "int32"),
    ("unknown code", lambda f: setattr(f.tensor.dtype, "code", 99), "code 99"),
    ("24 bits", lambda f: setattr(f.tensor.dtype, "bits", 24), "float24"),
    ("unknown device", lambda f: setattr(f.tensor.device, "type", 99), "type 99"),
    ("another device", lambda f: setattr(f.tensor.device, "type", forge.CUDA), "different devices"),
]


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie[0])
def test_forged_fields(lie: tuple[str, Callable[[forge.Forgery], Any], str], versioned: bool) -> None:
    query = np.zeros((2, 3, 4, 8), np.float32)
    forgery = forge.Forgery(versioned)
    lie[1](forgery)
    with pytest.raises(ValueError, match=lie[2]) as caught:
        flashcore.attention(query, query, forgery)
    assert "value" in str(caught.value)
    assert forgery.deleted == 1


@pytest.mark.parametrize("name", [b"", b"dl", b"used_dltensor", b"used_dltensor_versioned", b"DLTENSOR", None])
def test_forged_names(name: bytes | None) -> None:
    forgery = forge.Forgery()
    forgery.name = name
    query = np.zeros((2, 3, 4, 8), np.float32)
    with pytest.raises(TypeError, match=r"value.*capsule"):
        flashcore.attention(query, query, forgery)
    assert forgery.deleted == 0, "a capsule of another name is not ours to delete"


@pytest.mark.parametrize("major", [0, 2, 2**32 - 1])
def test_forged_versions(major: int) -> None:
    forgery = forge.Forgery()
    forgery.managed.major = major
    forgery.tensor.ndim = -7  # of another major version nothing else may be read
    query = np.zeros((2, 3, 4, 8), np.float32)
    with pytest.raises(BufferError, match=rf"value.*{major}"):
        flashcore.attention(query, query, forgery)
    assert forgery.deleted == 1


def test_null_strides_mean_row_major() -> None:
    forgery = forge.Forgery(versioned=False)
    query = np.ones((2, 3, 4, 8), np.float32)
    want = flashcore.attention(query, query, forgery)
    forgery.tensor.strides = None
    assert same_bits(flashcore.attention(query, query, forgery), want)


@pytest.mark.parametrize("device", [None, (), (1,), (1, 0, 0), ("cpu", 0), (2**40, 0), [1, 0], (1.5, 0), 5])
def test_forged_device(device: Any) -> None:
    forgery = forge.Forgery()
    forgery.said_device = device
    query = np.zeros((2, 3, 4, 8), np.float32)
    with pytest.raises(TypeError, match=r"value.*__dlpack_device__"):
        flashcore.attention(query, query, forgery)


def test_callbacks_may_call_back() -> None:
    q, k, v = qkv()
    want = flashcore.attention(q, k, v)

    class Nested:
        def __dlpack__(self, **_: Any) -> Any:
            assert same_bits(flashcore.attention(q, k, v), want)
            with pytest.raises(ValueError, match="scale"):
                flashcore.attention(q, k, v, scale=float("nan"))
            gc.collect()
            return k.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    assert same_bits(flashcore.attention(q, Nested(), v), want)


class Number:
    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __index__(self) -> int:
        if self.error:
            raise self.error
        return 2

    def __float__(self) -> float:
        return float(self.__index__())


@pytest.mark.parametrize("argument", ["scale", "softcap", "diagonal", "window", "block_m"])
def test_numbers_that_raise(argument: str) -> None:
    q, k, v = qkv()

    def given(number: Number) -> Any:
        return (number, number) if argument == "window" else number

    with pytest.raises(ZeroDivisionError):
        flashcore.attention(q, k, v, **{argument: given(Number(ZeroDivisionError()))})
    if argument != "block_m":
        flashcore.attention(q, k, v, **{argument: given(Number(None))})


def test_a_result_too_large_for_memory() -> None:
    one = np.zeros((1, 1, 1, 8), np.float32)
    huge = np.broadcast_to(one, (2**16, 2**16, 2**8, 8))  # 2^45 bytes of result
    with pytest.raises(MemoryError):
        flashcore.attention(huge, one, one)


def test_a_result_of_more_than_64_bits_of_bytes() -> None:
    torch = pytest.importorskip("torch")
    huge = torch.zeros(1, 1, 1, 8).expand(2**20, 2**20, 2**19, 8)  # 2^64 bytes of result
    one = np.zeros((1, 1, 1, 8), np.float32)
    with pytest.raises((MemoryError, ValueError, RuntimeError)):
        flashcore.attention(huge, one, one)


# Random lies


@pytest.mark.parametrize("seed", [1, 2])
def test_fuzz_importers(seed: int) -> None:
    outcomes = fuzz_importers.run(10_000, seed)
    assert outcomes["ran"] > 200, f"the fuzzer hardly ever gets through: {outcomes}"
    assert outcomes["ValueError"] > 2000
