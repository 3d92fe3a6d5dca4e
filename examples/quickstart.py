"""The shortest programs: attention on NumPy arrays, and on PyTorch tensors under the name that models call."""

import numpy as np

import flashcore

shape = (3, 2, 8, 1024, 64)  # query, key and value of [batch, heads, seqlen, head_dim]
query, key, value = np.random.default_rng(42).standard_normal(shape, np.float32)
out = flashcore.attention(query, key, value, is_causal=True)
print("NumPy:", out.shape, out.dtype, flashcore.explain(query, key, value, is_causal=True))

try:
    import torch
except ImportError:
    raise SystemExit("PyTorch: not installed") from None

device = "cuda" if torch.cuda.is_available() else "cpu"
query, key, value = (torch.from_numpy(array).to(device) for array in (query, key, value))
torch.nn.functional.scaled_dot_product_attention = flashcore.attention  # from here on, every model calls it
out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
print("PyTorch:", out.shape, out.dtype, out.device)
