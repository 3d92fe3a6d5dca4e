"""Gradients of GPU tensors, and PyTorch's compilers and graphs around them. What the numbers are, test_backward.py says
of every kernel; here is that they arrive: on the right stream, in a capture, through the op, in each input's form.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from devices import same_bits

import flashcore

torch = pytest.importorskip("torch", reason="these are PyTorch's gradients")
F = torch.nn.functional

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _quiet_and_clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the warning that the backward is slow; an error left in the stream fails the test that made it."""
    monkeypatch.setenv("FLASHCORE_SLOW", "allow")
    torch._dynamo.reset()
    yield
    torch.cuda.synchronize()
    torch._dynamo.reset()


def tensors(*shapes: tuple[int, ...], dtype: Any = torch.float16, seed: int = 42) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(s, generator=generator, device="cuda").to(dtype).requires_grad_() for s in shapes]


def qkv(rows: int = 200, keys: int = 200, dtype: Any = torch.float16, seed: int = 42) -> list[Any]:
    return tensors((2, 4, rows, 64), (2, 2, keys, 64), (2, 2, keys, 64), dtype=dtype, seed=seed)


def gradients(function: Callable[..., Any], arrays: list[Any], dout: Any, dtype: Any, device: str) -> list[Any]:
    arrays = [x.detach().to(device, dtype).requires_grad_() for x in arrays]
    out = function(*arrays)
    return [x.double().cpu() for x in torch.autograd.grad(out, arrays, dout.to(device, dtype))]


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # the math backend's, in autograd's thread
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_sdpas(dtype: Any, is_causal: bool) -> None:
    """The largest error at most twice that of PyTorch's own, both measured from its float64 result."""
    arrays, (dout,) = qkv(dtype=dtype), tensors((2, 4, 200, 64), dtype=dtype, seed=7)
    theirs = lambda *x: F.scaled_dot_product_attention(*x, is_causal=is_causal, enable_gqa=True)  # noqa: E731
    exact = gradients(theirs, arrays, dout, torch.float64, "cpu")
    theirs_found = gradients(theirs, arrays, dout, dtype, "cuda")
    ours_found = gradients(lambda *x: flashcore.attention(*x, is_causal=is_causal), arrays, dout, dtype, "cuda")
    for name, right, their, our in zip("qkv", exact, theirs_found, ours_found, strict=True):
        assert (our - right).abs().max() <= 2 * (their - right).abs().max() + 1e-7, f"d{name}"


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (30, 5), "diagonal": "lower_right"},
    "softcap": {"softcap": 2.0, "scale": 0.2},
    "layout": {"layout": "bshd"},
}


@pytest.mark.parametrize("name", [*OPTIONS, "mask", "sinks", "lse", "broadcast"])
def test_options_are_the_cpus(name: str) -> None:
    options = OPTIONS.get(name, {})
    arrays = qkv(150, 170, torch.float32)
    if name == "layout":
        arrays = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in arrays]
    if name == "broadcast":
        arrays = [arrays[0], *(x.detach()[:1].requires_grad_() for x in arrays[1:])]
    if name in ("mask", "sinks"):
        arrays += tensors((1, 4, 150, 170) if name == "mask" else (4,), dtype=torch.float32, seed=3)

    def call(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        given = {"mask": "attn_mask", "sinks": "sinks"}
        named = dict(zip([given[name]], rest, strict=True)) if rest else {}
        out, lse = flashcore.attention(q, k, v, **options, **named, return_lse=True)
        return out + lse.unsqueeze(-1) if name == "lse" else out

    (dout,) = tensors(tuple(call(*arrays).shape), dtype=torch.float32, seed=7)
    exact = gradients(call, arrays, dout, torch.float64, "cpu")
    found = gradients(call, arrays, dout, torch.float32, "cuda")
    for right, our in zip(exact, found, strict=True):
        torch.testing.assert_close(our, right, rtol=2e-5, atol=2e-5 * right.abs().max().item())


def test_dout_of_any_strides_and_results_of_the_inputs() -> None:
    q, k, v = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv())
    out = flashcore.attention(q, k, v)
    dout = torch.randn((*out.shape[:-1], 128), device="cuda", dtype=out.dtype)[..., ::2]
    ours = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    assert [x.stride() for x in ours] == [x.stride() for x in (q, k, v)]
    assert all(same_bits(x, y) for x, y in zip(ours, torch.autograd.grad(out, (q, k, v), dout.clone()), strict=True))


