"""torch.ops.flashcore.attention and its backward, for whoever looks at operators: compile, export, functorch, modes.

Arrays have four dimensions (_shapes.py brings a call there), mask, slopes and sinks the same batch or one of 1. Eager
calls on plain tensors do not come here.
"""

from __future__ import annotations

from typing import Any

import torch

from flashcore import _C
from flashcore.torch._shapes import fold

# The options say what flashcore.attention's do, in types that a graph can hold; 'lower_right' has become a number.
_ARRAYS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask{0}, Tensor? alibi_slopes{0}, Tensor? sinks{0}, "
    "Tensor? dropout_seed{0}"
)
_OPTIONS = (
    "bool is_causal=False, float? scale=None, SymInt[]? window=None, SymInt diagonal=0, float? softcap=None, "
    "str layout='bhsd', bool deterministic=False, int? block_m=None, int? block_n=None, float dropout_p=0.0"
)
_library = torch.library.Library("flashcore", "DEF")
_library.define(
    f"attention({_ARRAYS.format('=None')}, *, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"attention_backward({_ARRAYS.format('')}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool[6] wanted, *, "
    f"{_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# ---- the kernels ----


def _empty_result(query: Any, value: Any) -> Any:
    """Heads and rows in the query's order in memory, as in an eager call. For both kernels below: compilers trust what
    the fake one says.
    """
    batch, *sizes, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, *reversed(sizes), value.shape[-1])).transpose(1, 2)
    return query.new_empty((batch, *sizes, value.shape[-1]))


# The dispatcher leaves out arguments that hold their default.
def _forward(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_seed: Any = None,
    **options: Any,
) -> Any:
    if query.ndim == value.ndim == 4:  # else it is refused, in words
        options["out"] = _empty_result(query, value)
    return _C.forward(
        query, key, value, attn_mask, alibi_slopes=alibi_slopes, sinks=sinks, dropout_seed=dropout_seed, **options
    )


def _fake_forward(query: Any, key: Any, value: Any, *others: Any, layout: str = "bhsd", **options: Any) -> Any:
    batch, heads, rows, head_dim = query.shape if layout == "bhsd" else query.transpose(1, 2).shape
    _, heads_kv, keys, _ = key.shape if layout == "bhsd" else key.transpose(1, 2).shape
    _, heads_v, keys_v, _ = value.shape if layout == "bhsd" else value.transpose(1, 2).shape
    fits = key.shape[0] == batch and value.shape[0] == batch and key.shape[3] == head_dim and keys == keys_v
    if not (fits and heads_kv == heads_v and heads % heads_kv == 0):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} do not fit together in "
            f"layout {layout!r}: batch and key's head_dim and length must agree, and query's heads be a multiple"
        )
    out = _empty_result(query, value)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty((batch, heads, rows), dtype=lse_dtype)


# A gradient that is not wanted is an empty tensor: results of an op are a fixed number of tensors.
def _backward(*args: Any, **options: Any) -> list[Any]:
    *saved, dout, dlse, wanted = args
    dq, dk, dv, dbias, _, dsinks = _C.backward(tuple(saved), dout, dlse, tuple(wanted), options)
    return [dout.new_empty(0) if x is None else x for x in (dq, dk, dv, dbias, dsinks)]


def _fake_backward(*args: Any, **options: Any) -> list[Any]:
    inputs, wanted, dout = [*args[:4], args[5]], [*args[-1][:4], args[-1][5]], args[9]
    return [torch.empty_like(x) if want else dout.new_empty(0) for x, want in zip(inputs, wanted, strict=True)]


# ---- autograd ----


def zero_gradient(out: Any) -> Any:
    """dout of a loss that used lse alone."""
    return out.new_zeros(()).expand_as(out)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Any, Any]) -> None:
    slopes = inputs[4]
    if slopes is not None and slopes.requires_grad:
        raise NotImplementedError(
            "alibi_slopes requires a gradient, and flashcore computes none: slopes are constants to it; pass "
            "alibi_slopes.detach(), or give the slopes' term as an attn_mask, which has a gradient"
        )
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)  # a result that took no part in the loss costs nothing


def call_backward(saved: Any, dout: Any, dlse: Any, wanted: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    """The backward through its op: the gradients of the first six of `saved`, None where not wanted."""
    wanted = list(wanted)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        results = _TransformedBackward.apply(*saved, dout, dlse, _Opaque((wanted, options)))
    else:
        results = torch.ops.flashcore.attention_backward(*saved, dout, dlse, wanted, **options)
    dq, dk, dv, dbias, dsinks = results
    return tuple(x if want else None for x, want in zip((dq, dk, dv, dbias, None, dsinks), wanted, strict=True))


def _differentiate(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if dout is None:
        dout = zero_gradient(saved[-2])
    needs = (*ctx.needs_input_grad, False, False, False)  # options that were left out have no entry
    return *call_backward(saved, dout, dlse, needs[:6], ctx.options), None  # dropout_seed has none


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "flashcore computes no second derivatives (this is the backward of its backward); leave create_graph away, or "
        "use torch's scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) for this loss"
    )


# ---- autocast ----


def _autocast_on(device: str) -> Any:
    """As PyTorch's scaled_dot_product_attention: all to autocast's dtype but float64; slopes and sinks stay float32."""

    def cast(x: Any, dtype: Any, kept: Any) -> Any:
        if x is None or not x.is_floating_point() or x.dtype in kept or x.device.type != device:
            return x
        return x.to(dtype)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        slopes: Any = None,
        sinks: Any = None,
        dropout_seed: Any = None,
        **options: Any,
    ) -> Any:
        dtype = torch.get_autocast_dtype(device)
        arrays = [cast(x, dtype, (torch.float64,)) for x in (query, key, value, attn_mask)]
        arrays += [cast(x, dtype, (torch.float32, torch.float64)) for x in (slopes, sinks)]
        with torch.autocast(device, enabled=False):
            return torch.ops.flashcore.attention(*arrays, dropout_seed, **options)

    return attention


