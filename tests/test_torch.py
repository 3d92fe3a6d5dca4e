"""As a drop-in for torch.nn.functional.scaled_dot_product_attention, and what torch may ask that is not served yet."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from devices import fetch, same_bits
from processes import run_python

import flashcore

torch = pytest.importorskip("torch", reason="these are PyTorch's own rules")
F = torch.nn.functional


def qkv(*shape: int, dtype: Any = torch.float32, seed: int = 42) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape or (2, 3, 9, 16), generator=generator).to(dtype) for _ in range(3)]


# Drop-in


def test_parameters_begin_with_pytorchs() -> None:
    names = list(inspect.signature(flashcore.attention).parameters)
    pytorchs = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert names[: len(pytorchs)] == pytorchs
    defaults = [p.default for p in inspect.signature(flashcore.attention).parameters.values()][3:8]
    assert defaults == [None, 0.0, False, None, False]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seqlen", [128, 256, 512])
def test_short_sequences_in_half_precision(seqlen: int, is_causal: bool) -> None:
    """The CPU's share of the nine configurations in test_gpu.py, to the same tolerance."""
    q, k, v = qkv(2, 8, seqlen, 64, dtype=torch.float16)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(flashcore.attention(q, k, v, is_causal=is_causal), want, rtol=1e-3, atol=2e-3)


