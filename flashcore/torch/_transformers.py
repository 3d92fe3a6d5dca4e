"""attn_implementation="FlashCore" for Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch

import flashcore


def _add(bias: Any, mask: Any) -> Any:
    """One mask of a learned position bias and a mask."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    **others: Any,
) -> tuple[Any, None]:
    """What transformers calls in a layer: query [batch, heads, rows, head_dim], key and value with heads of their own.

    attention_mask is what flashcore's entry in AttentionMaskInterface made: bool, None where is_causal says it all, or
    a float that the user gave. Returns ([batch, rows, heads, head_dim_v], None).
    """
    if others.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions=True asks for the attention weights, which flashcore never forms; load the model with "
            'attn_implementation="eager" for them'
        )
    if others.get("cache") is not None:
        raise NotImplementedError(
            'a paged cache (continuous batching) is not served by flashcore yet; use attn_implementation="sdpa"'
        )
    if attention_mask is None and others.get("cu_seq_lens_q") is not None:
        raise NotImplementedError(
            "packed sequences (cu_seq_lens_q) without a mask are not served by flashcore yet; pass their position_ids, "
            "of which transformers makes one"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = query.shape[2] > 1 and attention_mask is None and causal  # one row is the last: it sees every key
    if position_bias is not None:
        attention_mask = _add(position_bias, attention_mask)  # is_causal applies beside it
    out = flashcore.attention(
        query.transpose(1, 2),  # as the projections made them, and as the result is wanted
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        dropout,
        causal,
        scaling,
        softcap=softcap,
        sinks=s_aux,
        layout="bshd",
    )
    return out, None


def register_transformers(name: str = "FlashCore") -> None:
    """Makes attn_implementation="FlashCore" known to Hugging Face transformers.

        flashcore.torch.register_transformers()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="FlashCore")

    What flashcore does not serve raises NotImplementedError in the model's forward: attention weights, paged caches,
    packed sequences without a mask.

    Args:
        name: another name, without "flash" in lower case: transformers takes that for one of FlashAttention's family,
            looks for its package, and gives it packed sequences and no masks.

    Raises ValueError for such a name; ImportError where transformers is not there, or has no AttentionMaskInterface.
    """
    if "flash" in name:
        raise ValueError(
            f"the name {name!r} has 'flash' in it, which transformers takes for FlashAttention's packages and their "
            'way of masking; leave it at "FlashCore", or choose another'
        )
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise ImportError("transformers is not there, or too old: pip install -U transformers") from error
    AttentionInterface.register(name, forward)
    # Without its own entry here, a model would be given no mask at all, and be causal no more, silently.
    AttentionMaskInterface.register(name, sdpa_mask)
