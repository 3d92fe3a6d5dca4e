"""Call for call what PyTorch's scaled_dot_product_attention documents: shapes, masks, options, dtypes, empty inputs.

Results and gradients beside PyTorch's own, and an error where PyTorch has one.
"""

from __future__ import annotations

from typing import Any

import pytest
from devices import same_bits

import flashcore

torch = pytest.importorskip("torch", reason="this is about PyTorch's function")
F = torch.nn.functional


def random(*shapes: tuple[int, ...], dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(42)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def compare(arrays: list[Any], **options: Any) -> None:
    """Results and gradients of query, key, value and a float mask."""
    results = []
    mask = options.pop("attn_mask", None)
    for function in (flashcore.attention, F.scaled_dot_product_attention):
        inputs = [x.detach().requires_grad_() for x in arrays]
        given = mask
        if mask is not None and mask.is_floating_point():
            given = mask.detach().requires_grad_()
            inputs.append(given)
        out = function(*inputs[:3], given, **options)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


SHAPES = {
    "three dimensions": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "four": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "five": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)),
    "six": ((2, 1, 3, 4, 5, 8), (2, 1, 3, 4, 7, 8), (2, 1, 3, 4, 7, 6)),
    "broadcast batch": ((2, 4, 5, 8), (1, 4, 7, 8), (2, 4, 7, 6)),
    "broadcast heads of key and value": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 6)),
    "one row": ((2, 4, 1, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "one key": ((2, 4, 5, 8), (2, 4, 1, 8), (2, 4, 1, 6)),
    "head_dim 1": ((2, 4, 5, 1), (2, 4, 7, 1), (2, 4, 7, 1)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, is_causal: bool) -> None:
    compare(random(*SHAPES[name]), is_causal=is_causal)


@pytest.mark.parametrize("groups", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("ndim", [3, 4, 5])
def test_enable_gqa(groups: tuple[int, int], ndim: int) -> None:
    batch = (2, 3)[: ndim - 3]
    heads, heads_kv = groups
    compare(random((*batch, heads, 5, 8), (*batch, heads_kv, 7, 8), (*batch, heads_kv, 7, 6)), enable_gqa=True)


MASKS = [(5, 7), (1, 7), (5, 1), (7,), (4, 5, 7), (1, 5, 7), (2, 4, 5, 7), (2, 1, 5, 7), (1, 4, 1, 7), (2, 1, 1, 7)]


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(shape: tuple[int, ...], kind: str) -> None:
    (mask,) = random(shape)
    if kind == "bool":
        mask = mask.expand(5, 7) if mask.ndim == 1 else mask  # one dimension of bools PyTorch's CPU backend trips over
        mask = mask > -0.5
        mask[..., 0] = True  # of rows that see nothing, PyTorch's backends differ
    compare(random(*SHAPES["four"]), attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_the_querys_dtype(dtype: Any) -> None:
    q, k, v = random(*SHAPES["four"], dtype=dtype)
    (mask,) = random((5, 7), dtype=dtype)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double()).to(dtype)
    torch.testing.assert_close(flashcore.attention(q, k, v, mask), want)


def test_mask_and_is_causal_both_apply() -> None:
    """PyTorch's fused backends do so; its math backend refuses."""
    q, k, v = random(*SHAPES["four"])
    (mask,) = random((5, 7))
    hidden = mask.masked_fill(~torch.ones(5, 7, dtype=torch.bool).tril(), float("-inf"))
    want = F.scaled_dot_product_attention(q, k, v, hidden)
    torch.testing.assert_close(flashcore.attention(q, k, v, mask, is_causal=True), want)
    boolean = mask > -1
    boolean[:, 0] = True
    want = F.scaled_dot_product_attention(q, k, v, boolean & torch.ones(5, 7, dtype=torch.bool).tril())
    torch.testing.assert_close(flashcore.attention(q, k, v, boolean, is_causal=True), want)


def test_infinities_in_a_mask() -> None:
    q, k, v = random(*SHAPES["four"])
    (mask,) = random((5, 7))
    mask[:, 3:] = float("-inf")
    compare([q, k, v], attn_mask=mask.masked_fill(mask == 0, 1.0))
    mask[2] = float("-inf")
    out = flashcore.attention(q, k, v, mask)
    assert not out[:, :, 2].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("scale", [None, 0.3, 1, 0.0, -0.5])
def test_scale(scale: Any) -> None:
    compare(random(*SHAPES["four"]), scale=scale)


EMPTY = {
    "batch": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 6)),
    "heads": ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 6)),
    "rows": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 6)),
    "outer": ((0, 2, 4, 5, 8), (0, 2, 4, 7, 8), (0, 2, 4, 7, 6)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", EMPTY)
def test_empty(name: str, is_causal: bool) -> None:
    compare(random(*EMPTY[name]), is_causal=is_causal)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "options"),
    [
        (((2, 4, 5, 8), (2, 4, 7, 9), (2, 4, 7, 6)), (torch.float32,) * 3, {}),
        (((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 6, 6)), (torch.float32,) * 3, {}),
        (((2, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 6)), (torch.float32,) * 3, {}),
        (((2, 4, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), (torch.float32,) * 3, {"enable_gqa": True}),
        (((8,), (8,), (8,)), (torch.float32,) * 3, {}),
        (((2, 4, 5, 8),) * 3, (torch.float32, torch.float64, torch.float32), {}),
        (((2, 4, 5, 8),) * 3, (torch.int64,) * 3, {}),
        (((2, 4, 5, 8),) * 3, (torch.float32,) * 3, {"attn_mask": torch.zeros(5, 4)}),
        (((2, 4, 5, 8),) * 3, (torch.float32,) * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.int32)}),
        (((2, 4, 5, 8),) * 3, (torch.float32,) * 3, {"dropout_p": 1.5}),
    ],
)
def test_errors(shapes: Any, dtypes: Any, options: dict[str, Any]) -> None:
    arrays = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises((RuntimeError, ValueError)):
        F.scaled_dot_product_attention(*arrays, **options)
    with pytest.raises(ValueError, match=r"query|key|value|attn_mask|dropout_p"):
        flashcore.attention(*arrays, **options)