def test_positional_call() -> None:
    q, k, v = qkv()
    mask = torch.randn(9, 9)
    want = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(flashcore.attention(q, k, v, mask, 0.0, False, 0.3, False), want)
    torch.testing.assert_close(
        flashcore.attention(q, k, v, None, 0.0, True), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


def test_inside_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            want = layer(x)
            calls = []

            def attention(*args: Any, **kwargs: Any) -> Any:
                calls.append(1)
                return flashcore.attention(*args, **kwargs)

            monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
            torch.testing.assert_close(layer(x), want)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert calls


def test_grouped_heads_with_or_without_the_word() -> None:
    q, _, _ = qkv(2, 6, 9, 16)
    _, k, v = qkv(2, 2, 9, 16)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(flashcore.attention(q, k, v, enable_gqa=True), want)
    assert same_bits(flashcore.attention(q, k, v), flashcore.attention(q, k, v, enable_gqa=True))


def test_views_and_memory_formats() -> None:
    x = torch.randn(2, 9, 3, 3, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = x.permute(3, 0, 2, 1, 4)  # a fused projection
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(flashcore.attention(q, k, v), want)
    torch.testing.assert_close(
        flashcore.attention(q, k[:, :1].expand_as(k), v), F.scaled_dot_product_attention(q, k[:, :1].expand_as(k), v)
    )
    half = q[..., ::2], k[..., ::2], v[..., ::2]
    torch.testing.assert_close(flashcore.attention(*half), F.scaled_dot_product_attention(*half))
    last = (t.contiguous(memory_format=torch.channels_last) for t in (q, k, v))
    torch.testing.assert_close(flashcore.attention(*last), want)


def test_parameters_and_inference_tensors() -> None:
    q, k, v = qkv()
    want = flashcore.attention(q, k, v)
    with torch.no_grad():
        out = flashcore.attention(torch.nn.Parameter(q), torch.nn.Parameter(k), torch.nn.Parameter(v))
        assert type(out) is torch.Tensor
        assert same_bits(out, want)
    with torch.inference_mode():
        assert same_bits(flashcore.attention(q.clone(), k, v), want)
    frozen = torch.nn.Parameter(q, requires_grad=False)
    assert same_bits(flashcore.attention(frozen, k, v), want)


def test_under_default_device() -> None:
    q, k, v = qkv()
    want = flashcore.attention(q, k, v)
    with torch.device("cpu"):
        assert same_bits(flashcore.attention(q, k, v), want)


def test_thread_setting_is_followed() -> None:
    q, k, v = qkv(2, 4, 200, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(flashcore.attention(q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results)


# Gradients


@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask"])
def test_a_gradient_is_never_dropped_silently(which: str) -> None:
    """The gradients themselves are tested in test_torch_autograd.py."""
    arrays = dict(zip(("query", "key", "value"), qkv(), strict=True), attn_mask=torch.zeros(9, 9))
    arrays[which].requires_grad_()
    assert flashcore.attention(**arrays).requires_grad
    with torch.no_grad():
        out = flashcore.attention(**arrays)
    assert not out.requires_grad
    assert same_bits(out, flashcore.attention(**{name: x.detach() for name, x in arrays.items()}))


def test_an_intermediate_result_requires_grad_too() -> None:
    q, k, v = qkv()
    weight = torch.ones(16, requires_grad=True)
    flashcore.attention(q * weight, k, v).sum().backward()
    assert weight.grad.any()


def test_out_that_requires_grad() -> None:
    q, k, v = qkv()
    out = torch.empty_like(q).requires_grad_()
    with pytest.raises(ValueError, match="out requires a gradient"):
        flashcore.attention(q, k, v, out=out)


# Tensors that are not what they seem


def test_autograd_sees_what_is_written_to_out() -> None:
    """What it saved is not there any more: an error, as of torch's own functions, and no wrong gradient."""
    q, k, v = qkv()
    saved, weight = torch.ones_like(q), torch.ones_like(q).requires_grad_()
    loss = (weight * saved).sum()
    flashcore.attention(q, k, v, out=saved[:])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    out = torch.empty_like(q)
    flashcore.attention(*(x.numpy() for x in (q, k, v)), out=out)
    assert out._version == 1
    with torch.inference_mode():
        flashcore.attention(q, k, v, out=torch.empty_like(q))


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
def test_a_number_that_requires_a_gradient(name: str) -> None:
    """It would get none, and never learn."""
    number = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(TypeError, match=f"{name} is a tensor that requires a gradient.*multiply query"):
        flashcore.attention(*qkv(), **{name: number})
    assert same_bits(flashcore.attention(*qkv(), scale=number.detach()), flashcore.attention(*qkv(), scale=0.5))


def test_subnormal_halves_where_floats_have_none() -> None:
    """torch may have the processor take subnormal floats for zero; halves that are subnormal make none."""
    value = torch.full((1, 1, 4, 44), 3e-5, dtype=torch.float16)
    zeros = torch.zeros(1, 1, 4, 8, dtype=torch.float16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        for view in (value[..., :11], value[..., ::4]):
            assert (flashcore.attention(zeros, zeros, view) == value[0, 0, 0, 0]).all()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:.*nested tensors.*")
def test_other_layouts() -> None:
    q, k, v = qkv()
    rows = q.reshape(-1, q.shape[-1])
    for other in (q.to_sparse(), rows.to_sparse_csr(), rows.to_sparse_bsc((2, 2)), q.to_mkldnn()):
        with pytest.raises(NotImplementedError, match=r"query has layout.*to_dense"):
            flashcore.attention(other, k, v)
        with pytest.raises(NotImplementedError, match=r"value has layout.*to_dense"):
            flashcore.attention(q, k, other)
    with pytest.raises(NotImplementedError, match=r"attn_mask has layout.*to_dense"):
        flashcore.attention(q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2]).to_sparse())
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor([q[0], q[1]], layout=layout)
        with pytest.raises(NotImplementedError, match=r"query .*nested"):
            flashcore.attention(nested, k, v)


def test_meta_tensors() -> None:
    """Shapes and dtypes without data, as PyTorch's function gives them."""
    q, k, v = qkv()
    metas = [x.to("meta") for x in (q, k, v)]
    out, lse = flashcore.attention(*metas, is_causal=True, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", q.shape, q.shape[:-1])
    for mixed in ((metas[0], k, v), (q, metas[1], v), (q, k, metas[2])):
        with pytest.raises(ValueError, match=r"query is on \w+ and \w+ on \w+; all arrays must be on one device"):
            flashcore.attention(*mixed)


def test_quantized_and_integer_tensors() -> None:
    q, k, v = (torch.ones(2, 3, 9, 16, dtype=torch.int32) for _ in range(3))
    with pytest.raises(ValueError, match="int32"):
        flashcore.attention(q, k, v)
    q, k, v = (torch.ones(2, 3, 9, 16, dtype=torch.complex64) for _ in range(3))
    with pytest.raises(ValueError, match="complex"):
        flashcore.attention(q, k, v)


def test_tensor_without_storage() -> None:
    q, k, v = qkv()
    q.untyped_storage().resize_(0)  # as FSDP frees a parameter
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        flashcore.attention(q, k, v)


def test_fetch_helper_keeps_bfloat16() -> None:
    x = qkv(dtype=torch.bfloat16)[0]
    assert (torch.from_numpy(fetch(x).astype("float32")) == x.float()).all()


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_results_lie_in_memory_as_the_query_does(order: tuple[int, ...], layout: str) -> None:
    """As PyTorch's: a model that transposed a projection's result transposes back without a copy."""
    query, key, value = (torch.randn(2, 5, 4, 16).permute(order) for _ in range(3))
    out = flashcore.attention(query, key, value, layout=layout)
    assert out.shape == query.shape
    assert out.stride() == torch.empty_like(query).stride()
    plain = flashcore.attention(*(x.contiguous() for x in (query, key, value)), layout=layout)
    assert same_bits(out.contiguous(), plain)
    packed = torch.randn(2, 5, 4, 48)  # a fused projection's result, of which these are views
    views = [x if layout == "bshd" else x.transpose(1, 2) for x in packed.split(16, dim=-1)]
    out = flashcore.attention(*views, layout=layout)
    assert out.is_contiguous() == (layout == "bshd")
    assert (out if layout == "bshd" else out.transpose(1, 2)).is_contiguous()


# empty_like without its dispatcher, where torch has it (csrc/python/result.c)


QUERIES = {
    "contiguous": lambda dtype: torch.randn(2, 3, 5, 16).to(dtype),
    "heads inside": lambda dtype: torch.randn(2, 5, 3, 16).to(dtype).transpose(1, 2),
    "columns first": lambda dtype: torch.randn(2, 3, 16, 5).to(dtype).transpose(2, 3),
    "with gaps": lambda dtype: torch.randn(2, 3, 5, 20).to(dtype)[..., :16],
    "expanded": lambda dtype: torch.randn(1, 3, 5, 16).to(dtype).expand(2, 3, 5, 16),
    "of one row": lambda dtype: torch.randn(1, 3, 1, 16).to(dtype).as_strided((1, 3, 1, 16), (48, 16, 5, 1)),
    "of no rows": lambda dtype: torch.randn(2, 3, 0, 16).to(dtype),
    "parameter": lambda dtype: torch.nn.Parameter(torch.randn(2, 3, 5, 16).to(dtype), requires_grad=False),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", QUERIES)
def test_results_are_as_empty_like_makes_them(name: str, dtype: Any) -> None:
    query = QUERIES[name](dtype)
    key, value = (torch.randn(2, 3, 7, 16).to(dtype)[: query.shape[0]] for _ in range(2))
    like = torch.empty_like(query)
    with torch.inference_mode():
        assert flashcore.attention(query, key, value).is_inference()
    out = flashcore.attention(query, key, value)
    assert type(out) is torch.Tensor
    assert (out.shape, out.stride(), out.dtype, out.device) == (like.shape, like.stride(), like.dtype, like.device)
    assert (out.requires_grad, out.is_inference(), out._version) == (False, False, 0)


@pytest.mark.parametrize("broken", ["missing", "raises", "another", "counted"])
def test_whatever_the_private_functions_do(broken: str) -> None:
    code = f"""
import torch, flashcore
guards = torch._C._dynamo.guards
real, calls = guards._empty_strided_cpu, []
def raises(*args): raise RuntimeError("no")
for name in ("_empty_strided_cpu", "_empty_strided_cuda"):
    if {broken!r} == "missing": delattr(guards, name)
    else: setattr(guards, name, raises if {broken!r} == "raises" else lambda *args: 5)
if {broken!r} == "counted": guards._empty_strided_cpu = lambda *args: calls.append(args) or real(*args)
q = torch.randn(2, 3, 4, 16).transpose(1, 2)
out = flashcore.attention(q, q, q)
assert out.stride() == q.stride()
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
assert len(calls) == ({broken!r} == "counted")
"""
    run_python(code)
