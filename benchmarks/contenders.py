"""
contenders.py - what is measured (a problem and its inputs) and who takes part (FlashCore and its peers).

A contender turns one set of inputs into a call without arguments that returns the output, so that every timer treats
all of them alike. What a contender needs around its calls, PyTorch's choice of backend say, is its scope: entered
once around a capture or a loop of calls, it costs the timed call nothing.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

SEED = 42
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# The math backend writes its scores to memory, several times. 2^31 of them are 4 GiB in float16.
MATH_SCORES_MAX = 2**31


class Refused(Exception):
    """This contender does not serve this problem; the words say why."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    query: Any  # [batch, num_heads_q, seqlen, head_dim]
    key: Any  # [batch, num_heads_kv, seqlen, head_dim]
    value: Any  # as key
    is_causal: bool
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # flashcore's, is_causal aside
    peer_mask: Any = None  # the attn_mask that says all of it to PyTorch, is_causal too; None: there is none

    def explain(self) -> str:
        """The plan of flashcore's call."""
        import flashcore

        return str(flashcore.explain(self.query, self.key, self.value, is_causal=self.is_causal, **self.options))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Square self-attention: seqlen_q = seqlen_k = seqlen."""

    batch: int
    num_heads_q: int
    seqlen: int
    head_dim: int
    is_causal: bool = False
    dtype: str = "float16"
    num_heads_kv: int = 0  # 0: num_heads_q

    @property
    def heads_kv(self) -> int:
        return self.num_heads_kv or self.num_heads_q

    @property
    def name(self) -> str:
        heads = f"H{self.num_heads_q}" + (f" ({self.num_heads_kv} kv)" if self.num_heads_kv else "")
        mask = "causal" if self.is_causal else "full"
        return f"{self.dtype} D{self.head_dim} {mask} B{self.batch} {heads} S{self.seqlen}"

    @property
    def flops(self) -> float:
        """Two matmuls, two operations per multiply-add; causal counts half."""
        scores = self.batch * self.num_heads_q * self.seqlen * self.seqlen
        return 4.0 * scores * self.head_dim * (0.5 if self.is_causal else 1.0)

    @property
    def bytes(self) -> int:
        """Of one set: query, key, value and the output."""
        rows = self.batch * self.seqlen * 2 * (self.num_heads_q + self.heads_kv)
        return rows * self.head_dim * DTYPE_BYTES[self.dtype]

    def sets_beyond(self, cache_bytes: int) -> int:
        """How many input sets fill the cache twice, so that each call reads memory. At least two."""
        return max(2, math.ceil(2 * cache_bytes / self.bytes))

    def make(self, device: str, sets: int, seed: int = SEED) -> list[Inputs]:
        import torch

        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)

        def tensor(heads):
            shape = (self.batch, heads, self.seqlen, self.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        heads = (self.num_heads_q, self.heads_kv, self.heads_kv)
        return [Inputs(*map(tensor, heads), self.is_causal) for _ in range(sets)]


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    prepare: Callable[[Inputs], Callable[[], Any]]
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    kind: str = "peer"  # "ours"; "peer": competes; "note": shown, but in no comparison


def flashcore() -> Contender:
    def prepare(inputs):
        import flashcore

        return functools.partial(
            flashcore.attention, inputs.query, inputs.key, inputs.value, is_causal=inputs.is_causal, **inputs.options
        )

    return Contender("flashcore", prepare, kind="ours")


def sdpa(name: str, backend: str | None) -> Contender:
    """PyTorch's scaled_dot_product_attention, on one backend or (None) on the one that PyTorch chooses."""

    def prepare(inputs):
        import torch.nn.functional as F

        scores = inputs.query.numel() // inputs.query.shape[-1] * inputs.key.shape[-2]
        if backend == "MATH" and scores > MATH_SCORES_MAX:
            raise Refused(f"not run: it would hold {scores} scores in memory, over the {MATH_SCORES_MAX} allowed here")
        if inputs.options and inputs.peer_mask is None:
            raise Refused(f"PyTorch has no such option: {', '.join(inputs.options)}")
        options = {"is_causal": inputs.is_causal} if inputs.peer_mask is None else {"attn_mask": inputs.peer_mask}
        if inputs.query.shape[1] != inputs.key.shape[1]:
            options["enable_gqa"] = True
        return functools.partial(F.scaled_dot_product_attention, inputs.query, inputs.key, inputs.value, **options)

    def scope():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(getattr(SDPBackend, backend))

    return Contender(name, prepare, scope if backend else contextlib.nullcontext)


def with_gradients(contender: Contender) -> Contender:
    """The same call, and its gradients; returns that of the query."""

    def prepare(inputs):
        import torch

        leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
        query, key, value = leaves
        call = contender.prepare(dataclasses.replace(inputs, query=query, key=key, value=value))
        dout = torch.ones_like(inputs.query)
        return lambda: torch.autograd.grad(call(), leaves, dout)[0]

    return dataclasses.replace(contender, prepare=prepare)


def flash_attention_3() -> Contender:
    """FlashAttention-3 where it is installed. It wants [batch, seqlen, heads, head_dim]: given as views."""

    def prepare(inputs):
        try:
            from flash_attn_interface import flash_attn_func
        except ImportError as error:
            raise Refused(f"not installed: {error}") from error
        if inputs.options:
            raise Refused(f"it has none of {', '.join(inputs.options)}, or not as here")
        query, key, value = (tensor.transpose(1, 2) for tensor in (inputs.query, inputs.key, inputs.value))

        def call():
            result = flash_attn_func(query, key, value, causal=inputs.is_causal)
            return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

        return call

    return Contender("fa3", prepare)


def gpu_contenders() -> list[Contender]:
    return [
        sdpa("cudnn", "CUDNN_ATTENTION"),
        sdpa("flash", "FLASH_ATTENTION"),
        sdpa("efficient", "EFFICIENT_ATTENTION"),
        sdpa("math", "MATH"),
        flash_attention_3(),
        flashcore(),
    ]


def cpu_contenders() -> list[Contender]:
    return [sdpa("flash", "FLASH_ATTENTION"), sdpa("math", "MATH"), flashcore()]
