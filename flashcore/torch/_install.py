"""torch.nn.functional.scaled_dot_product_attention, replaced by flashcore's and put back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

import flashcore


class FallbackWarning(UserWarning):
    """A call went to PyTorch's scaled_dot_product_attention, under install(fallback=True); once per reason."""


_warned: set[str] = set()


def warn_of(reason: str) -> None:
    """Dynamo would leave a warning out of its graph; _dynamo.py has it call this while it traces."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"PyTorch's scaled_dot_product_attention serves a call: {reason}", FallbackWarning, stacklevel=3)


def _replacement(pytorchs: Callable[..., Any], fallback: bool) -> Callable[..., Any]:
    def scaled_dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """flashcore.attention in the place of PyTorch's scaled_dot_product_attention; see flashcore.torch.install."""
        arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        # Off inside an sdpa_kernel() that does not name FLASH_ATTENTION. Dynamo knows this one, not its public name.
        if not torch._C._get_flash_sdp_enabled():
            return pytorchs(*arguments[:6], scale=scale, enable_gqa=enable_gqa)
        if not fallback:
            return flashcore.attention(*arguments)
        try:
            return flashcore.attention(*arguments)
        except NotImplementedError as error:
            warn_of(str(error))
        return pytorchs(*arguments[:6], scale=scale, enable_gqa=enable_gqa)

    return scaled_dot_product_attention


class Installed:
    """What install() did. remove() undoes it, as does the end of a `with` block."""

    def __init__(self, fallback: bool) -> None:
        self._previous: Callable[..., Any] | None = torch.nn.functional.scaled_dot_product_attention
        self._ours = _replacement(self._previous, fallback)
        torch.nn.functional.scaled_dot_product_attention = self._ours

    def remove(self) -> None:
        """Puts back what was there before. Does nothing the second time.

        Raises RuntimeError where somebody has replaced the function since: undo that first.
        """
        if self._previous is None:
            return
        current = torch.nn.functional.scaled_dot_product_attention
        if current is not self._ours:
            raise RuntimeError(
                f"torch.nn.functional.scaled_dot_product_attention is {current!r} by now, not what install() put "
                "there; undo that replacement first"
            )
        torch.nn.functional.scaled_dot_product_attention = self._previous
        self._previous = None

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def install(fallback: bool = False) -> Installed:
    """Puts flashcore.attention where models look for torch.nn.functional.scaled_dot_product_attention.

        flashcore.torch.install()           # for good, or until .remove() of what it returns
        with flashcore.torch.install():     # for a block

    Who took the function by name before (from torch.nn.functional import scaled_dot_product_attention) keeps what he
    took. A torch.nn.attention.sdpa_kernel() that does not name FLASH_ATTENTION goes to PyTorch's own function.

    Args:
        fallback: False: a call that flashcore does not serve raises NotImplementedError, as flashcore.attention does.
            True: it goes to PyTorch's own function, with one FallbackWarning for each reason.
    """
    return Installed(fallback)
