"""Gradients of flashcore.attention on CPU tensors: against finite differences, against SDPA's, and what is refused."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import same_bits

import flashcore

torch = pytest.importorskip("torch", reason="these are PyTorch's gradients")
F = torch.nn.functional


def tensors(*shapes: tuple[int, ...], dtype: Any = torch.float64, seed: int = 42) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def qkv(
    heads_q: int = 2, heads_kv: int = 2, rows: int = 4, keys: int = 5, dtype: Any = torch.float64, batch: int = 2
) -> list[Any]:
    return tensors((batch, heads_q, rows, 3), (batch, heads_kv, keys, 3), (batch, heads_kv, keys, 2), dtype=dtype)


# Against finite differences

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal_lower_right": {"is_causal": "lower_right"},
    "window": {"window": (1, 2)},
    "window_one_side": {"window": (None, 1)},
    "diagonal": {"is_causal": True, "diagonal": 1},
    "diagonal_lower_right": {"window": [0, -1], "diagonal": "lower_right"},
    "softcap": {"softcap": 0.8},
    "scale": {"scale": -0.7},
    "scale_zero": {"scale": 0},
    "everything": {"is_causal": "lower_right", "window": (3, -1), "softcap": 1.5, "scale": 0.9},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    assert torch.autograd.gradcheck(lambda *x: flashcore.attention(*x, **OPTIONS[name]), qkv())


@pytest.mark.parametrize("name", [*OPTIONS, "mask", "slopes", "sinks"])
def test_results_have_the_bits_of_a_plain_call(name: str) -> None:
    """Finite differences do not see an option that is lost on the way both there and back."""
    arrays = {"mask": {"attn_mask": torch.randn(4, 5)}, "slopes": {"alibi_slopes": torch.tensor([0.5, 0.1])}}
    arrays |= {"sinks": {"sinks": torch.tensor([0.3, 1.0])}}
    options = OPTIONS[name] if name in OPTIONS else arrays[name]
    q, k, v = qkv(dtype=torch.float32)
    out, lse = flashcore.attention(q, k, v, **options, return_lse=True)
    with torch.no_grad():
        plain, plain_lse = flashcore.attention(q, k, v, **options, return_lse=True)
    assert type(out) is torch.Tensor
    assert out.requires_grad
    assert lse.requires_grad
    assert same_bits(out.detach(), plain)
    assert same_bits(lse.detach(), plain_lse)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (1, 3)])
def test_grouped_heads(heads: tuple[int, int]) -> None:
    assert torch.autograd.gradcheck(flashcore.attention, qkv(*heads))


@pytest.mark.parametrize(
    "shape", [(5,), (4, 5), (4, 1), (2, 1, 5), (2, 4, 5), (1, 1, 4, 5), (2, 1, 1, 5), (2, 2, 4, 5)]
)
def test_mask(shape: tuple[int, ...]) -> None:
    """Its gradient has its own shape, whatever it was broadcast to."""
    (mask,) = tensors(shape, seed=1)
    assert torch.autograd.gradcheck(lambda *x: flashcore.attention(*x, is_causal="lower_right"), (*qkv(), mask))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 4)])
def test_sinks(shape: tuple[int, ...]) -> None:
    (sinks,) = tensors(shape, seed=2)
    assert torch.autograd.gradcheck(lambda q, k, v, s: flashcore.attention(q, k, v, sinks=s), (*qkv(4, 2), sinks))


def test_bool_mask_and_slopes() -> None:
    mask = torch.ones(4, 5, dtype=torch.bool).tril(1)
    slopes = torch.tensor([0.5, 0.1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: flashcore.attention(*x, mask, alibi_slopes=slopes), qkv())


@pytest.mark.parametrize("which", ["both", "out", "lse"])
def test_lse(which: str) -> None:
    (mask, sinks) = tensors((4, 5), (2,), seed=3)

    def call(q: Any, k: Any, v: Any, mask: Any, sinks: Any) -> Any:
        out, lse = flashcore.attention(q, k, v, mask, sinks=sinks, is_causal=True, return_lse=True)
        return {"both": (out, lse), "out": out, "lse": lse}[which]

    assert torch.autograd.gradcheck(call, (*qkv(), mask, sinks))


def test_an_unused_result_costs_the_backward_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcore.torch import _call

    seen: list[Any] = []

    def backward_by_op(saved: Any, dout: Any, dlse: Any, *others: Any) -> Any:
        seen.append((dout is None, dlse is None))
        return original(saved, dout, dlse, *others)

    original = _call.backward_by_op
    monkeypatch.setattr(_call, "backward_by_op", backward_by_op)
    q, k, v = qkv()
    for which in (0, 1):
        result = flashcore.attention(q, k, v, return_lse=True)[which]
        torch.autograd.grad(result.sum(), q, create_graph=True)  # goes by the op
    assert seen == [(False, True), (True, False)]


def test_layout() -> None:
    q, k, v = tensors((2, 4, 3, 3), (2, 5, 3, 3), (2, 5, 3, 2))
    call: Callable[..., Any] = lambda *x: flashcore.attention(*x, layout="bshd", is_causal=True, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v))
    assert call(q, k, v)[0].is_contiguous()


SHAPES = {
    "two_dimensions": ((4, 3), (5, 3), (5, 2)),
    "three_dimensions": ((2, 4, 3), (2, 5, 3), (2, 5, 2)),
    "five_dimensions": ((2, 3, 2, 4, 3), (2, 3, 2, 5, 3), (2, 3, 2, 5, 2)),
    "broadcast_batch": ((3, 2, 4, 3), (1, 2, 5, 3), (2, 5, 2)),
    "broadcast_batch_of_four": ((3, 2, 4, 3), (1, 2, 5, 3), (3, 2, 5, 2)),
    "broadcast_batches_that_do_not_fold": ((2, 1, 2, 4, 3), (1, 3, 2, 5, 3), (3, 2, 5, 2)),
    "broadcast_heads": ((2, 1, 4, 3), (2, 3, 5, 3), (2, 1, 5, 2)),
    "broadcast_heads_of_key": ((2, 3, 4, 3), (2, 1, 5, 3), (2, 3, 5, 2)),
}


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, layout: str) -> None:
    arrays = tensors(*SHAPES[name])
    if layout == "bshd":
        arrays = [(x.detach().transpose(-2, -3) if x.ndim > 2 else x.detach()).requires_grad_() for x in arrays]
    out, lse = flashcore.attention(*arrays, layout=layout, return_lse=True)
    with torch.no_grad():
        plain, plain_lse = flashcore.attention(*arrays, layout=layout, return_lse=True)
    assert out.shape == plain.shape
    assert lse.shape == plain_lse.shape
    assert same_bits(out.detach(), plain)
    assert same_bits(lse.detach(), plain_lse)
    assert torch.autograd.gradcheck(lambda *x: flashcore.attention(*x, layout=layout, return_lse=True), arrays)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 5), (3, 1, 4, 5), (1, 1, 2, 4, 5), (2, 3, 2, 4, 5)])
def test_mask_over_two_batch_dimensions(shape: tuple[int, ...]) -> None:
    arrays = tensors((2, 3, 2, 4, 3), (2, 3, 2, 5, 3), (2, 3, 2, 5, 2), shape)
    assert torch.autograd.gradcheck(flashcore.attention, arrays)


@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask", "sinks"])
def test_one_gradient_alone(which: str) -> None:
    q, k, v = qkv()
    mask, sinks = tensors((4, 5), (2,))
    names = ["query", "key", "value", "attn_mask", "sinks"]
    arrays = dict(zip(names, (q, k, v, mask, sinks), strict=True))
    whole = torch.autograd.grad(flashcore.attention(**arrays).square().sum(), arrays.values())
    alone = {name: x if name == which else x.detach() for name, x in arrays.items()}
    flashcore.attention(**alone).square().sum().backward()
    assert same_bits(arrays[which].grad, whole[names.index(which)])


def test_rows_that_see_no_key() -> None:
    q, k, v = qkv()
    out, lse = flashcore.attention(q, k, v, window=(0, 0), diagonal=-2, return_lse=True)
    assert lse.isneginf().any()
    (out.sum() + lse.sum()).backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert not q.grad[:, :, :2].any()


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"rows": 0}, {"keys": 0}])
def test_nothing_to_attend(sizes: dict[str, int]) -> None:
    q, k, v = qkv(**sizes)
    flashcore.attention(q, k, v).sum().backward()
    for x in (q, k, v):
        assert x.grad.shape == x.shape
        assert not x.grad.any()


# Against SDPA


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_sdpas(dtype: Any, is_causal: bool) -> None:
    """The largest error at most twice that of PyTorch's own, both measured from its float64 result."""
    arrays = tensors((2, 4, 65, 32), (2, 4, 65, 32), (2, 4, 65, 32), dtype=dtype)
    (dout,) = (x.detach() for x in tensors((2, 4, 65, 32), dtype=dtype, seed=7))

    def gradients(function: Any, dtype: Any) -> list[Any]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in arrays]
        function(*inputs, is_causal=is_causal).backward(dout.to(dtype))
        return [x.grad.double() for x in inputs]

    exact = gradients(F.scaled_dot_product_attention, torch.float64)
    theirs = gradients(F.scaled_dot_product_attention, dtype)
    ours = gradients(flashcore.attention, dtype)
    for name, right, their, our in zip("qkv", exact, theirs, ours, strict=True):
        assert (our - right).abs().max() <= 2 * (their - right).abs().max() + 1e-7, f"d{name}"