# ---- vmap ----


def _spread(x: Any, dim: int | None, size: int, batch: Any) -> Any:
    """x of every sample and batch, as [size * batch, ...]; dim is where vmap has put the samples."""
    if x is None:
        return None
    x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    return fold(x, (size, batch), x.ndim - 2)


def _each(function: Any, info: Any, in_dims: tuple[Any, ...], *arrays: Any) -> Any:
    """One call for each sample: with dropout, whose numbers count batches, so that samples made batches would draw
    others than the samples alone."""
    results = []
    for i in range(info.batch_size):
        sample = (x if dim is None else x.select(dim, i) for x, dim in zip(arrays, in_dims, strict=False))
        results.append(function(*sample))
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _drops(arrays: tuple[Any, ...]) -> bool:
    return len(arrays) > 6 and arrays[6] is not None


def _vmap_call(function: Any, info: Any, in_dims: tuple[Any, ...], query: Any, *others: Any) -> Any:
    if _drops((query, *others)):
        return _each(function, info, in_dims, query, *others)
    size, batch = info.batch_size, query.shape[0 if in_dims[0] != 0 else 1]
    out, lse = function(*(_spread(x, dim, size, batch) for x, dim in zip((query, *others), in_dims, strict=False)))
    return (out.unflatten(0, (size, batch)), lse.unflatten(0, (size, batch))), (0, 0)


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *arrays: Any, **options: Any) -> Any:
    return _vmap_call(lambda *x: torch.ops.flashcore.attention(*x, **options), info, in_dims, *arrays)


def _vmap_call_backward(function: Any, info: Any, in_dims: tuple[Any, ...], wanted: Any, *arrays: Any) -> Any:
    if _drops(arrays):
        return _each(function, info, in_dims, *arrays)
    size, batch = info.batch_size, arrays[0].shape[0 if in_dims[0] != 0 else 1]
    spread = [_spread(x, dim, size, batch) for x, dim in zip(arrays, in_dims, strict=False)]
    spread[7:9] = [x.contiguous() for x in spread[7:9]]  # results, which the library knows without overlap
    results = []
    for i, gradient in zip((0, 1, 2, 3, 5), function(*spread), strict=True):
        if not wanted[i]:
            results.append(gradient.new_empty(size, 0))
            continue
        own = arrays[i].shape[0 if in_dims[i] != 0 else 1]  # a mask or sinks of 1 stood for all batches
        gradient = gradient.unflatten(0, (size, batch))
        results.append(gradient if own == batch else gradient.sum(1, keepdim=True))
    return tuple(results), (0,) * len(results)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any, **options: Any) -> Any:
    *arrays, wanted = args
    function = lambda *x: torch.ops.flashcore.attention_backward(*x, wanted, **options)  # noqa: E731
    return _vmap_call_backward(function, info, in_dims, wanted, *arrays)


# ---- functorch, which differentiates Functions of this form and not what register_autograd makes ----


class _Opaque:
    """Something that functorch, which looks into dicts and lists for tensors, takes as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        *arrays, options = args
        return torch.ops.flashcore.attention(*arrays, **options.value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
        *arrays, options = inputs
        _save(ctx, tuple(arrays), options.value, output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        *arrays, options = args
        return _vmap_call(lambda *x: _Transformed.apply(*x, options), info, in_dims, *arrays)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        return *_differentiate(ctx, dout, dlse), None


class _TransformedBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        *arrays, rest = args
        wanted, options = rest.value
        return torch.ops.flashcore.attention_backward(*arrays, wanted, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        *arrays, rest = args
        function = lambda *x: _TransformedBackward.apply(*x, rest)  # noqa: E731
        return _vmap_call_backward(function, info, in_dims, rest.value[0], *arrays)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        _refuse_second_derivative(ctx, *gradients)


def call(*arrays: Any, **options: Any) -> Any:
    """torch.ops.flashcore.attention, differentiable under functorch's transforms too."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*arrays, _Opaque(options))
    return torch.ops.flashcore.attention(*arrays, **options)


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _forward, _device)
    _library.impl("attention", _autocast_on(_device.lower()), f"Autocast{_device}")
    _library.impl("attention_backward", _backward, _device)
torch.library.register_fake("flashcore::attention", _fake_forward, lib=_library)
torch.library.register_fake("flashcore::attention_backward", _fake_backward, lib=_library)
torch.library.register_autograd("flashcore::attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("flashcore::attention_backward", _refuse_second_derivative, lib=_library)
torch.library.register_vmap("flashcore::attention", _vmap_forward, lib=_library)
torch.library.register_vmap("flashcore::attention_backward", _vmap_backward, lib=_library)
