"""Dropout of torch tensors: where its numbers come from, and that whatever torch does with a call drops the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
from devices import fetch, same_bits

import flashcore

torch = pytest.importorskip("torch", reason="this is about PyTorch's tensors")
F = torch.nn.functional
from torch.utils.checkpoint import checkpoint  # noqa: E402

SEED = torch.tensor([42, 7])


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    torch._dynamo.reset()


def qkv(rows: int = 5, keys: int = 7, dtype: Any = torch.float64, batch: tuple[int, ...] = (2,)) -> list[Any]:
    generator = torch.Generator().manual_seed(42)
    shapes = ((*batch, 4, rows, 3), (*batch, 2, keys, 3), (*batch, 2, keys, 2))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(function: Any, *inputs: Any) -> list[Any]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def by_formula(query: Any, key: Any, value: Any, p: float, seed: Any) -> Any:
    """In torch's own operators, with the oracle's mask."""
    key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    weights = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)
    kept = reference.kept_by_dropout(p, seed.numpy(), weights[..., 0, 0].numel(), *weights.shape[-2:])
    return (weights * torch.from_numpy(kept.reshape(weights.shape)) / (1 - p)) @ value


# The generator


@pytest.mark.parametrize("with_gradients", [False, True])
def test_calls_repeat_after_manual_seed(with_gradients: bool) -> None:
    arrays = [x if with_gradients else x.detach() for x in qkv(20, 30)]
    torch.manual_seed(1)
    first, second = (flashcore.attention(*arrays, dropout_p=0.5).detach() for _ in range(2))
    torch.manual_seed(1)
    assert same_bits(first, flashcore.attention(*arrays, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_gradients_change_nothing() -> None:
    arrays = qkv()
    torch.manual_seed(1)
    out = flashcore.attention(*arrays, dropout_p=0.5)
    torch.manual_seed(1)
    with torch.no_grad():
        assert same_bits(out, flashcore.attention(*arrays, dropout_p=0.5))


def test_nothing_is_drawn_in_vain() -> None:
    arrays = qkv()
    before = torch.get_rng_state()
    flashcore.attention(*arrays, dropout_p=0.0)
    flashcore.attention(*arrays, dropout_p=0.5, dropout_seed=SEED)
    flashcore.explain(*(x.detach() for x in arrays), dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    flashcore.attention(*arrays, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), before)


# Gradients


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_gradcheck(p: float) -> None:
    assert torch.autograd.gradcheck(
        lambda *x: flashcore.attention(*x, dropout_p=p, dropout_seed=SEED, return_lse=True), qkv()
    )


@pytest.mark.parametrize("kind", ["tensor", "numpy"])
@pytest.mark.parametrize("batch", [(2,), (), (2, 3)])
def test_formula(batch: tuple[int, ...], kind: str) -> None:
    """Other than four dimensions, and arrays of other kinds, are made tensors of four first."""
    arrays = qkv(batch=batch)
    seed = SEED if kind == "tensor" else SEED.numpy()
    ours = gradients(lambda *x: flashcore.attention(*x, dropout_p=0.3, dropout_seed=seed), *arrays)
    theirs = gradients(lambda *x: by_formula(*x, 0.3, SEED), *arrays)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_seed_that_is_overwritten_before_the_backward() -> None:
    q, k, v = qkv()
    seed = SEED.clone()
    out = flashcore.attention(q, k, v, dropout_p=0.3, dropout_seed=seed)
    seed.random_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_checkpointing(use_reentrant: bool, batch: tuple[int, ...]) -> None:
    """Its recomputation drops the same again."""
    arrays = qkv(batch=batch)
    function = lambda *x: flashcore.attention(*x, dropout_p=0.5) * 2  # noqa: E731
    torch.manual_seed(1)
    plain = gradients(function, *arrays)
    torch.manual_seed(1)
    out = checkpoint(function, *arrays, use_reentrant=use_reentrant)
    torch.rand(5)  # what a model draws in between
    out.square().sum().backward()
    for one, other in zip(plain, [out, *(x.grad for x in arrays)], strict=True):
        assert same_bits(one, other)


def test_autocast() -> None:
    arrays = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = flashcore.attention(*arrays, dropout_p=0.3, dropout_seed=SEED)
    assert same_bits(out, flashcore.attention(*(x.bfloat16() for x in arrays), dropout_p=0.3, dropout_seed=SEED))


# The operator


def test_the_operator_draws_nothing() -> None:
    import flashcore.torch

    q, k, v = (x.detach() for x in qkv())
    out, _ = torch.ops.flashcore.attention(q, k, v, None, None, None, SEED, dropout_p=0.3)
    assert same_bits(out, flashcore.attention(q, k, v, dropout_p=0.3, dropout_seed=SEED))
    with pytest.raises(ValueError, match=r"dropout_seed is not given; this operator draws no random numbers itself"):
        torch.ops.flashcore.attention(q, k, v, dropout_p=0.3)


def test_opcheck() -> None:
    import flashcore.torch  # noqa: F401  registers it

    arguments = (*qkv(), None, None, None, SEED)
    torch.library.opcheck(torch.ops.flashcore.attention.default, arguments, {"dropout_p": 0.3})


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_fake_and_meta_tensors(p: float) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert flashcore.attention(*[torch.empty(2, 4, 5, 3)] * 3, dropout_p=p).shape == (2, 4, 5, 3)
    x = torch.empty(2, 4, 5, 3, device="meta")
    assert flashcore.attention(x, x, x, dropout_p=p).shape == x.shape


# Compilers

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend: str) -> None:
    arrays = qkv(20, 30, torch.float32)
    function = torch.compile(lambda *x: flashcore.attention(*x, dropout_p=0.5), backend=backend, fullgraph=True)
    torch.manual_seed(1)
    first, second = (gradients(function, *arrays) for _ in range(2))
    torch.manual_seed(1)
    assert all(map(same_bits, first, gradients(function, *arrays)))
    assert not torch.equal(first[0], second[0])
    if backend == "aot_eager":  # inductor has random numbers of its own
        torch.manual_seed(1)
        assert all(map(same_bits, first, gradients(lambda *x: flashcore.attention(*x, dropout_p=0.5), *arrays)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_backward_drops_the_same(backend: str, checkpointed: bool) -> None:
    """out = weights value, so dvalue = weights^T dout: with an identity for both, each shows its weights."""
    q, k, _ = qkv(20, 30, torch.float32)
    value = torch.eye(30).expand(2, 2, 30, 30).contiguous().requires_grad_()

    def attend(*arrays: Any) -> Any:
        return flashcore.attention(*arrays, dropout_p=0.5)

    def checkpoint_it(*arrays: Any) -> Any:
        return checkpoint(attend, *arrays, use_reentrant=False)

    weights = torch.compile(checkpoint_it if checkpointed else attend, backend=backend, fullgraph=True)(q, k, value)
    (dv,) = torch.autograd.grad(weights, value, torch.eye(20, 30).expand_as(weights))
    of_groups = weights.detach().unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(dv[..., :20], of_groups.mT)


def test_compiled_with_a_given_seed() -> None:
    arrays = qkv(dtype=torch.float32)
    function = lambda q, k, v, seed: flashcore.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for seed in (SEED, SEED + 1):
        assert same_bits(compiled(*arrays, seed), function(*arrays, seed))


def test_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return flashcore.attention(q, k, v, dropout_p=0.5)

    arrays = tuple(x.detach() for x in qkv(20, 30))
    program = torch.export.export(Model(), arrays)
    torch.manual_seed(1)
    first, second = (program.module()(*arrays) for _ in range(2))
    torch.manual_seed(1)
    assert same_bits(first, flashcore.attention(*arrays, dropout_p=0.5))
    assert not torch.equal(first, second)


# torch.func


def test_vmap_draws_as_its_randomness_says() -> None:
    q, k, v = (x.detach().expand(3, *x.shape) for x in qkv(20, 30))

    def attend(randomness: str) -> Any:
        return torch.vmap(lambda *x: flashcore.attention(*x, dropout_p=0.5), randomness=randomness)(q, k, v)

    with pytest.raises(RuntimeError, match="randomness"):
        attend("error")
    same, different = attend("same"), attend("different")
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("seeds", [SEED, torch.tensor([[1, 2], [3, 4], [5, 6]])], ids=["one", "each"])
def test_vmap_over_seeds(seeds: Any) -> None:
    """Each sample is what it is alone, and so is its gradient."""
    arrays = [x.detach()[:, None] for x in qkv(batch=(3,))]

    def loss(q: Any, k: Any, v: Any, seed: Any) -> Any:
        return flashcore.attention(q, k, v, dropout_p=0.4, dropout_seed=seed).square().sum()

    dims = (0, 0, 0, 0 if seeds.ndim == 2 else None)
    for function in (lambda *x: (loss(*x),), torch.func.grad(loss, (0, 1, 2))):
        mapped = torch.vmap(function, dims)(*arrays, seeds)
        alone = [function(*(x[i] for x in arrays), seeds[i] if seeds.ndim == 2 else seeds) for i in range(3)]
        for one, others in zip(mapped, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(one, torch.stack(others))


def test_jacrev() -> None:
    q, k, v = (x.detach() for x in qkv())
    jacobian = torch.func.jacrev(lambda v: flashcore.attention(q, k, v, dropout_p=0.4, dropout_seed=SEED))(v)
    want = torch.autograd.functional.jacobian(lambda v: by_formula(q, k, v, 0.4, SEED), v)
    torch.testing.assert_close(jacobian, want)


# In the place of PyTorch's


def test_installed() -> None:
    import flashcore.torch as ft

    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.3, batch_first=True)
    x = torch.randn(2, 9, 16)
    q, k, v = qkv()
    with ft.install():
        torch.manual_seed(1)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)
        first, second = layer(x), layer(x)
        first.sum().backward()
        assert same_bits(layer.eval()(x), layer(x))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert same_bits(out, flashcore.attention(q, k, v, dropout_p=0.5))


def test_pytorchs_cpu_operator() -> None:
    """It has no place for a seed; PyTorch knows, and takes another of its backends."""
    import flashcore.torch  # noqa: F401  lists the name

    q, k, v = (torch.randn(2, 4, 9, 16, requires_grad=True) for _ in range(3))
    torch.nn.attention.activate_flash_attention_impl("flashcore")
    try:
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5).sum().backward()
        with pytest.raises(NotImplementedError, match=r"dropout_p is 0.5.*no result.*seed; call flashcore.attention"):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.5)
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def test_transformers() -> None:
    from flashcore.torch._transformers import forward

    q, k, v = (x.detach() for x in qkv())
    torch.manual_seed(1)
    out, _ = forward(torch.nn.Module(), q, k, v, None, dropout=0.3, is_causal=False)
    torch.manual_seed(1)
    assert same_bits(out, flashcore.attention(q, k, v, dropout_p=0.3).transpose(1, 2))


# On a GPU


def on_gpu(rows: int = 200, keys: int = 300, dtype: Any = torch.float16) -> list[Any]:
    return [x.detach().to("cuda", dtype) for x in qkv(rows, keys)]


def weights_on_gpu(q: Any, k: Any, **options: Any) -> Any:
    """Of the first 200 keys, which are those of the value's columns."""
    value = torch.eye(k.shape[2], 200, dtype=q.dtype, device="cuda").expand(*k.shape[:2], -1, -1)
    return flashcore.attention(q, k, value, **options)


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_drops_what_a_cpu_drops(dtype: Any) -> None:
    q, k, _ = on_gpu(dtype=dtype)
    weights = weights_on_gpu(q, k, dropout_p=0.3, dropout_seed=SEED.cuda())
    kept = reference.kept_by_dropout(0.3, SEED.numpy(), 8, 200, 300)[..., :200]
    np.testing.assert_array_equal(fetch(weights.float()) != 0, kept.reshape(2, 4, 200, 200))


