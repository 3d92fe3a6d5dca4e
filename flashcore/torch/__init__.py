"""flashcore inside PyTorch, beyond calling flashcore.attention, which needs no import of this module.

install()                                  put it in the place of F.scaled_dot_product_attention
register_transformers()                    attn_implementation="FlashCore" in Hugging Face transformers
activate_flash_attention_impl("flashcore") PyTorch's own switch, in torch.nn.attention; importing this lists the name
torch.ops.flashcore.attention              the operator that compilers and modes see
"""

from __future__ import annotations

from flashcore.torch import _call  # noqa: F401  registers torch.ops.flashcore.attention
from flashcore.torch._install import FallbackWarning, Installed, install
from flashcore.torch._registry import register as _register
from flashcore.torch._transformers import register_transformers

__all__ = ["FallbackWarning", "Installed", "install", "register_transformers"]

_register()
