"""flashcore among PyTorch's own flash attention implementations: activate_flash_attention_impl("flashcore").

PyTorch chooses the backend of each scaled_dot_product_attention as ever; where that is FLASH_ATTENTION, what runs is
flashcore: kernels of the same operators, with their shapes, strides and conventions.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.attention

import flashcore
from flashcore import _C
from flashcore.torch._call import draw_seed

NAME = "flashcore"


def _laid_out(x: Any, order: tuple[int, ...]) -> Any:
    """x with its dimensions in this order in memory: compiled code relies on what the operator's fake kernel says."""
    made = torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device)
    return x if x.stride() == made.stride() else made.copy_(x)


def _cpu(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> tuple[Any, Any]:
    if dropout_p:  # PyTorch asks another backend then
        raise NotImplementedError(
            f"dropout_p is {dropout_p}, and PyTorch's CPU operator has no result in which its backward would find the "
            "seed; call flashcore.attention, or use flashcore.torch.install()"
        )
    out = torch.empty_like(query)
    _, lse = _C.forward(query, key, value, attn_mask, 0.0, is_causal, scale, out=out)
    return out, _laid_out(lse, (0, 2, 1))


def _cpu_backward(
    dout: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    saved = (query, key, value, attn_mask, None, None, None, out, lse)
    options = {"is_causal": is_causal, "scale": scale}
    gradients = _C.backward(saved, dout, None, (True, True, True, False, False, False), options)
    return tuple(_laid_out(x, (0, 2, 1, 3)) for x in gradients[:3])


def _cuda(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Causal is from the lower right corner here, as in FlashAttention; PyTorch asks it of other squares itself."""
    out = torch.empty_like(query)
    causal = "lower_right" if is_causal else False
    # Seed and offset both, which the operator hands to its backward; the place of the offset alone stays empty.
    seed = draw_seed(query) if dropout_p else torch.zeros((2,), dtype=torch.int64, device=query.device)
    _, lse = _C.forward(query, key, value, None, dropout_p, causal, scale, out=out, dropout_seed=seed)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    return out, lse, None, None, query.shape[2], key.shape[2], seed.view(torch.uint64), unused, query.new_empty(0)


def _cuda_backward(
    dout: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    is_causal: bool,
    seed: Any,
    offset: Any,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    options = {"is_causal": is_causal, "scale": scale, "diagonal": seqlen_k - seqlen_q if is_causal else 0}
    options["dropout_p"] = dropout_p
    saved = (query, key, value, None, None, None, seed, out, lse)
    return _C.backward(saved, dout, None, (True, True, True, False, False, False), options)[:3]


class _Handle:
    """The kernels in force, until remove()."""

    def __init__(self) -> None:
        self._libraries: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that PyTorch's kernels are overridden: what was asked for
            self._override("CPU", "_scaled_dot_product_flash_attention_for_cpu", _cpu, _cpu_backward)
            if any(kernel.device == "cuda" and kernel.usable for kernel in flashcore.kernels()):
                self._override("CUDA", "_scaled_dot_product_flash_attention", _cuda, _cuda_backward)

    def _override(self, device: str, name: str, forward: Any, backward: Any) -> None:
        library = torch.library.Library("aten", "IMPL", device)
        library.impl(name, forward)
        library.impl(f"{name}_backward", backward)
        self._libraries.append(library)

    def remove(self) -> None:
        self._libraries.clear()


def register() -> None:
    """Lists "flashcore" in torch.nn.attention.list_flash_attention_impls(), from torch 2.11 on; activates nothing."""
    register_impl = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register_impl is not None:
        register_impl(NAME, register_fn=_Handle)