@pytest.mark.gpu
def test_calls_repeat_after_manual_seed_on_a_gpu() -> None:
    arrays = on_gpu()
    torch.manual_seed(1)
    first, second = (flashcore.attention(*arrays, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert same_bits(first, flashcore.attention(*arrays, dropout_p=0.5))
    assert not torch.equal(first, second)


@pytest.mark.gpu
def test_a_seed_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"query is on cuda:0 and dropout_seed on the CPU"):
        flashcore.attention(*on_gpu(), dropout_p=0.5, dropout_seed=SEED)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [False, True])
def test_replays_of_a_graph_drop_other_weights(given: bool) -> None:
    """The numbers are read when the kernel runs: those that the generator, or the caller, has put there since."""
    q, k, _ = on_gpu()
    seed = torch.zeros(2, dtype=torch.int64, device="cuda")
    options: dict[str, Any] = {"dropout_p": 0.5} | ({"dropout_seed": seed} if given else {})
    weights_on_gpu(q, k, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights = weights_on_gpu(q, k, **options)

    def replay() -> Any:
        if given:
            seed.random_()
        graph.replay()
        return weights.clone()

    torch.cuda.manual_seed(1)
    first, second = replay(), replay()
    torch.cuda.manual_seed(1)
    again = replay()
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    for one in (first, second):
        assert abs((one == 0).float().mean().item() - 0.5) < 0.01
    if given:
        assert torch.equal(weights_on_gpu(q, k, **options), again)


@pytest.mark.gpu
def test_pytorchs_cuda_operator_hands_out_its_seed() -> None:
    import flashcore.torch

    q, k, v = (torch.randn(2, 4, 100, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    torch.nn.attention.activate_flash_attention_impl("flashcore")
    try:
        out, *_, seed, _, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.5)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert same_bits(out, flashcore.attention(q, k, v, dropout_p=0.5, dropout_seed=seed))


def _gradients_on_gpu(function: Any, *inputs: Any) -> list[Any]:
    try:
        return gradients(function, *inputs)
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_on_a_gpu(use_reentrant: bool) -> None:
    arrays = [x.requires_grad_() for x in on_gpu()]
    function = lambda *x: flashcore.attention(*x, dropout_p=0.5) * 2  # noqa: E731
    torch.cuda.manual_seed(1)
    plain = _gradients_on_gpu(function, *arrays)
    torch.cuda.manual_seed(1)
    out = checkpoint(function, *arrays, use_reentrant=use_reentrant)
    torch.rand(5, device="cuda")
    out.square().sum().backward()
    for one, other in zip(plain, [out, *(x.grad for x in arrays)], strict=True):
        assert same_bits(one, other)


@pytest.mark.gpu
def test_gradients_in_a_graph() -> None:
    """Of one capture of forward and backward, each replay's backward drops what its own forward dropped."""
    q, k, _ = on_gpu(150, 180, torch.float32)
    value = torch.eye(180, device="cuda").expand(2, 2, 180, 180).contiguous().requires_grad_()
    dout = torch.eye(150, 180, device="cuda").expand(2, 4, 150, 180)

    def step() -> tuple[Any, Any]:
        weights = flashcore.attention(q, k, value, dropout_p=0.5)
        return weights.detach(), torch.autograd.grad(weights, value, dout)[0]

    _gradients_on_gpu(lambda v: flashcore.attention(q, k, v, dropout_p=0.5), value)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, dv = step()
    seen = []
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(dv[..., :150], weights.unflatten(1, (2, 2)).sum(2).mT)
        seen.append(weights.clone())
    assert not torch.equal(*seen)
