"""A call in the form of torch.ops.flashcore.attention: four dimensions, one of them for all batches, nothing broadcast
between query, key and value.

Views do it, which autograd and functorch follow themselves: sums over what was broadcast are PyTorch's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def tensor(x: Any) -> Any:
    """An operand of another kind, beside a query that is a tensor."""
    return x if isinstance(x, torch.Tensor) else torch.from_dlpack(x)


def fold(x: Any, batch: Any, num_kept: int) -> Any:
    """x over the whole batch shape, its batch dimensions made one: a view, but where a broadcast does not fold."""
    if x.shape[: x.ndim - num_kept] == batch and len(batch) == 1:
        return x
    kept = x.shape[x.ndim - num_kept :]
    return x.expand(*batch, *kept).reshape(math.prod(batch), *kept)


def _fold_option(x: Any, batch: Any, num_kept: int) -> Any:
    """The same for a mask, sinks or slopes, which stay as small as they are where they are the same in all batches."""
    if x is None:
        return None
    x = tensor(x)
    while x.ndim < num_kept:
        x = x.unsqueeze(0)
    kept = x.shape[x.ndim - num_kept :]
    if math.prod(x.shape[: x.ndim - num_kept]) == 1:
        return x.reshape(1, *kept)
    return fold(x, batch, num_kept)


def _repeat(x: Any, dim: int, size: Any) -> Any:
    """A dimension of 1 seen `size` times; others as they are."""
    return x.expand([size if i == x.ndim + dim else n for i, n in enumerate(x.shape)]) if x.shape[dim] == 1 else x


def fold_call(
    query: Any, key: Any, value: Any, attn_mask: Any, alibi_slopes: Any, sinks: Any, layout: str
) -> tuple[tuple[Any, ...], Callable[[Any, Any], tuple[Any, Any]]]:
    """(the six arrays folded, what gives results (out, lse) the shapes of the unfolded call).

    Shapes are those of flashcore.attention, which has checked them, or whose op will.
    """
    query, key, value = tensor(query), tensor(key), tensor(value)
    ndim = max(query.ndim, key.ndim, value.ndim)
    head = -3 if layout == "bhsd" else -2
    query, key, value = (x.unsqueeze(head) if x.ndim == 2 else x for x in (query, key, value))
    batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    (num_heads_kv,) = torch.broadcast_shapes((key.shape[head],), (value.shape[head],))
    if num_heads_kv != 1:  # one head serves all of the others' there, too
        query, key, value = (_repeat(x, head, num_heads_kv) for x in (query, key, value))
    arrays = (*(fold(x, batch, 3) for x in (query, key, value)), _fold_option(attn_mask, batch, 3))
    arrays += (_fold_option(alibi_slopes, batch, 1), _fold_option(sinks, batch, 1))

    def unfold(out: Any, lse: Any) -> tuple[Any, Any]:
        if len(batch) != 1:
            out, lse = out.reshape(*batch, *out.shape[1:]), lse.reshape(*batch, *lse.shape[1:])
        if ndim == 2:
            out, lse = out.squeeze(head), lse.squeeze(-2)
        return out, lse

    return arrays, unfold
