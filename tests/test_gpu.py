"""What only a GPU can show: streams, graphs, allocators, kinds, and sizes beyond 32 bits.

The cases of test_attention.py, the equations of test_semantics.py and the properties run on every GPU kernel too; here
is what they cannot say.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

import capi
import numpy as np
import pytest
import reference
from devices import fetch, same_bits
from processes import run_python

import flashcore

torch = pytest.importorskip("torch", reason="GPU tests make their arrays with PyTorch")
F = torch.nn.functional

pytestmark = pytest.mark.gpu

HALF_A_SECOND = 10**9  # of a GPU's clock, at 2 GHz; for torch.cuda._sleep


def qkv(*shape: int, dtype: Any = torch.float16, seed: int = 42) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(3)]


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """An error that a kernel leaves in the stream must fail the test that made it, not the next one."""
    yield
    torch.cuda.synchronize()


# Beside PyTorch


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("batch", [8, 16, 32])
@pytest.mark.parametrize("seqlen", [128, 256, 512])
def test_short_sequences_in_half_precision(seqlen: int, batch: int, is_causal: bool) -> None:
    q, k, v = qkv(batch, 8, seqlen, 64)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(flashcore.attention(q, k, v, is_causal=is_causal), want, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "shape", [(1, 1, 64, 64), (2, 4, 128, 64), (4, 8, 256, 64), (2, 8, 512, 64), (1, 8, 1024, 64)], ids=str
)
def test_largest_error_in_half_precision(shape: tuple[int, ...], seed: int) -> None:
    q, k, v = qkv(*shape, seed=seed)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (flashcore.attention(q, k, v) - want).abs().max() < 0.06


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_sequences(dtype: Any, head_dim: int, is_causal: bool) -> None:
    q, k, v = qkv(1, 2, 2049, head_dim, dtype=dtype)
    out, lse = flashcore.attention(q, k, v, is_causal=is_causal, return_lse=True)
    right = reference.expect(*map(fetch, (q, k, v)), is_causal=is_causal)
    right.check(fetch(out), fetch(lse))


def test_float32_is_ieee_whatever_pytorch_allows() -> None:
    q, k, v = qkv(1, 2, 300, 64, dtype=torch.float32)
    want = flashcore.attention(q, k, v)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert same_bits(flashcore.attention(q, k, v), want)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("which", ["query", "attn_mask"])
def test_batches_that_do_not_fold_may_be_aligned_otherwise(which: str) -> None:
    """The second of two lies off the 16 bytes that the copy engine asks for: it takes another kernel, or a copy."""
    arrays = dict(zip(("query", "key", "value"), (x.view(2, 2, 8, 128, 64) for x in qkv(4, 8, 128, 64)), strict=True))
    arrays["attn_mask"] = torch.randn(2, 2, 8, 128, 128, device="cuda").half()
    want = flashcore.attention(**arrays)
    flat = arrays[which].flatten(1)
    apart = torch.empty(2, flat.shape[1] + 4, device="cuda", dtype=torch.float16)[:, :-4]
    arrays[which] = apart.copy_(flat).unflatten(1, arrays[which].shape[1:])
    torch.testing.assert_close(flashcore.attention(**arrays), want, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("heads,rows,keys", [(1, 4, 600), (2, 128, 128), (3, 100, 1000)])
def test_deterministic_rows_do_not_depend_on_the_batch(heads: int, rows: int, keys: int) -> None:
    q, k, v = (qkv(200, heads, n, 64, seed=n)[0] for n in (rows, keys, keys))
    few = flashcore.attention(q[:1], k[:1], v[:1], deterministic=True)
    assert same_bits(flashcore.attention(q, k, v, deterministic=True)[:1], few)


# Refusals


def test_float64_is_refused() -> None:
    q, k, v = qkv(1, 1, 8, 16, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="float64 is served on the CPU"):
        flashcore.attention(q, k, v)


@pytest.mark.parametrize("which", range(3))
def test_mixed_devices_are_refused(which: int) -> None:
    arrays = qkv(1, 1, 8, 16)
    arrays[which] = arrays[which].cpu()
    with pytest.raises(ValueError, match=r"(the CPU.*cuda:0|cuda:0.*the CPU).*one device"):
        flashcore.attention(*arrays)
    q, k, v = qkv(1, 1, 8, 16)
    with pytest.raises(ValueError, match="one device"):
        flashcore.attention(q, k, v, attn_mask=np.ones((8, 8), bool))


def test_stream_argument_is_refused_for_pytorch() -> None:
    q, k, v = qkv(1, 1, 8, 16)
    with pytest.raises(ValueError, match=r"current stream.*torch.cuda.stream"):
        flashcore.attention(q, k, v, stream=torch.cuda.Stream())


def test_out_of_memory_is_an_exception() -> None:
    q = torch.zeros(1, 1, 1, 8, device="cuda", dtype=torch.float16).expand(2**15, 2**15, 2**8, 8)
    one = torch.zeros(1, 1, 1, 8, device="cuda", dtype=torch.float16)
    with pytest.raises((MemoryError, RuntimeError), match="memory"):
        flashcore.attention(q, one, one)
    flashcore.attention(one, one, one)


# Streams


def test_work_is_enqueued_and_not_waited_for() -> None:
    q, k, v = qkv(2, 2, 128, 64)
    want = flashcore.attention(q, k, v).clone()
    torch.cuda.synchronize()
    later = [torch.zeros_like(x) for x in (q, k, v)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(HALF_A_SECOND)
        for empty, full in zip(later, (q, k, v), strict=True):
            empty.copy_(full)
        out = flashcore.attention(*later)
        assert not stream.query(), "the call waited for the GPU"
        after = out + 0
    stream.synchronize()
    assert same_bits(out, want)
    assert same_bits(after, want)


def test_the_default_stream_is_ordered_too() -> None:
    q, k, v = qkv(2, 2, 128, 64)
    want = flashcore.attention(q, k, v).clone()
    later = torch.zeros_like(q)
    torch.cuda._sleep(HALF_A_SECOND)
    later.copy_(q)
    assert same_bits(flashcore.attention(later, k, v), want)


def test_many_threads_with_streams_of_their_own() -> None:
    problems = [qkv(1, 2, 100 + 50 * i, 64, seed=i) for i in range(8)]
    want = [flashcore.attention(*problem) for problem in problems]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(mine: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(50):
                at = (mine + i) % 8
                if not same_bits(flashcore.attention(*problems[at]), want[at]):
                    wrong.append(at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.parametrize("family", ["hopper", "hopper_short", "portable"])
def test_a_thread_that_has_used_no_gpu(family: str) -> None:
    """A launch needs a context that is current; the C library makes it so."""
    q, k, v = qkv(1, 2, 200, 64)
    out = torch.full_like(q, torch.nan)
    problem = capi.problem(q, k, v, out, kernel=family.encode())
    problem.device_type = capi.CUDA
    torch.cuda.synchronize()
    said: list[Any] = []

    def work() -> None:
        status = capi.library().fc_attention_forward(ctypes.byref(problem), None, 0, None)
        said.append((status, capi.last_error()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    (status, why) = said[0]
    if status == capi.UNSUPPORTED and family != "portable":
        pytest.skip(why)
    assert status == capi.OK, why
    torch.cuda.synchronize()
    reference.expect(*map(fetch, (q, k, v))).check(fetch(out))


# Graphs


def test_graph_capture() -> None:
    q, k, v = qkv(2, 4, 200, 64)
    flashcore.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashcore.attention(q, k, v, is_causal=True)
    for seed in (1, 2):
        for captured, fresh in zip((q, k, v), qkv(2, 4, 200, 64, seed=seed), strict=True):
            captured.copy_(fresh)
        graph.replay()
        assert same_bits(out, flashcore.attention(q, k, v, is_causal=True))


FIRST_CALL = """
import torch, flashcore
q, k, v = (torch.randn(1, 2, 100, {head_dim}, device="cuda").to(torch.{dtype}) for _ in range(3))
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = flashcore.attention(q, k, v)   # the process's first call
graph.replay()
torch.cuda.synchronize()
assert torch.equal(out, flashcore.attention(q, k, v)), "replay differs"
print("fine")
"""


@pytest.mark.parametrize("head_dim,dtype", [(64, "float16"), (128, "bfloat16"), (256, "float32")])
def test_graph_capture_as_the_first_call(head_dim: int, dtype: str) -> None:
    assert "fine" in run_python(FIRST_CALL.format(head_dim=head_dim, dtype=dtype), timeout=180, FLASHCORE_SLOW="allow")


def test_a_refusal_does_not_break_a_capture() -> None:
    q, k, v = qkv(1, 2, 64, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(ValueError, match="scale"):
            flashcore.attention(q, k, v, scale=float("nan"))
        out = flashcore.attention(q, k, v)
    graph.replay()
    assert same_bits(out, flashcore.attention(q, k, v))


# Memory


def test_the_result_is_pytorchs_own_memory() -> None:
    q, k, v = qkv(2, 4, 512, 64)
    flashcore.attention(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = flashcore.attention(q, k, v)
    assert torch.cuda.memory_allocated() - before == out.numel() * out.element_size()
    del out
    assert torch.cuda.memory_allocated() == before


def test_record_stream_keeps_the_result() -> None:
    """What another stream still reads is not given to the next tensor."""
    q, k, v = qkv(1, 2, 256, 64)
    out = flashcore.attention(q, k, v)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(HALF_A_SECOND)
    out.record_stream(side)
    address = out.data_ptr()
    del out
    later = [torch.empty_like(q) for _ in range(4)]
    assert address not in [x.data_ptr() for x in later]


def test_memory_is_linear_in_the_sequence() -> None:
    q, k, v = qkv(1, 1, 32768, 64)
    torch.cuda.synchronize()
    free_before, _ = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = flashcore.attention(q, k, v)
    workspace = flashcore.explain(q, k, v).workspace_bytes
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * out.element_size() + workspace
    free_after, _ = torch.cuda.mem_get_info()
    assert free_before - free_after < 256 << 20  # all scores would be 2 GiB in float16
    assert workspace < 64 << 20


def test_memory_does_not_grow() -> None:
    """The whole device's memory, in which other processes that test at the same time would be seen: then torch's."""
    q, k, v = qkv(1, 2, 64, 64)
    free = (lambda: 0) if "PYTEST_XDIST_WORKER" in os.environ else (lambda: torch.cuda.mem_get_info()[0])
    for _ in range(100):
        flashcore.attention(q, k, v, return_lse=True)
    torch.cuda.synchronize()
    before = free(), torch.cuda.memory_allocated()
    for _ in range(5000):
        flashcore.attention(q, k, v, return_lse=True)
    torch.cuda.synchronize()
    assert (free(), torch.cuda.memory_allocated()) == before


# Devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_current() -> None:
    arrays = [x.to("cuda:1") for x in qkv(2, 2, 100, 64)]
    want = reference.expect(*map(fetch, arrays))
    torch.cuda.set_device(0)
    out = flashcore.attention(*arrays)
    assert torch.cuda.current_device() == 0
    assert out.device == torch.device("cuda:1")
    want.check(fetch(out))
    mixed = [arrays[0], arrays[1].to("cuda:0"), arrays[2]]
    with pytest.raises(ValueError, match=r"cuda:1.*cuda:0"):
        flashcore.attention(*mixed)


# Other kinds


class CudaArray:
    """Only the CUDA array interface, version 3, over a tensor."""

    def __init__(self, tensor: Any, stream: int | None = None) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = {**tensor.__cuda_array_interface__, "version": 3, "stream": stream}


class Unversioned:
    """Only an old __dlpack__, over a tensor."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.tensor.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("kind", [CudaArray, Unversioned])
