"""flashcore in the place of PyTorch's scaled_dot_product_attention: install(), PyTorch's registry, its bias objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from devices import same_bits

import flashcore

torch = pytest.importorskip("torch", reason="this is about PyTorch's function")
F = torch.nn.functional
ft = pytest.importorskip("flashcore.torch")
from torch.nn import attention as torch_attention  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.attention.bias import causal_lower_right, causal_upper_left  # noqa: E402

PYTORCHS = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    assert F.scaled_dot_product_attention is PYTORCHS
    assert torch_attention.current_flash_attention_impl() is None
    torch._dynamo.reset()


def qkv(rows: int = 9, keys: int = 9, dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(42)
    shapes = ((2, 4, rows, 16), (2, 4, keys, 16), (2, 4, keys, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# install()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What PyTorch's function was called for, "pytorch" each; install() takes this one for PyTorch's."""
    seen: list[str] = []

    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        seen.append("pytorch")
        return PYTORCHS(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    yield seen
    monkeypatch.undo()


def test_install_and_put_back(calls: list[str]) -> None:
    q, k, v = qkv()
    mask = torch.randn(9, 9)
    want = flashcore.attention(q, k, v, mask, scale=0.3)
    before = F.scaled_dot_product_attention
    with ft.install() as installed:
        assert F.scaled_dot_product_attention is not before
        assert same_bits(F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.3), want)
        assert same_bits(F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, scale=0.3), want)
        with ft.install(fallback=True):
            assert same_bits(F.scaled_dot_product_attention(q, k, v, mask, scale=0.3), want)
    assert F.scaled_dot_product_attention is before
    installed.remove()  # a second time
    assert calls == []
    F.scaled_dot_product_attention(q, k, v)
    assert calls == ["pytorch"]


def test_a_module_under_install_trains(calls: list[str]) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    parameters = list(layer.parameters())
    want = torch.autograd.grad(layer(x).square().sum(), parameters)
    calls.clear()
    with ft.install():
        ours = torch.autograd.grad(layer(x).square().sum(), parameters)
    assert calls == []
    for one, other in zip(ours, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_remove_out_of_order() -> None:
    installed = ft.install()
    other = lambda *args: None  # noqa: E731
    ours, F.scaled_dot_product_attention = F.scaled_dot_product_attention, other
    with pytest.raises(RuntimeError, match=r"is <function .*lambda.*undo that replacement first"):
        installed.remove()
    F.scaled_dot_product_attention = ours
    installed.remove()


def test_a_kernel_context_without_flash_goes_to_pytorch(calls: list[str]) -> None:
    q, k, v = qkv()
    with ft.install():
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.2)
        assert calls == ["pytorch"]
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            ours = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
    assert calls == ["pytorch"]
    assert same_bits(ours, flashcore.attention(q, k, v, is_causal=True, scale=0.2))
    torch.testing.assert_close(out, ours)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_not_served_is_an_error_unless_asked(calls: list[str]) -> None:
    q, k, v = qkv()
    lists = [torch.nested.nested_tensor(list(x.transpose(1, 2)), layout=torch.jagged) for x in (q, k, v)]
    nested = [x.transpose(1, 2) for x in lists]
    with ft.install(), pytest.raises(NotImplementedError, match=r"query has layout torch.jagged.*pad a nested tensor"):
        F.scaled_dot_product_attention(*nested)
    assert calls == []
    with ft.install(fallback=True):
        with pytest.warns(
            ft.FallbackWarning, match=r"PyTorch's .* serves a call: query has layout torch.jagged"
        ) as caught:
            for _ in range(3):  # one warning for a reason
                F.scaled_dot_product_attention(*nested)
        (warning,) = (each for each in caught if each.category is ft.FallbackWarning)
        assert warning.filename == __file__
        assert calls == ["pytorch"] * 3
        with pytest.raises(ValueError, match="attn_mask has shape"):  # wrong is wrong, whoever serves it
            F.scaled_dot_product_attention(q, k, v, torch.zeros(3, 3))
    assert calls == ["pytorch"] * 3


def test_a_head_dim_that_no_kernel_serves_goes_to_pytorch_if_asked() -> None:
    x = torch.randn(1, 2, 4, 320)
    with ft.install(fallback=True), pytest.warns(ft.FallbackWarning, match="head_dim is 320"):
        ours = F.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(x, x, x))
    with pytest.raises(NotImplementedError, match="head_dim is 320; allowed: 1 to 256"):
        flashcore.attention(x, x, x)


def test_compiled_under_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.torch import _call

    def refuse(*arguments: Any) -> None:
        raise NotImplementedError("no such call yet")

    q, k, v = qkv()
    with ft.install():
        function = torch.compile(
            lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), backend="aot_eager", fullgraph=True
        )
        assert same_bits(function(q, k, v), flashcore.attention(q, k, v, is_causal=True))
    monkeypatch.setattr(_call, "fold_call", refuse)
    with ft.install(fallback=True):
        function = torch.compile(
            lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), backend="aot_eager", fullgraph=True
        )
        with pytest.warns(ft.FallbackWarning, match="no such call yet"):
            torch.testing.assert_close(function(q, k, v), flashcore.attention(q, k, v, is_causal=True))


