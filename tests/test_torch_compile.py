"""torch.compile and torch.export of what calls flashcore.attention."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from devices import same_bits

import flashcore

torch = pytest.importorskip("torch", reason="PyTorch compiles")
F = torch.nn.functional


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(rows: int = 9, keys: int = 9, heads_kv: int = 4, dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(42)
    shapes = ((2, 4, rows, 16), (2, heads_kv, keys, 16), (2, heads_kv, keys, 8))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    """(the function compiled whole, with autograd and what runs eagerly after; its count of compilations)."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True), counter


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "lower_right": {"is_causal": "lower_right"},
    "window": {"window": (3, None), "diagonal": "lower_right"},
    "diagonal": {"window": [None, 2], "diagonal": 1},
    "softcap": {"softcap": 2, "scale": 0.3},
    "deterministic": {"deterministic": True, "enable_gqa": True, "dropout_p": 0.0, "layout": None},
    "mask": {"attn_mask": torch.ones(9, 11, dtype=torch.bool).tril(2)},
    "bias": {"attn_mask": torch.linspace(-1, 1, 11)},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.2, 0.1, 0.0])},
    "sinks": {"sinks": torch.tensor([0.5, -0.2, 0.1, 0.0])},
}


@pytest.mark.parametrize("name", CALLS)
def test_options(name: str) -> None:
    q, k, v = qkv(9, 11, heads_kv=2)
    function = lambda q, k, v: flashcore.attention(q * 2, k, v, **CALLS[name], return_lse=True)  # noqa: E731
    compiled_function, _ = compiled(function)
    for one, other in zip(compiled_function(q, k, v), function(q, k, v), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "shapes",
    [((4, 3), (5, 3), (5, 2)), ((2, 4, 3), (2, 5, 3), (2, 5, 2)), ((2, 3, 2, 4, 3), (3, 2, 5, 3), (1, 1, 1, 5, 2))],
)
def test_shapes(shapes: Any, layout: str) -> None:
    arrays = [torch.randn(shape) for shape in shapes]
    if layout == "bshd":
        arrays = [x.transpose(-2, -3) if x.ndim > 2 else x for x in arrays]
    function = lambda *x: flashcore.attention(*x, layout=layout, return_lse=True)  # noqa: E731
    for one, other in zip(compiled(function)[0](*arrays), function(*arrays), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (4, None), "diagonal": "lower_right"}])
@pytest.mark.parametrize("training", [False, True])
def test_lengths_share_a_compilation(options: dict[str, Any], training: bool) -> None:
    """One for the first length, one for all others."""
    function = lambda q, k, v: flashcore.attention(q, k, v, **options)  # noqa: E731
    compiled_function, counter = compiled(function)
    for rows, keys in ((9, 9), (17, 17), (33, 33), (64, 64)):
        arrays = [x.requires_grad_(training) for x in qkv(rows, keys)]
        ours, plain = compiled_function(*arrays), function(*arrays)
        assert same_bits(ours.detach(), plain.detach())
        if training:
            grads = torch.autograd.grad(ours.square().sum(), arrays)
            wants = torch.autograd.grad(plain.square().sum(), arrays)
            assert all(same_bits(one, other) for one, other in zip(grads, wants, strict=True))
    assert counter.frame_count == 2


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_strides_are_those_of_the_eager_call(layout: str) -> None:
    """Inductor trusts what the fake kernel says of them."""
    packed = torch.randn(2, 9, 4, 48)  # of which these are views
    arrays = [x if layout == "bshd" else x.transpose(1, 2) for x in packed.split(16, dim=-1)]
    function = lambda *x: flashcore.attention(*x, layout=layout)  # noqa: E731
    out, plain = compiled(function)[0](*arrays), function(*arrays)
    assert out.stride() == plain.stride()
    metas = [torch.empty_strided(x.shape, x.stride(), device="meta") for x in arrays]
    assert torch.ops.flashcore.attention(*metas, layout=layout)[0].stride() == plain.stride()


