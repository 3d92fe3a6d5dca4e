"""flashcore.attention in Python, for what its C function does not serve alone; it comes here having read the arguments.

`attention` is the call through torch.ops.flashcore.attention, for calls that torch's dispatcher must see, and what
torch.compile traces in place of the C function. `fold_and_call` is the eager call with gradients, of shapes that
broadcast.
"""

from __future__ import annotations

from typing import Any

import torch

from flashcore import _C
from flashcore.torch._eager import apply, backward_by_op
from flashcore.torch._op import call
from flashcore.torch._shapes import fold_call, tensor

__all__ = ["apply", "attention", "backward_by_op", "draw_seed", "fold_and_call"]


def draw_seed(query: Any) -> Any:
    """Dropout's seed and offset, from the default generator of the query's device: by one op, which a CUDA graph draws
    anew in each replay, checkpointing repeats, compilers trace, and vmap does as its `randomness` says."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=query.device)


def fold_and_call(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    *args: Any,
    alibi_slopes: Any = None,
    sinks: Any = None,
    layout: Any = None,
    return_lse: bool = False,
    dropout_seed: Any = None,
    **options: Any,
) -> Any:
    """flashcore.attention of arrays folded to four dimensions, which it serves itself."""
    layout = layout or "bhsd"
    (query, key, value, attn_mask, alibi_slopes, sinks), unfold = fold_call(
        query, key, value, attn_mask, alibi_slopes, sinks, layout
    )
    out, lse = _C.attention(
        query,
        key,
        value,
        attn_mask,
        *args,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        layout=layout,
        return_lse=True,
        dropout_seed=None if dropout_seed is None else tensor(dropout_seed),
        **options,
    )
    out, lse = unfold(out, lse)
    return (out, lse) if return_lse else out


def _length(x: Any, layout: str | None) -> Any:
    return x.shape[0] if x.ndim == 2 else x.shape[-3 if layout == "bshd" else -2]


def _read_bias(bias: Any, query: Any, key: Any, is_causal: Any, window: Any, diagonal: Any, layout: str | None) -> Any:
    """What is_causal says of one of torch.nn.attention.bias's objects."""
    if is_causal or window is not None or diagonal:
        raise ValueError(
            f"attn_mask is a CausalBias, which says all of causality, and is_causal is {is_causal!r}, "
            f"window {window!r}, diagonal {diagonal!r}; give one or the other"
        )
    lengths = (_length(query, layout), _length(key, layout))
    if (bias.seq_len_q, bias.seq_len_kv) != lengths:
        raise ValueError(
            f"attn_mask is a CausalBias of {bias.seq_len_q} rows and {bias.seq_len_kv} keys; the call has {lengths}"
        )
    return "lower_right" if bias.variant.name == "LOWER_RIGHT" else True


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
    layout: Any = "bhsd",
    return_lse: bool = False,
    out: Any = None,
    deterministic: bool = False,
    stream: Any = None,
    block_m: int | None = None,
    block_n: int | None = None,
    dropout_seed: Any = None,
) -> Any:
    """flashcore.attention through torch.ops.flashcore.attention, whatever its tensors are."""
    # A mask in name only: an argument will do, on the shortest way there is. Importing its class would load Dynamo.
    if type(attn_mask).__name__ == "CausalBias":
        causal = _read_bias(attn_mask, query, key, is_causal, window, diagonal, layout)
        return _C.attention(
            query,
            key,
            value,
            None,
            dropout_p,
            causal,
            scale,
            enable_gqa,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            layout=layout,
            return_lse=return_lse,
            out=out,
            deterministic=deterministic,
            block_m=block_m,
            block_n=block_n,
            dropout_seed=dropout_seed,
        )
    dropout_p = dropout_p or 0.0
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}; allowed: 0.0 to 1.0")
    for name, x in (("out", out), ("stream", stream)):
        if x is not None:
            raise NotImplementedError(
                f"{name} is given, but the call goes by torch's dispatcher (torch.compile, a tensor subclass, or a "
                f"torch mode or transform), which has no {name}; leave it away"
            )
    for name, x in (("key", key), ("value", value), ("attn_mask", attn_mask), ("dropout_seed", dropout_seed)):
        if getattr(x, "device", query.device) != query.device:
            raise ValueError(f"query is on {query.device} and {name} on {x.device}; all arrays must be on one device")
    if isinstance(is_causal, str):
        if is_causal != "lower_right":
            raise ValueError(f"is_causal is {is_causal!r}; allowed: True, False, 'lower_right'")
        is_causal, diagonal = True, "lower_right"
    layout = layout or "bhsd"
    if isinstance(diagonal, str):
        if diagonal != "lower_right":
            raise ValueError(f"diagonal is {diagonal!r}; allowed: an int or 'lower_right'")
        diagonal = _length(key, layout) - _length(query, layout)
    seed = None
    if dropout_p != 0:
        seed = draw_seed(query) if dropout_seed is None else tensor(dropout_seed)
    arrays, unfold = fold_call(query, key, value, attn_mask, alibi_slopes, sinks, layout)
    result, lse = call(
        *arrays,
        seed,
        is_causal=bool(is_causal),
        scale=None if scale is None else float(scale),
        window=None if window is None else [-1 if side is None else side for side in window],
        diagonal=diagonal,
        softcap=None if softcap is None else float(softcap),
        layout=layout,
        deterministic=bool(deterministic),
        block_m=block_m,
        block_n=block_n,
        dropout_p=float(dropout_p),
    )
    result, lse = unfold(result, lse)
    return (result, lse) if return_lse else result
