"""The C side of flashcore; use the names in the package."""

from typing import Any, Literal, final

version: str
revision: str
cuda_archs: str

def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool | Literal["lower_right"] = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    diagonal: int | Literal["lower_right"] = 0,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    layout: Literal["bhsd", "bshd"] = "bhsd",
    return_lse: bool = False,
    out: Any = None,
    deterministic: bool = False,
    stream: Any = None,
    block_m: int | None = None,
    block_n: int | None = None,
    dropout_seed: Any = None,
) -> Any:
    """Exact scaled dot-product attention. The first eight arguments are PyTorch's, in order and meaning.

    For query row i and key j of one head, with d = j - i - diagonal:

        score = softcap(scale * q_i . k_j) + attn_mask_ij - alibi_slope * |d|
        out_i = sum_j softmax_j(score) v_j

    over the keys that masks leave visible (Vaswani et al., 2017, eq. 1). A row that sees no key gives 0, never NaN.

    Returns an array of query's kind, dtype, device and layout; with return_lse a pair of it and the log-sum-exp.
    Raises TypeError, ValueError, NotImplementedError, MemoryError, RuntimeError. help(flashcore.attention) has every
    argument.
    """

def plan(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """What attention(...) would run, as a dict; flashcore.explain dresses it."""

def forward(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """attention(..., return_lse=True) for kernels of torch's dispatcher, which has looked at modes, gradients and
    subclasses already: tensors are taken as the memory they are."""

def backward(
    saved: tuple[Any, ...], dout: Any, dlse: Any, wanted: tuple[bool, ...], options: dict[str, Any], /
) -> tuple[Any, ...]:
    """Gradients of attention(query, key, value, attn_mask, alibi_slopes=..., sinks=..., dropout_seed=..., **options).

    saved is (query, key, value, attn_mask, alibi_slopes, sinks, dropout_seed, out, lse), the last two being the call's
    results; dout and dlse (or None) are the gradients of these. wanted begins with a bool for each of the first six;
    the result is as long, and has their gradients, None where not wanted (nobody may want that of alibi_slopes). A
    gradient has its input's shape, dtype and, for torch tensors, order in memory. One batch dimension at most, which
    query, key and value share.

    Raises what attention(...) would raise, and ValueError for arrays that do not fit it.
    """

def node_backward(ctx: Any, *grad_outputs: Any) -> Any:
    """The backward of flashcore.torch's autograd node, for autograd to call with dout and perhaps dlse."""

def kernels() -> list[tuple[str, str, Literal["cpu", "cuda"], bool]]:
    """(name, family, device, does a device of this machine run it) of each kernel of this build, in the planner's
    order."""

def device(type: Literal["cpu", "cuda"], id: int = 0, /) -> dict[str, Any]:
    """Facts of a device. Raises RuntimeError where there is none."""

def cuda_devices() -> tuple[int, str]:
    """(number of GPUs, the reason where it is 0)."""

def measure(kernel: str, num_calls: int, /, *args: Any, **kwargs: Any) -> float:
    """Microseconds per call of attention(...) on this kernel, of num_calls in a row: device time on a GPU."""

def add_tuned(
    device_type: str,
    name: str,
    compute_capability: int,
    num_sms: int,
    isa: int,
    shape_class: int,
    kernel: str,
    /,
) -> None:
    """From now on, in this process, problems of this class on such a device run on this kernel."""

def clear_tuned() -> None:
    """Forgets all choices, in this process."""
@final
class Buffer:
    """Memory for a result of a kind that cannot be written; handed over through DLPack."""

    def __new__(cls, shape: tuple[int, ...], dtype: str, device_id: int, stream: int = ...) -> Buffer: ...
    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