def test_mixed_kinds(kind: Any) -> None:
    q, k, v = qkv(2, 2, 100, 64)
    want = flashcore.attention(q, k, v)
    out = flashcore.attention(q, kind(k), kind(v))
    assert type(out) is torch.Tensor
    assert same_bits(out, want)
    out.zero_()
    assert flashcore.attention(kind(q), kind(k), kind(v), out=out) is out
    torch.cuda.synchronize()
    assert same_bits(out, want)
    mask = torch.randn(100, 101, device="cuda").half()[:, :100]  # of rows that a fast kernel may have to copy
    want = flashcore.attention(q, k, v, attn_mask=mask)
    flashcore.attention(kind(q), kind(k), kind(v), attn_mask=kind(mask), out=out)
    torch.cuda.synchronize()
    assert same_bits(out, want)


def test_an_interfaces_stream_is_waited_for() -> None:
    q, k, v = qkv(2, 2, 100, 64)
    want = flashcore.attention(q, k, v).clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(k)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(HALF_A_SECOND)
        late.copy_(k)
    assert same_bits(flashcore.attention(q, CudaArray(late, stream.cuda_stream), v), want)


def test_cupy() -> None:
    cupy = pytest.importorskip("cupy")
    arrays = [cupy.asarray(x) for x in map(fetch, qkv(2, 2, 100, 64))]
    out, lse = flashcore.attention(*arrays, is_causal=True, return_lse=True)
    assert isinstance(out, cupy.ndarray)
    assert isinstance(lse, cupy.ndarray)
    reference.expect(*map(cupy.asnumpy, arrays), is_causal=True).check(cupy.asnumpy(out), cupy.asnumpy(lse))
    backwards = [x[:, :, ::-1] for x in arrays]  # negative strides
    reference.assert_close(cupy.asnumpy(flashcore.attention(*backwards)), *map(cupy.asnumpy, backwards))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        moved = [x.copy() for x in arrays]
        result = flashcore.attention(*moved, is_causal=True)
    stream.synchronize()
    assert (result == out).all()


