"""flashcore inside PyTorch. Nothing here need be imported for flashcore.attention, which reaches it where it must."""

from __future__ import annotations

from flashcore.torch import _call  # noqa: F401  registers torch.ops.flashcore.attention