# PyTorch's registry


@pytest.fixture
def active() -> Iterator[None]:
    torch_attention.activate_flash_attention_impl("flashcore")
    yield
    torch_attention.restore_flash_attention_impl()


def gradients(function: Any, *arrays: Any, **options: Any) -> list[Any]:
    inputs = [x.detach().requires_grad_() for x in arrays]
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("mask", "is_causal"), [(None, False), (None, True), ("bool", False), ("float", False)])
def test_registry(active: None, dtype: Any, mask: Any, is_causal: bool) -> None:
    arrays = qkv(9, 11, dtype=dtype)
    given = {None: None, "bool": torch.ones(9, 11, dtype=torch.bool).tril(3), "float": torch.randn(9, 11).to(dtype)}[
        mask
    ]
    options = {"attn_mask": given, "is_causal": is_causal, "scale": 0.3}
    ours = gradients(F.scaled_dot_product_attention, *arrays, **options)
    for one, other in zip(ours, gradients(flashcore.attention, *arrays, **options), strict=True):
        if mask == "bool":  # which PyTorch makes a float mask of
            torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        else:
            assert same_bits(one, other)


def test_registry_is_left_again() -> None:
    arrays = qkv()
    with torch.no_grad():
        want = F.scaled_dot_product_attention(*arrays)
        assert "flashcore" in torch_attention.list_flash_attention_impls()
        torch_attention.activate_flash_attention_impl("flashcore")
        assert torch_attention.current_flash_attention_impl() == "flashcore"
        ours = F.scaled_dot_product_attention(*arrays)
        torch_attention.restore_flash_attention_impl()
        assert same_bits(ours, flashcore.attention(*arrays))
        assert same_bits(F.scaled_dot_product_attention(*arrays), want)


def test_registry_keeps_the_operators_strides(active: None) -> None:
    """Compiled code takes an operator's result to lie in memory as its fake kernel says."""
    for arrays in (qkv(), [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv()]):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*arrays)
        assert same_bits(lse, flashcore.attention(*arrays, return_lse=True)[1])
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(out, *arrays, out, lse, 0.0, False)
        metas = [x.to("meta") for x in arrays]
        meta = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*metas)
        metas = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(meta[0], *metas, *meta, 0.0, False)
        assert [x.stride() for x in (out, lse, *grads)] == [x.stride() for x in (*meta, *metas)]


def test_registry_on_a_gpu_speaks_the_operators_language() -> None:
    """What would run for aten::_scaled_dot_product_flash_attention there, here on CPU tensors."""
    from flashcore.torch import _registry

    q, k, v = qkv(9, 11)
    out, lse, *rest = _registry._cuda(q, k, v, 0.0, True, False, scale=0.2)
    want, want_lse = flashcore.attention(q, k, v, is_causal="lower_right", scale=0.2, return_lse=True)
    assert same_bits(out, want)
    assert same_bits(lse, want_lse)
    assert rest[:4] == [None, None, 9, 11]
    assert len(rest) == 7
    nothing = (None, None, 9, 11, 0.0, True, None, None)
    gradients = _registry._cuda_backward(torch.ones_like(out), q, k, v, out, lse, *nothing, scale=0.2)
    arrays = [x.requires_grad_() for x in (q, k, v)]
    again = flashcore.attention(*arrays, is_causal="lower_right", scale=0.2)
    for one, other in zip(gradients, torch.autograd.grad(again.sum(), arrays), strict=True):
        assert same_bits(one, other)


# torch.nn.attention.bias


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_bias_objects(make: Any, layout: str) -> None:
    q, k, v = qkv(9, 11)
    bias = make(9, 11)
    want = PYTORCHS(q, k, v, bias)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        want = want.transpose(1, 2)
    torch.testing.assert_close(flashcore.attention(q, k, v, bias, layout=layout), want)
    function = torch.compile(
        lambda q: flashcore.attention(q, k, v, bias, layout=layout), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(function(q), want)
    out = torch.empty_like(want)
    assert flashcore.attention(q, k, v, bias, layout=layout, out=out) is out


def test_gradients_through_bias_objects() -> None:
    arrays, bias = qkv(9, 11), causal_lower_right(9, 11)
    ours = gradients(flashcore.attention, *arrays, attn_mask=bias)
    for one, other in zip(ours, gradients(flashcore.attention, *arrays, is_causal="lower_right"), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        ((9, 9), {}, r"CausalBias of 9 rows and 9 keys; the call has \(9, 11\)"),
        ((9, 11), {"is_causal": True}, "which says all of causality, and is_causal is True"),
        ((9, 11), {"window": (1, 1)}, r"window \(1, 1\).*one or the other"),
        ((9, 11), {"diagonal": 2}, "diagonal 2; give one"),
    ],
)
def test_refusals_of_bias_objects(size: tuple[int, int], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        flashcore.attention(*qkv(9, 11), causal_upper_left(*size), **options)


def test_a_query_of_another_kind_beside_a_bias_object() -> None:
    q, k, v = (np.asarray(x) for x in qkv())
    with pytest.raises(NotImplementedError, match="attn_mask is a tensor that torch's dispatcher must see"):
        flashcore.attention(q, k, v, causal_upper_left(9, 9))