def test_cupy_and_pytorch_together() -> None:
    cupy = pytest.importorskip("cupy")
    q, k, v = qkv(2, 2, 100, 64)
    want = flashcore.attention(q, k, v)
    assert same_bits(flashcore.attention(q, cupy.asarray(k), v), want)
    out = flashcore.attention(cupy.asarray(q), k, v)
    assert isinstance(out, cupy.ndarray)
    assert (cupy.asnumpy(out) == fetch(want)).all()


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"this JAX has no GPU: {error}")
    host = list(map(fetch, qkv(2, 2, 100, 64)))
    arrays = [jax.device_put(x, gpu) for x in host]
    out = flashcore.attention(*arrays, is_causal=True)
    assert isinstance(out, jax.Array)
    assert out.devices() == {gpu}
    reference.assert_close(np.asarray(out), *host, is_causal=True)
    stream = torch.cuda.Stream()
    with_stream = flashcore.attention(*arrays, is_causal=True, stream=stream)
    assert same_bits(np.asarray(with_stream), np.asarray(out))


# Sizes beyond 32 bits


def _needs_free_gib(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free}")


def test_more_batches_and_heads_than_a_grid_dimension() -> None:
    q, k, v = qkv(70_000, 1, 3, 8)
    right = reference.expect(*map(fetch, (q, k, v)))
    right.check(fetch(flashcore.attention(q, k, v)))


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["rows", "heads", "batch"])
def test_queries_of_more_than_2_to_31_elements(axis: str) -> None:
    _needs_free_gib(12)
    count = 2**31 // 64 + 2
    shape = {"rows": (1, 1, count, 64), "heads": (1, count // 128, 128, 64), "batch": (count // 128, 1, 128, 64)}[axis]
    q = torch.zeros(shape, dtype=torch.float16, device="cuda")
    k, v = (torch.randn(1, 1, 16, 64, device="cuda").half() for _ in range(2))
    last = torch.randn(128, 64, device="cuda").half()
    q.view(-1, 64)[-128:] = last
    out = flashcore.attention(q, k, v)
    assert out.shape == q.shape
    small = flashcore.attention(last[None, None], k, v)
    assert same_bits(out.view(-1, 64)[-128:], small.view(128, 64))
    mean = flashcore.attention(torch.zeros_like(last)[None, None], k, v)
    assert same_bits(out.view(-1, 64)[:128], mean.view(128, 64))


@pytest.mark.slow
def test_strides_beyond_2_to_31() -> None:
    _needs_free_gib(6)
    storage = torch.full((2**31 + 4096,), float("nan"), dtype=torch.float16, device="cuda")
    small = torch.randn(2, 16, 64, device="cuda").half()
    far = storage.as_strided((1, 2, 16, 64), (0, 2**31, 64, 1))
    far.copy_(small)
    q = torch.randn(1, 2, 40, 64, device="cuda").half()
    assert same_bits(flashcore.attention(q, far, far), flashcore.attention(q, small[None], small[None]))
    out = storage.as_strided((1, 2, 16, 64), (0, 2**31, 64, 1))
    dense = small[None].clone()
    assert same_bits(flashcore.attention(dense, dense, dense, out=out), flashcore.attention(dense, dense, dense))
    assert storage[16 * 64 : 2**31].isnan().all(), "bytes between the heads were written"


@pytest.mark.slow
def test_a_mask_of_more_than_2_to_31_elements() -> None:
    _needs_free_gib(8)
    rows = keys = 46_400
    q, k, v = qkv(1, 1, rows, 16)
    mask = torch.ones(rows, keys, dtype=torch.bool, device="cuda").tril_()
    masked = flashcore.attention(q, k, v, attn_mask=mask)
    causal = flashcore.attention(q, k, v, is_causal=True)
    torch.testing.assert_close(masked[:, :, -256:], causal[:, :, -256:], rtol=1e-3, atol=1e-3)


# What it says


def test_explain_names_the_gpu() -> None:
    q, k, v = qkv(2, 2, 100, 64)
    plan = flashcore.explain(q, k, v)
    major, minor = torch.cuda.get_device_capability()
    assert f"sm_{major}{minor}" in str(plan)
    assert plan.kernel in {kernel.name for kernel in flashcore.kernels() if kernel.device == "cuda"}
    assert plan.num_threads % 32 == 0


SLOW = """
import warnings, torch, flashcore
q = torch.zeros(1, 1, 8, 16, device="cuda")  # float32, which no fast kernel serves
if not flashcore.explain(q, q, q).slow:
    print("not slow")
else:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5): flashcore.attention(q, q, q)
    print(len(caught), [issubclass(w.category, flashcore.SlowPathWarning) for w in caught])
"""


def test_slow_calls_warn_once() -> None:
    said = run_python(SLOW, timeout=180, FLASHCORE_SLOW="warn").strip()
    if said == "not slow":
        pytest.skip("this architecture has no fast kernels of its own")
    assert said == "1 [True]"
    assert run_python(SLOW, timeout=180, FLASHCORE_SLOW="allow").strip() == "0 []"


def test_slow_calls_can_be_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = qkv(1, 1, 8, 16, dtype=torch.float32)
    if not flashcore.explain(*arrays).slow:
        pytest.skip("this architecture has no fast kernels of its own")
    monkeypatch.setenv("FLASHCORE_SLOW", "error")
    with pytest.raises(RuntimeError, match="FLASHCORE_SLOW=error"):
        flashcore.attention(*arrays)
    monkeypatch.setenv("FLASHCORE_SLOW", "eror")
    with pytest.raises(ValueError, match="FLASHCORE_SLOW=eror; allowed: error, warn, allow"):
        flashcore.attention(*arrays)