def test_gradients_of_mask_and_sinks() -> None:
    arrays = [x.requires_grad_() for x in (*qkv(9, 11, heads_kv=2), torch.randn(9, 11), torch.randn(4))]

    def function(q: Any, k: Any, v: Any, mask: Any, sinks: Any) -> Any:
        out, lse = flashcore.attention(q, k, v, mask, sinks=sinks, return_lse=True)
        return out.square().sum() + lse.sum()

    grads = torch.autograd.grad(compiled(function)[0](*arrays), arrays)
    for one, other in zip(grads, torch.autograd.grad(function(*arrays), arrays), strict=True):
        torch.testing.assert_close(one, other)


class Block(torch.nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.project, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.attention = attention

    def forward(self, x: Any) -> Any:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.out(self.attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("where", ["inside", "outside", "nowhere"])
def test_a_module_with_autocast(where: str) -> None:
    torch.manual_seed(0)
    block, x = Block(flashcore.attention), torch.randn(2, 9, 32)

    def step(x: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "inside"):
            return block(x)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "outside"):
        ours = compiled(step if where == "inside" else block)[0](x)
        plain = step(x) if where == "inside" else block(x)
    assert ours.dtype == (torch.float32 if where == "nowhere" else torch.bfloat16)
    torch.testing.assert_close(ours, plain)
    parameters = list(block.parameters())
    grads = torch.autograd.grad(ours.float().sum(), parameters)
    for one, other in zip(grads, torch.autograd.grad(plain.float().sum(), parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor() -> None:
    """The default backend, which lays out intermediate results as it likes."""
    torch.manual_seed(0)
    block, x = Block(flashcore.attention), torch.randn(2, 9, 32)
    ours = torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(ours, block(x))
    parameters = list(block.parameters())
    grads = torch.autograd.grad(ours.square().sum(), parameters)
    for one, other in zip(grads, torch.autograd.grad(block(x).square().sum(), parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own look at what it traces
def test_compiled_autograd() -> None:
    """It traces the backward of a node that an eager call made."""
    enable = pytest.importorskip("torch._dynamo.compiled_autograd")._enable
    arrays = [x.requires_grad_() for x in qkv()]
    gradients = torch.autograd.grad(flashcore.attention(*arrays).square().sum(), arrays)
    with enable(torch.compile(backend="eager")):
        flashcore.attention(*arrays).square().sum().backward()
    for x, gradient in zip(arrays, gradients, strict=True):
        torch.testing.assert_close(x.grad, gradient)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return flashcore.attention(q, k, v, is_causal="lower_right")

    length = torch.export.Dim("length")
    program = torch.export.export(Model(), tuple(qkv()), dynamic_shapes=({2: length},) * 3, strict=strict)
    assert [node.target for node in program.graph.nodes if "flashcore" in str(node.target)] == [
        torch.ops.flashcore.attention.default
    ]
    arrays = qkv(50, 50)
    assert same_bits(program.module()(*arrays), flashcore.attention(*arrays, is_causal="lower_right"))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5; allowed: 0.0 to 1.0"),
        ({"is_causal": "upper"}, ValueError, "is_causal is 'upper'"),
        ({"diagonal": "upper"}, ValueError, "diagonal is 'upper'"),
        ({"attn_mask": torch.zeros(3, 3)}, ValueError, "attn_mask has shape"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """A wrong call is refused in words; where the graph may break, in those of the eager call."""
    q, k, v = qkv()
    function = lambda q: flashcore.attention(q, k, v, **options)  # noqa: E731
    with pytest.raises(error, match=words):
        torch.compile(function, backend="eager")(q)
    with pytest.raises(Exception, match=words):
        torch.compile(function, backend="eager", fullgraph=True)(q)


FLASHCORE_FIRST = "import flashcore, torch"
TRACER_FIRST = "import torch, torch._dynamo, flashcore"
LOOKED_FOR = "import flashcore, torch, importlib.util; importlib.util.find_spec('torch._dynamo')"


@pytest.mark.parametrize("imports", [FLASHCORE_FIRST, TRACER_FIRST, LOOKED_FOR])
def test_order_of_imports(imports: str) -> None:
    program = (
        imports
        + """
import sys
assert "flashcore.torch" not in sys.modules or "torch._dynamo" in sys.modules
x = torch.ones(1, 1, 4, 8)
function = torch.compile(lambda x: flashcore.attention(x, x, x) + 1, backend="eager", fullgraph=True)
assert (function(x) == 2).all()
"""
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)