def test_a_stream_of_its_own() -> None:
    """Autograd runs the backward on the forward's stream, in another thread."""
    arrays = qkv()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        scaled = [x * 2 for x in arrays]  # late, and only this stream knows
        found = torch.autograd.grad(flashcore.attention(*scaled).float().square().sum(), scaled)
    stream.synchronize()
    doubled = [(x.detach() * 2).requires_grad_() for x in arrays]
    right = torch.autograd.grad(flashcore.attention(*doubled).float().square().sum(), doubled)
    assert all(same_bits(x, y) for x, y in zip(found, right, strict=True))


def test_memory_of_the_backward() -> None:
    """The gradients, and a few bytes a row; all of it in PyTorch's allocator, and given back."""
    q, k, v = tensors((1, 2, 8192, 64), (1, 2, 8192, 64), (1, 2, 8192, 64))
    out = flashcore.attention(q, k, v)
    dout = torch.randn_like(out)
    torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    torch.cuda.synchronize()
    before, size = torch.cuda.memory_allocated(), out.numel() * out.element_size()
    torch.cuda.reset_peak_memory_stats()
    found = torch.autograd.grad(out, (q, k, v), dout)
    assert torch.cuda.max_memory_allocated() - before <= 3 * size + 2 * 8192 * 16
    assert torch.cuda.memory_allocated() - before <= 3 * size
    del found


def test_a_slow_backward_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_SLOW", "error")
    with pytest.raises(RuntimeError, match=r"FLASHCORE_SLOW=error.*gradients on GPUs come from portable kernels"):
        flashcore.attention(*qkv()).sum().backward()
    monkeypatch.setenv("FLASHCORE_SLOW", "allow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flashcore.attention(*qkv()).sum().backward()


def test_autocast() -> None:
    arrays = qkv(dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = flashcore.attention(*arrays)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out.float().sum(), arrays)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in found)


# The op, compilers and graphs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck() -> None:
    import flashcore.torch  # noqa: F401  registers the op

    arrays = tuple(qkv(40, 50))
    torch.library.opcheck(torch.ops.flashcore.attention.default, arrays, {"is_causal": True})


def test_a_graph_of_forward_and_backward() -> None:
    fixed = [x.detach() for x in qkv()]

    def step() -> tuple[Any, ...]:
        arrays = [x.detach().requires_grad_() for x in fixed]  # leaves of this step's stream, as autograd likes them
        out = flashcore.attention(*arrays, is_causal=True)
        return out, *torch.autograd.grad(out.float().square().sum(), arrays)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        for array, fresh in zip(fixed, qkv(seed=seed), strict=True):
            array.copy_(fresh.detach())
        graph.replay()
        assert all(same_bits(x, y) for x, y in zip(captured, step(), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole_and_once(mode: str) -> None:
    """No graph break, one compilation more for all other lengths, gradients as without; under CUDA graphs too."""
    counter = torch._dynamo.utils.counters
    counter.clear()

    def model(q: Any, k: Any, v: Any) -> Any:
        return flashcore.attention(q * 1.5, k, v, is_causal=True) + 1

    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for rows in (64, 96, 160):
        arrays = qkv(rows, rows, torch.float32)
        for _ in range(3):  # warm up, record, replay
            torch.compiler.cudagraph_mark_step_begin()
            ours = compiled(*arrays)
            found = torch.autograd.grad(ours.square().sum(), arrays)
        plain = model(*arrays)
        torch.testing.assert_close(ours, plain)
        right = torch.autograd.grad(plain.square().sum(), arrays)
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert counter["stats"]["unique_graphs"] == 2


def test_pytorchs_registry() -> None:
    attention = pytest.importorskip("torch.nn.attention")
    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("torch 2.11 brought the registry")
    import flashcore.torch

    arrays, (dout,) = qkv(), tensors((2, 4, 200, 64), seed=7)
    attention.activate_flash_attention_impl("flashcore")
    try:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*arrays, is_causal=True, enable_gqa=True)
            found = torch.autograd.grad(out, arrays, dout)
    finally:
        attention.restore_flash_attention_impl()
    ours = flashcore.attention(*arrays, is_causal=True)
    assert same_bits(out.detach(), ours.detach())
    assert all(same_bits(x, y) for x, y in zip(found, torch.autograd.grad(ours, arrays, dout), strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_installed_in_the_place_of_sdpa() -> None:
    import flashcore.torch

    arrays = qkv()
    ours = torch.autograd.grad(flashcore.attention(*arrays).float().sum(), arrays)
    with flashcore.torch.install():
        found = torch.autograd.grad(F.scaled_dot_product_attention(*arrays, enable_gqa=True).float().sum(), arrays)
    assert all(same_bits(x, y) for x, y in zip(found, ours, strict=True))
