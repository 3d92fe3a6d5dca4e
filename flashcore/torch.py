"""Attention with gradients: torch.ops.flashcore.attention, and the way to it from flashcore.attention.

The C function serves a plain call by itself and comes here, importing this module, when a tensor requires a gradient.
It has checked every argument by then. `attention` brings the call into the op's form, four dimensions with one for the
batch, by views that autograd follows itself; so sums over what was broadcast are PyTorch's work, and the op's backward
is one call of the library.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from flashcore import _C

# The options say what flashcore.attention's do, in types that a graph can hold; 'lower_right' has become a number.
_OPTIONS = (
    "bool is_causal=False, float? scale=None, SymInt[]? window=None, SymInt diagonal=0, float? softcap=None, "
    "str layout='bhsd', bool deterministic=False, int? block_m=None, int? block_n=None"
)
_library = torch.library.Library("flashcore", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, Tensor? alibi_slopes=None, "
    f"Tensor? sinks=None, *, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, bool[5] wanted, *, {_OPTIONS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# The dispatcher leaves out arguments that hold their default.
def _forward(
    query: Any, key: Any, value: Any, attn_mask: Any = None, alibi_slopes: Any = None, sinks: Any = None, **options: Any
) -> Any:
    return _C.attention(
        query, key, value, attn_mask, alibi_slopes=alibi_slopes, sinks=sinks, return_lse=True, **options
    )


def _fake_forward(query: Any, key: Any, value: Any, *others: Any, layout: str = "bhsd", **options: Any) -> Any:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    batch, heads, rows, _ = query.shape if layout == "bhsd" else query.transpose(1, 2).shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty((batch, heads, rows), dtype=lse_dtype)


def _new_gradients(query: Any, key: Any, value: Any, attn_mask: Any, sinks: Any, wanted: list[bool]) -> dict[str, Any]:
    """Arrays laid in memory as their inputs are, where these are dense."""
    inputs = {"dq": query, "dk": key, "dv": value, "dbias": attn_mask, "dsinks": sinks}
    return {name: torch.empty_like(x) for (name, x), want in zip(inputs.items(), wanted, strict=True) if want}


def _backward(
    dout: Any,
    dlse: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    attn_mask: Any,
    alibi_slopes: Any,
    sinks: Any,
    wanted: list[bool],
    **options: Any,
) -> list[Any]:
    gradients = _new_gradients(query, key, value, attn_mask, sinks, wanted)
    arrays = {"out": out, "lse": lse, "dout": dout, "dlse": dlse} | gradients
    _C.backward(arrays, query, key, value, attn_mask, alibi_slopes=alibi_slopes, sinks=sinks, **options)
    return list(gradients.values())


def _fake_backward(dout: Any, dlse: Any, *others: Any, **options: Any) -> list[Any]:
    query, key, value, _, _, attn_mask, _, sinks, wanted = others
    return list(_new_gradients(query, key, value, attn_mask, sinks, wanted).values())


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, Any]) -> None:
    query, key, value, attn_mask, alibi_slopes, sinks = inputs
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise NotImplementedError(
            "alibi_slopes requires a gradient, and flashcore computes none: slopes are constants to it; pass "
            "alibi_slopes.detach(), or give the slopes' term as an attn_mask, which has a gradient"
        )
    ctx.save_for_backward(query, key, value, *output, attn_mask, alibi_slopes, sinks)
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)  # an lse that took no part in the loss costs nothing


def _differentiate(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
    query, key, value, out, lse, attn_mask, alibi_slopes, sinks = ctx.saved_tensors
    if dout is None:  # the loss used lse alone
        dout = out.new_zeros(()).expand_as(out)
    needs = (*ctx.needs_input_grad, False, False, False)  # options that were left out have no entry
    wanted = [*needs[:4], needs[5]]
    gradients = iter(
        torch.ops.flashcore.attention_backward(
            dout, dlse, query, key, value, out, lse, attn_mask, alibi_slopes, sinks, wanted, **ctx.options
        )
    )
    dq, dk, dv, dbias, dsinks = (next(gradients) if want else None for want in wanted)
    return dq, dk, dv, dbias, None, dsinks


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "flashcore computes no second derivatives (this is the backward of its backward); leave create_graph away, or "
        "use torch's scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) for this loss"
    )


_library.impl("attention", _forward, "CPU")
_library.impl("attention_backward", _backward, "CPU")
torch.library.register_fake("flashcore::attention", _fake_forward, lib=_library)
torch.library.register_fake("flashcore::attention_backward", _fake_backward, lib=_library)
torch.library.register_autograd("flashcore::attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("flashcore::attention_backward", _refuse_second_derivative, lib=_library)


# ---- the call in the op's form ----


def _fold(x: Any, batch: Any, num_kept: int) -> Any:
    """x over the whole batch shape, its batch dimensions made one: a view, but where a broadcast does not fold."""
    if x.shape[: x.ndim - num_kept] == batch and len(batch) == 1:
        return x
    kept = x.shape[x.ndim - num_kept :]
    return x.expand(*batch, *kept).reshape(math.prod(batch), *kept)


def _fold_option(x: Any, batch: Any, num_kept: int) -> Any:
    """The same for a mask, sinks or slopes, which stay as small as they are where they are the same in all batches."""
    if x is None:
        return None
    x = _tensor(x)
    while x.ndim < num_kept:
        x = x.unsqueeze(0)
    kept = x.shape[x.ndim - num_kept :]
    if x.shape[: x.ndim - num_kept].numel() == 1:
        return x.reshape(1, *kept)
    return _fold(x, batch, num_kept)


def _repeat(x: Any, dim: int, size: Any) -> Any:
    """A dimension of 1 seen `size` times; others as they are."""
    return x.expand([size if i == x.ndim + dim else n for i, n in enumerate(x.shape)]) if x.shape[dim] == 1 else x


def _tensor(x: Any) -> Any:
    """An operand of another kind, beside a query that is a tensor."""
    return x if isinstance(x, torch.Tensor) else torch.from_dlpack(x)


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Any = None,
    diagonal: int | str | None = 0,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    layout: str | None = "bhsd",
    return_lse: bool = False,
    out: None = None,
    deterministic: bool = False,
    stream: None = None,
    block_m: int | None = None,
    block_n: int | None = None,
) -> Any:
    """flashcore.attention through torch.ops.flashcore.attention, whatever its tensors require."""
    query, key, value = (_tensor(x) for x in (query, key, value))
    layout = layout or "bhsd"
    ndim = max(query.ndim, key.ndim, value.ndim)
    head, row = (-3, -2) if layout == "bhsd" else (-2, -3)
    query, key, value = (x.unsqueeze(head) if x.ndim == 2 else x for x in (query, key, value))
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    (num_heads_kv,) = torch.broadcast_shapes((key.shape[head],), (value.shape[head],))
    if num_heads_kv != 1:  # one head serves all of the others' there, too
        query, key, value = (_repeat(x, head, num_heads_kv) for x in (query, key, value))

    if is_causal == "lower_right":
        is_causal, diagonal = True, "lower_right"
    if diagonal == "lower_right":
        diagonal = key.shape[row] - query.shape[row]
    result, lse = torch.ops.flashcore.attention(
        *(_fold(x, batch, 3) for x in (query, key, value)),
        _fold_option(attn_mask, batch, 3),
        _fold_option(alibi_slopes, batch, 1),
        _fold_option(sinks, batch, 1),
        is_causal=bool(is_causal),
        scale=None if scale is None else float(scale),
        window=None if window is None else [-1 if side is None else int(side) for side in window],
        diagonal=diagonal,
        softcap=None if softcap is None else float(softcap),
        layout=layout,
        deterministic=bool(deterministic),
        block_m=block_m,
        block_n=block_n,
    )
    if len(batch) != 1:
        result, lse = result.reshape(*batch, *result.shape[1:]), lse.reshape(*batch, *lse.shape[1:])
    if ndim == 2:
        result, lse = result.squeeze(head), lse.squeeze(-2)
    return (result, lse) if return_lse else result
