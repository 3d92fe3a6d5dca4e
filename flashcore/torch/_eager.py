"""A call's place in autograd's graph, without torch's dispatcher, which would cost more than a small call does.

The C function runs the forward like any other and comes here with its results (csrc/python/autograd.c). Kept are query,
key, value, out, lse and references to mask, slopes, sinks and dropout's seed. A backward of which torch must see more
than that (for a second derivative, a mode, a batched gradient) goes to the op.
"""

from __future__ import annotations

from typing import Any

import torch

from flashcore import _C
from flashcore.torch._op import call_backward, zero_gradient


class FlashCoreAttention(torch.autograd.Function):
    """The name is what a graph shows: FlashCoreAttentionBackward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any,
        alibi_slopes: Any,
        sinks: Any,
        dropout_seed: Any,
        call: tuple[Any, Any, bool, dict[str, Any]],
    ) -> Any:
        out, lse, return_lse, ctx.options = call
        ctx.save_for_backward(query, key, value, attn_mask, alibi_slopes, sinks, dropout_seed, out, lse)
        if not return_lse:
            return out
        ctx.set_materialize_grads(False)  # a result that took no part in the loss costs nothing
        return out, lse

    @staticmethod
    def backward(ctx: Any, *of_results: Any) -> Any:
        if torch.compiler.is_compiling():  # compiled autograd traces this, and cannot look into C
            dout, dlse = (*of_results, None)[:2]
            return backward_by_op(ctx.saved_tensors, dout, dlse, ctx.needs_input_grad, ctx.options)
        return _C.node_backward(ctx, *of_results)


def backward_by_op(saved: Any, dout: Any, dlse: Any, wanted: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    """The node's backward where its C function would hide something from torch."""
    if dout is None:  # the loss used lse alone
        dout = zero_gradient(saved[-2])
    return *call_backward(saved, dout, dlse, wanted[:6], options), None, None


# autograd.Function's own apply looks for functorch and default arguments first, which C has done.
apply = super(torch.autograd.Function, FlashCoreAttention).apply