def test_mask_and_grouped_heads_are_sdpas() -> None:
    arrays = tensors((2, 6, 33, 16), (2, 2, 47, 16), (2, 2, 47, 24), (2, 1, 33, 47), dtype=torch.float32)
    (dout,) = tensors((2, 6, 33, 24), dtype=torch.float32, seed=8)
    ours = torch.autograd.grad(flashcore.attention(*arrays), arrays, dout)
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*arrays, enable_gqa=True), arrays, dout)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_module_trains() -> None:
    """Some steps of a small encoder, with SDPA and with flashcore.attention in its place."""

    def losses(attention: Any) -> list[float]:
        torch.manual_seed(0)
        project, out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        parameters = [*project.parameters(), *out.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        x = torch.randn(4, 10, 16)
        found = []
        for _ in range(20):
            q, k, v = project(x).view(4, 10, 3, 2, 8).permute(2, 0, 3, 1, 4)
            y = attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            loss = (out(y) - x.roll(1, dims=1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ours = losses(flashcore.attention)
    assert ours[-1] < 0.95 * ours[0]
    np.testing.assert_allclose(ours, losses(F.scaled_dot_product_attention), rtol=1e-5)


# What comes back, and what it holds


@pytest.mark.parametrize("strides", ["expanded", "transposed", "sliced", "flipped"])
def test_strides_of_dout(strides: str) -> None:
    q, k, v = qkv()
    out = flashcore.attention(q, k, v)
    if strides == "expanded":
        dout = torch.ones((), dtype=out.dtype).expand_as(out)
    elif strides == "transposed":
        dout = torch.randn(*out.transpose(1, 3).shape, dtype=out.dtype).transpose(1, 3)
    elif strides == "sliced":
        dout = torch.randn(*out.shape[:-1], 4, dtype=out.dtype)[..., ::2]
    else:
        dout = torch.complex(torch.zeros_like(out), torch.randn_like(out)).conj().imag  # negated lazily
        assert dout.is_neg()
    ours = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    plain = torch.autograd.grad(out, (q, k, v), dout.resolve_neg().contiguous().clone())
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_strides_of_inputs() -> None:
    """Views of a fused projection, expanded keys, and a mask that PyTorch expanded."""
    (x, key, mask) = tensors((2, 4, 3, 2, 3), (1, 2, 5, 3), (1, 5))

    def call(x: Any, key: Any, mask: Any) -> Any:
        query = x.permute(2, 0, 3, 1, 4)[0]
        return flashcore.attention(query, key.expand(2, 2, 5, 3), key.expand(2, -1, -1, -1), mask.expand(2, 2, 4, 5))

    assert torch.autograd.gradcheck(call, (x, key, mask))


def test_saved_tensors() -> None:
    """The inputs, the result and lse: nothing that grows with the square of the length, and no copies."""
    q, k, v = qkv(dtype=torch.float32)
    mask, sinks = tensors((4, 5), (2,), dtype=torch.float32)
    saved: list[Any] = []

    def pack(x: Any) -> Any:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = flashcore.attention(q, k, v, mask, sinks=sinks, return_lse=True)
    places = {x.data_ptr() for x in saved}
    assert places == {x.data_ptr() for x in (q, k, v, mask, sinks, out, lse)}
    assert len(saved) == 7


def test_an_input_that_was_changed_since() -> None:
    q, k, v = qkv()
    out = flashcore.attention(q, k * 1, v)
    with torch.no_grad():
        q.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_twice_through_one_graph() -> None:
    q, k, v = qkv()
    loss = flashcore.attention(q, k, v).square().sum()
    first = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
    second = torch.autograd.grad(loss, (q, k, v))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_operands_of_other_kinds() -> None:
    q, k, v = qkv()
    mask = np.random.default_rng(1).standard_normal((4, 5))
    sinks = np.array([0.5, -0.5])
    flashcore.attention(q, k, v, mask, sinks=sinks).sum().backward()
    plain = [x.detach().requires_grad_() for x in (q, k, v)]
    flashcore.attention(*plain, torch.from_numpy(mask), sinks=torch.from_numpy(sinks)).sum().backward()
    assert all(same_bits(x.grad, y.grad) for x, y in zip((q, k, v), plain, strict=True))


@pytest.mark.uninstrumented
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read the process's memory")
def test_memory_does_not_grow() -> None:
    """Less over 1,000 steps than one of a step's arrays (16 KiB) in fifty."""
    q, k, v = tensors((1, 2, 64, 32), (1, 2, 64, 32), (1, 2, 64, 32), dtype=torch.float32)
    mask, sinks = tensors((64, 64), (2,), dtype=torch.float32)

    def resident() -> int:
        gc.collect()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    growths = []
    for _ in range(3):  # the first round fills pools and caches
        before = resident()
        for _ in range(1000):
            out, lse = flashcore.attention(q, k, v, mask, sinks=sinks, return_lse=True)
            torch.autograd.grad(out.sum() + lse.sum(), (q, k, v, mask, sinks))
        growths.append(resident() - before)
    assert min(growths) < 20 * (16 << 10), f"bytes per round: {growths}"


# The op


OP_CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "plain": (((2, 4, 7, 8), (2, 2, 9, 8), (2, 2, 9, 6)), {}),
    "options": (((2, 2, 7, 8), (2, 2, 9, 8), (2, 2, 9, 6)), {"is_causal": True, "window": [2, -1], "softcap": 3.0}),
    "layout": (((2, 7, 4, 8), (2, 9, 2, 8), (2, 9, 2, 6)), {"layout": "bshd", "diagonal": 2, "scale": 0.5}),
    "mask": (((2, 2, 7, 8), (2, 2, 9, 8), (2, 2, 9, 6), (1, 1, 7, 9)), {}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", OP_CALLS)
def test_opcheck(name: str) -> None:
    import flashcore.torch  # noqa: F401  registers the op

    shapes, options = OP_CALLS[name]
    torch.library.opcheck(torch.ops.flashcore.attention.default, tuple(tensors(*shapes)), options)


def test_opcheck_of_the_backward() -> None:
    import flashcore.torch  # noqa: F401

    q, k, v = (x.detach() for x in qkv())
    sinks = torch.zeros(1, 2, dtype=q.dtype)
    for seed, options in ((None, {}), (torch.tensor([3, 4]), {"dropout_p": 0.5})):
        out, lse = torch.ops.flashcore.attention(q, k, v, None, None, sinks, seed, **options)
        for wanted in ([True, True, True, False, False, True], [False, True, False, False, False, False]):
            arguments = (q, k, v, None, None, sinks, seed, out, lse, torch.ones_like(out), None, wanted)
            torch.library.opcheck(torch.ops.flashcore.attention_backward.default, arguments, options)


# Refusals


def test_second_derivatives() -> None:
    q, k, v = qkv()
    (dq,) = torch.autograd.grad(flashcore.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivatives.*create_graph.*SDPBackend.MATH"):
        dq.sum().backward()


def test_gradient_of_slopes() -> None:
    q, k, v = qkv()
    slopes = torch.tensor([0.5, 0.1], dtype=q.dtype, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"alibi_slopes requires a gradient.*detach.*attn_mask"):
        flashcore.attention(q, k, v, alibi_slopes=slopes)
    flashcore.attention(q, k, v, alibi_slopes=slopes.detach()).sum().backward()


def test_out_with_gradients() -> None:
    q, k, v = qkv()
    out = torch.empty(2, 2, 4, 2, dtype=q.dtype)
    with pytest.raises(ValueError, match=r"out is given and query requires a gradient.*detach.*no_grad"):
        flashcore.attention(q, k, v, out=out)
    with torch.no_grad():
        assert flashcore.attention(q, k, v, out=out) is out


def test_a_query_of_another_kind() -> None:
    _, k, v = qkv()
    with pytest.raises(ValueError, match=r"key requires a gradient, but query is no torch tensor.*key.detach"):
        flashcore.attention(np.zeros((2, 2, 4, 3)), k, v)


def test_arguments_are_checked_before() -> None:
    """The words of a wrong call do not depend on who serves it."""
    q, k, v = qkv()
    for options, words in (
        ({"window": (1, 2, 3)}, "window is .*a pair"),
        ({"softcap": -1.0}, "softcap is -1"),
        ({"diagonal": "upper"}, "diagonal is 'upper'"),
        ({"attn_mask": torch.zeros(3, 3, dtype=q.dtype)}, "attn_mask has shape"),
        ({"layout": "bdsh"}, "layout is 'bdsh'"),
    ):
        with pytest.raises(ValueError, match=words):
            flashcore.attention(q, k, v, **options)
    with pytest.raises(ValueError, match="must agree in head_dim"):
        flashcore.attention(q, k[..., :2], v)


def test_explain_takes_tensors_that_require_grad() -> None:
    assert flashcore.explain(*qkv()).family == "cpu"


def test_torch_is_not_imported_by_flashcore() -> None:
    import subprocess
    import sys

    program = "import sys, flashcore; assert 'torch' not in sys.modules and 'flashcore.torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
    program = "import torch, flashcore, sys; x = torch.ones(1, 1, 2, 4); flashcore.attention(x, x, x)"
    subprocess.run([sys.executable, "-P", "-c", program + "; assert 'flashcore.torch' not in sys.modules"], check=True)