def test_deterministic_mode() -> None:
    arrays = random(*SHAPES["four"])
    torch.use_deterministic_algorithms(True)
    try:
        compare(arrays, is_causal=True)
        results = []
        for _ in range(2):
            inputs = [x.detach().requires_grad_() for x in arrays]
            results.append(torch.autograd.grad(flashcore.attention(*inputs).square().sum(), inputs))
        assert all(same_bits(one, other) for one, other in zip(*results, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("create", ["checkpoint", "hooks", "retain"])
def test_around_autograd(create: str) -> None:
    """Activation checkpointing, saved tensors elsewhere, a graph used twice."""
    arrays = [x.requires_grad_() for x in random(*SHAPES["four"])]
    want = torch.autograd.grad(flashcore.attention(*arrays, is_causal=True).square().sum(), arrays)
    if create == "checkpoint":
        call = lambda *x: flashcore.attention(*x, is_causal=True)  # noqa: E731
        loss = torch.utils.checkpoint.checkpoint(call, *arrays, use_reentrant=False).square().sum()
        ours = torch.autograd.grad(loss, arrays)
    elif create == "hooks":
        with torch.autograd.graph.save_on_cpu():
            ours = torch.autograd.grad(flashcore.attention(*arrays, is_causal=True).square().sum(), arrays)
    else:
        loss = flashcore.attention(*arrays, is_causal=True).square().sum()
        first = torch.autograd.grad(loss, arrays, retain_graph=True)
        ours = torch.autograd.grad(loss, arrays)
        assert all(same_bits(one, other) for one, other in zip(first, ours, strict=True))
    assert all(same_bits(one, other) for one, other in zip(ours, want, strict=True))
