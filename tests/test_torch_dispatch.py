"""Calls that torch's dispatcher must see: autocast, modes, functorch transforms, subclasses, lazy views."""

from __future__ import annotations

from typing import Any

import pytest
from devices import same_bits

import flashcore

torch = pytest.importorskip("torch", reason="these are PyTorch's own rules")
F = torch.nn.functional


def qkv(*shape: int, dtype: Any = torch.float32, seed: int = 42) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape or (2, 3, 9, 16), generator=generator).to(dtype) for _ in range(3)]


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_casts_as_sdpa_does(dtype: Any, mixed: bool) -> None:
    q, k, v = qkv()
    mask, boolean = torch.randn(9, 9), torch.ones(9, 9, dtype=torch.bool).tril()
    if mixed:
        q, v = q.to(dtype), v.half()
    with torch.autocast("cpu", dtype=dtype):
        for given in (None, mask, boolean):
            ours, theirs = flashcore.attention(q, k, v, given), F.scaled_dot_product_attention(q, k, v, given)
            assert ours.dtype == theirs.dtype == dtype
            cast = [x.to(dtype) for x in (q, k, v)]
            if given is not None and given.is_floating_point():
                given = given.to(dtype)
            with torch.autocast("cpu", enabled=False):
                assert same_bits(ours, flashcore.attention(*cast, given))
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        double = [x.double() for x in (q, k, v)]
        assert flashcore.attention(*double).dtype == F.scaled_dot_product_attention(*double).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert flashcore.attention(*qkv()).dtype == torch.float32
    assert flashcore.attention(*qkv()).dtype == torch.float32


def test_autocast_leaves_slopes_and_sinks_in_float32() -> None:
    q, k, v = qkv()
    slopes, sinks = torch.rand(3), torch.rand(3)
    cast = [x.bfloat16() for x in (q, k, v)]
    want = flashcore.attention(*cast, alibi_slopes=slopes, sinks=sinks)
    rounded = flashcore.attention(*cast, alibi_slopes=slopes, sinks=sinks.half().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(flashcore.attention(q, k, v, alibi_slopes=slopes, sinks=sinks), want)
        assert same_bits(flashcore.attention(q, k, v, alibi_slopes=slopes, sinks=sinks.half()), rounded)
        plan = flashcore.explain(q, k, v)
    assert plan == flashcore.explain(*cast)


@pytest.mark.parametrize("shape", [(2, 3, 9, 16), (3, 9, 16), (1, 2, 3, 9, 16)])
def test_autocast_with_gradients(shape: tuple[int, ...]) -> None:
    """Gradients come back in the inputs' own dtype; a shape of five dimensions takes another way."""
    inputs = [x.requires_grad_() for x in qkv(*shape)]
    mask = torch.randn(9, 9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flashcore.attention(*inputs, mask)
        theirs = F.scaled_dot_product_attention(*inputs, mask)
    assert out.dtype == torch.bfloat16
    ours = torch.autograd.grad(out.float().square().sum(), (*inputs, mask))
    assert all(x.dtype == torch.float32 for x in ours)
    want = torch.autograd.grad(theirs.float().square().sum(), (*inputs, mask))
    for one, other in zip(ours, want, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


def test_autocast_of_the_op() -> None:
    import flashcore.torch

    q, k, v = qkv()
    sinks, mask = torch.rand(1, 3), torch.randn(1, 1, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = torch.ops.flashcore.attention(q, k, v, mask, None, sinks)
        want = flashcore.attention(q, k, v, mask, sinks=sinks, return_lse=True)
    assert out.dtype == torch.bfloat16
    assert same_bits(out, want[0])
    assert same_bits(lse, want[1])


# Modes


def test_a_mode_sees_the_op() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class FunctionMode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class DispatchMode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    q, k, v = qkv()
    want = flashcore.attention(q, k, v, is_causal="lower_right", window=(4, None), scale=2, softcap=30)
    for mode in (FunctionMode, DispatchMode):
        seen.clear()
        with mode():
            out = flashcore.attention(q, k, v, is_causal="lower_right", window=(4, None), scale=2, softcap=30)
        assert same_bits(out, want)
        assert any("flashcore.attention" in name for name in seen)


def test_a_mode_around_the_backward_sees_its_op() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    q, k, v = (x.requires_grad_() for x in qkv())
    out = flashcore.attention(q, k, v).sum()
    want = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    with Mode():
        ours = torch.autograd.grad(out, (q, k, v))
    assert "flashcore.attention_backward.default" in seen
    assert all(same_bits(a, b) for a, b in zip(ours, want, strict=True))


def test_flops_counters_and_profilers_of_modules() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = qkv()
    with FlopCounterMode(display=False):
        assert same_bits(flashcore.attention(q, k, v), flashcore.attention(q, k, v))


def test_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(2, 4, n, d, dtype=torch.float16) for n, d in ((9, 16), (7, 16), (7, 24)))
        out, lse = flashcore.attention(q, k, v, return_lse=True)
        assert (out.shape, out.dtype) == ((2, 4, 9, 24), torch.float16)
        assert (lse.shape, lse.dtype) == ((2, 4, 9), torch.float32)
        out, lse = flashcore.attention(q[0, 0], k[0, 0], v[0, 0], layout="bshd", return_lse=True)
        assert (out.shape, lse.shape) == ((9, 24), (9,))
        q.requires_grad_()
        (dq,) = torch.autograd.grad(flashcore.attention(q, k, v).sum(), q)
        assert dq.shape == q.shape
        for wrong in ((q, k[..., :8], v), (q, k, v[:, :, :3]), (q[:, :3], k[:, :2], v[:, :2])):
            with pytest.raises(ValueError, match="do not fit together"):
                flashcore.attention(*wrong)
    assert type(flashcore.attention(q, k, v)).__name__ == "FakeTensor"  # outside, by their type


def test_what_the_dispatcher_cannot_have() -> None:
    from torch._subclasses import FakeTensorMode

    q, _, v = qkv()
    with FakeTensorMode():
        x = torch.empty(2, 3, 9, 16)
        with pytest.raises(NotImplementedError, match=r"out is given.*dispatcher.*leave it away"):
            flashcore.attention(x, x, x, out=x)
        with pytest.raises(NotImplementedError, match=r"explain.. reads shapes.*call outside"):
            flashcore.explain(x, x, x)
        with pytest.raises(ValueError, match=r"dropout_p is 1.5; allowed: 0.0 to 1.0"):
            flashcore.attention(x, x, x, dropout_p=1.5)
        with pytest.raises(ValueError, match="is_causal is 'upper_right'"):
            flashcore.attention(x, x, x, is_causal="upper_right")
    with pytest.raises(
        NotImplementedError, match=r"key is a tensor that torch's dispatcher must see.*query is no torch"
    ):
        flashcore.attention(q.numpy(), x, v)


# Functorch


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 0), (1, 0, None), (-1, 0, 2)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    arrays = [torch.randn(5, 2, 3, 4, 8) if d is not None else torch.randn(2, 3, 4, 8) for d in in_dims]
    arrays = [x if d is None else x.movedim(0, d) for x, d in zip(arrays, in_dims, strict=True)]
    samples = [[x if d is None else x.select(d, i) for x, d in zip(arrays, in_dims, strict=True)] for i in range(5)]
    want = torch.stack([flashcore.attention(*sample, is_causal=True) for sample in samples])
    out = torch.func.vmap(lambda *x: flashcore.attention(*x, is_causal=True), in_dims)(*arrays)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["attn_mask", "sinks", "alibi_slopes"])
@pytest.mark.parametrize("over", [True, False])
@pytest.mark.parametrize("batches", [1, 2])
def test_vmap_of_options(name: str, over: bool, batches: int) -> None:
    q, k, v = (torch.randn(5, 2, 3, 4, 8) for _ in range(3))
    shape = (batches, 3, 4, 4) if name == "attn_mask" else (batches, 3)
    option = torch.rand(*((5,) if over else ()), *shape)
    call = lambda q, k, v, x: flashcore.attention(q, k, v, **{name: x}, return_lse=True)  # noqa: E731
    out, lse = torch.func.vmap(call, (0, 0, 0, 0 if over else None))(q, k, v, option)
    for i in range(5):
        want = call(q[i], k[i], v[i], option[i] if over else option)
        torch.testing.assert_close(out[i], want[0])
        torch.testing.assert_close(lse[i], want[1])


def test_gradients_of_each_sample() -> None:
    """torch.func's grad inside vmap, as for the norm of each sample's gradient."""
    q, k, v = (torch.randn(5, 2, 3, 4, 8, dtype=torch.float64) for _ in range(3))
    mask, sinks = torch.randn(1, 3, 4, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def loss(q: Any, k: Any, v: Any, mask: Any, sinks: Any) -> Any:
        out, lse = flashcore.attention(q, k, v, mask, sinks=sinks, return_lse=True)
        return out.square().sum() + lse.sin().sum()

    every = (0, 1, 2, 3, 4)
    grads = torch.func.vmap(torch.func.grad(loss, every), (0, 0, 0, None, None))(q, k, v, mask, sinks)
    for i in range(5):
        inputs = [x.clone().requires_grad_() for x in (q[i], k[i], v[i], mask, sinks)]
        want = torch.autograd.grad(loss(*inputs), inputs)
        for one, other in zip(grads, want, strict=True):
            torch.testing.assert_close(one[i], other)


def test_jacobians() -> None:
    """Of an eager call, whose backward comes batched, and of a functorch call."""
    q, k, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    want = torch.autograd.functional.jacobian(lambda q: F.scaled_dot_product_attention(q, k, v), q)
    eager = torch.autograd.functional.jacobian(lambda q: flashcore.attention(q, k, v), q, vectorize=True)
    torch.testing.assert_close(eager, want)
    torch.testing.assert_close(torch.func.jacrev(lambda q: flashcore.attention(q, k, v))(q), want)


def test_second_derivatives_of_functorch_are_refused() -> None:
    q, k, v = qkv(1, 2, 3, 4)
    loss = lambda q: flashcore.attention(q, k, v).square().sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"no second derivatives.*SDPBackend.MATH"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_gradients_are_refused() -> None:
    q, k, v = qkv()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward"):
        torch.func.jvp(lambda q: flashcore.attention(q, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="query carries a forward-mode tangent"):
            flashcore.attention(dual, k, v)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_op() -> None:
    traced = torch.jit.trace(lambda q, k, v: flashcore.attention(q, k, v, is_causal=True), tuple(qkv()))
    assert "flashcore::attention" in str(traced.graph)
    q, k, v = qkv(2, 3, 9, 16, seed=7)
    assert same_bits(traced(q, k, v), flashcore.attention(q, k, v, is_causal=True))


# Tensors that are not what they seem


def test_negative_views() -> None:
    q, k, v = qkv()
    lazy = torch.complex(k, v).conj().imag  # = -v, by a bit that DLPack does not carry
    assert lazy.is_neg()
    assert same_bits(flashcore.attention(q, k, lazy), flashcore.attention(q, k, -v))
    lazy = torch.complex(k, v.clone().requires_grad_()).conj().imag
    assert flashcore.attention(q, k, lazy).requires_grad


def test_subclasses() -> None:
    class Mine(torch.Tensor):
        pass

    q, k, v = qkv()
    want = flashcore.attention(q, k, v)
    out = flashcore.attention(q, k.as_subclass(Mine), v)
    assert type(out) is type(F.scaled_dot_product_attention(q, k.as_subclass(Mine), v)) is Mine
    assert same_bits(out.as_subclass(torch.Tensor), want)
    assert same_bits(flashcore.attention(torch.nn.Buffer(q), k, v), want)  # a plain tensor with a flag
