"""Which arrays are taken, by which protocol, and what comes back."""

from __future__ import annotations

from typing import Any

import cases
import ml_dtypes
import numpy as np
import pytest
import reference
from devices import fetch, same_bits, to_torch
from reference import Array

import flashcore
from flashcore import _C


def qkv(dtype: str = "float32", rows: int = 5, keys: int = 7) -> list[Array]:
    rng = np.random.default_rng(42)
    return [rng.standard_normal((2, 3, n, 16)).astype(cases.DTYPES[dtype]) for n in (rows, keys, keys)]


class Unversioned:
    """An old producer: no max_version, a capsule named 'dltensor'."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Versioned(Unversioned):
    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **_: Any) -> Any:
        assert max_version >= (1, 0)
        return self.array.__dlpack__(max_version=max_version)


# NumPy


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_numpy_in_numpy_out(dtype: str) -> None:
    arrays = qkv(dtype)
    out, lse = flashcore.attention(*arrays, return_lse=True)
    assert type(out) is type(lse) is np.ndarray
    assert out.dtype == arrays[0].dtype
    assert out.flags.c_contiguous
    assert out.flags.owndata
    assert out.flags.writeable
    reference.assert_close(out, *arrays)


def test_numpy_strides_of_single_things_mean_nothing() -> None:
    row = np.ndarray((1, 1, 1, 16), np.float32, np.arange(16, dtype=np.float32), strides=(7, 7, 7, 4))
    assert same_bits(flashcore.attention(row, row, row), row.copy())


def test_numpy_read_only_inputs_are_fine() -> None:
    arrays = qkv()
    want = flashcore.attention(*arrays)
    for array in arrays:
        array.flags.writeable = False
    assert same_bits(flashcore.attention(*arrays), want)
    broadcast = np.broadcast_to(arrays[1][:, :1], arrays[1].shape)
    assert same_bits(
        flashcore.attention(arrays[0], broadcast, arrays[2]),
        flashcore.attention(arrays[0], broadcast.copy(), arrays[2]),
    )


def test_numpy_memmap(tmp_path: Any) -> None:
    query, key, value = qkv()
    mapped = np.memmap(tmp_path / "key.bin", dtype=np.float32, mode="w+", shape=key.shape)
    mapped[...] = key
    assert same_bits(flashcore.attention(query, mapped, value), flashcore.attention(query, key, value))


@pytest.mark.parametrize("which", range(3))
def test_numpy_byte_swapped_is_refused(which: int) -> None:
    arrays = qkv()
    arrays[which] = arrays[which].astype(">f4")
    with pytest.raises(ValueError, match=r"byte-swapped.*newbyteorder"):
        flashcore.attention(*arrays)


@pytest.mark.parametrize("which", range(3))
def test_numpy_unaligned_is_refused(which: int) -> None:
    arrays = qkv()
    raw = np.zeros(arrays[which].nbytes + 1, np.uint8)
    arrays[which] = raw[1:].view(np.float32).reshape(arrays[which].shape)
    with pytest.raises(ValueError, match=r"aligned.*ascontiguousarray"):
        flashcore.attention(*arrays)


def test_numpy_strides_between_elements_are_refused() -> None:
    record = np.zeros((2, 3, 7), np.dtype([("x", np.float32, (16,)), ("odd", np.uint8)]))
    arrays = qkv()
    arrays[1] = record["x"]
    with pytest.raises(ValueError, match="aligned"):
        flashcore.attention(*arrays)


@pytest.mark.parametrize(
    "dtype", ["int8", "int64", "uint16", "bool", "complex64", "longdouble", "object", "U4", "M8[s]", "V2"]
)
def test_numpy_other_dtypes_are_refused(dtype: str) -> None:
    arrays = [np.zeros((2, 3, 4, 16), dtype) for _ in range(3)]
    with pytest.raises(ValueError, match=r"query has dtype .*float16"):
        flashcore.attention(*arrays)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int4"])
def test_other_ml_dtypes_are_refused(dtype: str) -> None:
    arrays = [np.zeros((2, 3, 4, 16), getattr(ml_dtypes, dtype)) for _ in range(3)]
    with pytest.raises(ValueError, match=dtype):
        flashcore.attention(*arrays)


def test_numpy_masked_array_is_refused() -> None:
    arrays = qkv()
    with pytest.raises(TypeError, match="MaskedArray"):
        flashcore.attention(np.ma.masked_less(arrays[0], 0), *arrays[1:])


@pytest.mark.parametrize("ndim", [0, 1])
def test_too_few_dimensions(ndim: int) -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        flashcore.attention(*[np.zeros((4,) * ndim, np.float32)] * 3)


# Kinds


@pytest.mark.parametrize("kind", [Unversioned, Versioned])
def test_objects_with_dlpack(kind: type[Unversioned]) -> None:
    query, key, value = qkv()
    want = flashcore.attention(query, key, value)
    assert same_bits(flashcore.attention(query, kind(key), kind(value)), want)
    out = np.empty_like(want)
    assert flashcore.attention(kind(query), kind(key), kind(value), out=out) is out
    assert same_bits(out, want)


def test_query_of_unknown_kind_needs_out() -> None:
    query, key, value = qkv()
    with pytest.raises(TypeError, match=r"Unversioned.*out="):
        flashcore.attention(Unversioned(query), key, value)


@pytest.mark.parametrize("kind", [Unversioned, Versioned])
def test_dlpack_masks_and_slopes(kind: type[Unversioned]) -> None:
    arrays = qkv()
    mask = np.random.default_rng(1).random((5, 7)) < 0.5
    slopes = np.array([0.5, 0.25, 0.1], np.float32)
    plain = flashcore.attention(*arrays, attn_mask=mask, alibi_slopes=slopes, sinks=slopes)
    boxed = flashcore.attention(*arrays, attn_mask=kind(mask), alibi_slopes=kind(slopes), sinks=kind(slopes))
    assert same_bits(plain, boxed)


def test_dlpack_read_only_out_is_refused() -> None:
    arrays = qkv()
    out = np.empty_like(arrays[0])
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        flashcore.attention(*arrays, out=Versioned(out))


def test_torch_cpu_in_torch_out() -> None:
    torch = pytest.importorskip("torch")
    for name, dtype in cases.DTYPES.items():
        arrays = [cases.place(x) for x in qkv(name)]
        out, lse = flashcore.attention(*map(to_torch, arrays), return_lse=True)
        assert type(out) is type(lse) is torch.Tensor
        assert out.dtype == getattr(torch, name)
        assert not out.requires_grad
        assert out.is_contiguous()
        reference.expect(*arrays).check(fetch(out), fetch(lse))
        assert fetch(out).dtype == dtype


def test_jax_cpu_in_jax_out() -> None:
    jax = pytest.importorskip("jax")
    for name in ("float32", "float16", "bfloat16"):
        arrays = qkv(name)
        result = flashcore.attention(*map(jax.numpy.asarray, arrays), is_causal=True)
        assert isinstance(result, jax.Array)
        assert result.dtype == arrays[0].dtype
        reference.assert_close(np.asarray(result), *arrays, is_causal=True)
        result.block_until_ready()
        assert np.isfinite(np.asarray((result * 2).astype("float32"))).all()


def test_jax_tracers_are_refused() -> None:
    jax = pytest.importorskip("jax")
    arrays = list(map(jax.numpy.asarray, qkv()))
    for transform in (jax.jit, jax.vmap):
        with pytest.raises((TypeError, NotImplementedError), match=r"query|Tracer"):
            transform(flashcore.attention)(*arrays)


def test_jax_result_outlives_everything() -> None:
    jax = pytest.importorskip("jax")
    arrays = qkv()
    results = [flashcore.attention(*map(jax.numpy.asarray, arrays)) for _ in range(20)]
    want = flashcore.attention(*arrays)
    del arrays
    assert all(same_bits(np.asarray(result), want) for result in results)


def test_the_query_decides_the_kind() -> None:
    torch = pytest.importorskip("torch")
    query, key, value = qkv()
    mask = np.ones((5, 7), bool)
    want = flashcore.attention(query, key, value)
    from_numpy = flashcore.attention(query, torch.from_numpy(key), Versioned(value), torch.from_numpy(mask))
    assert type(from_numpy) is np.ndarray
    from_torch = flashcore.attention(torch.from_numpy(query), key, Unversioned(value), attn_mask=mask)
    assert type(from_torch) is torch.Tensor
    assert same_bits(from_numpy, want)
    assert same_bits(from_torch, want)


class CudaArray:
    """An object of the CUDA array interface, on a machine that has no GPU."""

    def __init__(self, **changes: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": (2, 3, 4, 16),
            "typestr": "<f4",
            "data": (0x7F0000000000, False),
            "version": 3,
            **changes,
        }


def test_cuda_arrays_without_a_gpu() -> None:
    if any(kernel.device == "cuda" and kernel.usable for kernel in flashcore.kernels()):
        pytest.skip("there is a GPU, and this pointer is made up")
    with pytest.raises(RuntimeError, match=r"GPU|CUDA|driver"):
        flashcore.attention(CudaArray(), CudaArray(), CudaArray())


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"typestr": "<i4"}, "typestr '<i4'"),
        ({"typestr": ">f4"}, "typestr '>f4'"),
        ({"typestr": 4}, "typestr"),
        ({"data": None}, "data"),
        ({"data": (1,)}, "data"),
        ({"shape": [2, 3, 4, 16]}, "shape"),
        ({"shape": (2, 3, -4, 16)}, "size -4"),
        ({"shape": (1,) * 60}, "60 dimensions"),
        ({"strides": (4,)}, "strides"),
        ({"strides": (1, 2, 3, 4)}, "strides"),
        ({"stream": 0}, "stream 0"),
        ({"stream": "main"}, "stream"),
        ({"mask": ()}, "mask"),
    ],
    ids=str,
)
def test_malformed_cuda_arrays(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        flashcore.attention(CudaArray(**changes), CudaArray(), CudaArray())
    assert "query" in str(caught.value)


def test_mixed_devices_are_refused() -> None:
    query, key, value = qkv()
    with pytest.raises((ValueError, RuntimeError), match=r"device|GPU|CPU"):
        flashcore.attention(query, CudaArray(shape=key.shape), value)


@pytest.mark.parametrize(
    "thing",
    [[[1.0]], 3.0, "abc", None, object(), np.float32(1), b"1", memoryview(b"1234")],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_is_no_array(name: str, thing: Any) -> None:
    arrays = dict(zip(("query", "key", "value"), qkv(), strict=True))
    arrays[name] = thing
    with pytest.raises(TypeError, match=rf"{name} .*allowed"):
        flashcore.attention(**arrays)


# A result's memory, for kinds that cannot be written


def test_a_buffer_gives_the_capsule_that_is_asked_for() -> None:
    buffer = _C.Buffer((2, 3), "float32", -1)
    for versions, word in (({}, '"dltensor"'), ({"max_version": (1, 0)}, '"dltensor_versioned"')):
        assert word in repr(buffer.__dlpack__(**versions))


def test_a_buffer_of_too_many_dimensions() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        _C.Buffer((1,) * 17, "float32", -1)


# out=


def test_out_is_returned() -> None:
    arrays = qkv()
    out = np.empty_like(arrays[0])
    assert flashcore.attention(*arrays, out=out) is out
    result, lse = flashcore.attention(*arrays, out=out, return_lse=True)
    assert result is out
    assert type(lse) is np.ndarray
    assert flashcore.attention(*arrays, out=None) is not None


def test_out_of_another_kind() -> None:
    torch = pytest.importorskip("torch")
    arrays = qkv()
    want = flashcore.attention(*arrays)
    out = torch.empty(want.shape)
    assert flashcore.attention(*arrays, out=out) is out
    assert same_bits(out, want)


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 15), (2, 3, 7, 16), (1, 3, 5, 16), (3, 5, 16), (2, 1, 3, 5, 16), (480,)], ids=str
)
def test_out_shape_is_exact(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"out has shape .*\(2, 3, 5, 16\)"):
        flashcore.attention(*qkv(), out=np.empty(shape, np.float32))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_out_dtype_is_exact(dtype: str) -> None:
    with pytest.raises(ValueError, match=rf"out.*{dtype}"):
        flashcore.attention(*qkv(), out=np.empty((2, 3, 5, 16), dtype))


def test_out_read_only_is_refused() -> None:
    out = np.empty((2, 3, 5, 16), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out.*read-only"):
        flashcore.attention(*qkv(), out=out)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_out_overlapping_an_input_is_refused(name: str) -> None:
    arrays = dict(zip(("query", "key", "value"), qkv(keys=5), strict=True))
    with pytest.raises(ValueError, match=rf"out shares memory with {name}"):
        flashcore.attention(**arrays, out=arrays[name])
    shifted = np.empty(481, np.float32)
    arrays[name] = shifted[:480].reshape(2, 3, 5, 16)
    arrays[name][...] = 1
    with pytest.raises(ValueError, match="out shares memory with"):
        flashcore.attention(**arrays, out=shifted[1:].reshape(2, 3, 5, 16))


@pytest.mark.parametrize("option", ["attn_mask", "sinks", "alibi_slopes"])
def test_out_overlapping_an_option_is_refused(option: str) -> None:
    out = np.zeros((2, 3, 5, 16), np.float32)
    extra = out[..., :7] if option == "attn_mask" else out[0, :, 0, 0]
    with pytest.raises(ValueError, match="out shares memory with"):
        flashcore.attention(*qkv(), out=out, **{option: extra})


def test_out_running_backwards_into_an_input_is_refused() -> None:
    rows = np.zeros((8, 16), np.float32)
    with pytest.raises(ValueError, match="out shares memory with query"):
        flashcore.attention(rows[:5], rows[:5].copy(), rows[:5].copy(), out=rows[7:2:-1])


def test_out_beside_an_input_that_goes_on_in_the_next_row_is_refused() -> None:
    """Of one buffer's rows the query has the last columns and, behind their end, the first of the next."""
    buffer = np.zeros(9 * 32, np.float32)
    query, out = buffer[24:-8].reshape(8, 32)[:, :16], buffer[32:].reshape(8, 32)[:, 4:20]
    with pytest.raises(ValueError, match="out shares memory with query"):
        flashcore.attention(query, query.copy(), query.copy(), out=out)


def test_out_beside_an_input_in_one_buffer() -> None:
    """Interleaved, as fused projections are; nothing is shared."""
    query, key, value = qkv(keys=5)
    fused = np.zeros((2, 5, 4, 3, 16), np.float32)
    views = [fused[:, :, i].swapaxes(1, 2) for i in range(4)]
    for view, array in zip(views, (query, key, value), strict=False):
        view[...] = array
    assert flashcore.attention(*views[:3], out=views[3]) is views[3]
    assert same_bits(views[3].copy(), flashcore.attention(query, key, value))


def test_out_overlapping_itself_is_refused() -> None:
    base = np.zeros(2 * 3 * 5 * 16, np.float32)
    for strides in ((0, 320, 64, 4), (960, 320, 0, 4), (960, 320, 32, 4), (960, 320, 64, 0)):
        out: Array = np.ndarray((2, 3, 5, 16), np.float32, base, strides=strides)
        with pytest.raises(ValueError, match=r"out.*(self-overlap|two elements)"):
            flashcore.attention(*qkv(), out=out)


@pytest.mark.parametrize("ones", [(), (1,)], ids=["of batches that fold", "of others"])
def test_out_overlapping_itself_by_batches_is_refused(ones: tuple[int, ...]) -> None:
    q = np.zeros((2, 3, *ones, 5, 8), np.float32)
    out = np.empty((1, *q.shape[1:]), np.float32)
    with pytest.raises(ValueError, match="self-overlap"):
        flashcore.attention(q, q, q, out=np.lib.stride_tricks.as_strided(out, q.shape, (0, *out.strides[1:])))


def test_out_without_elements_may_have_any_strides() -> None:
    q = np.zeros((2, 3, 0, 8), np.float32)
    out = np.lib.stride_tricks.as_strided(np.empty((1, 3, 0, 8), np.float32), q.shape, (0, 0, 0, 4))
    assert flashcore.attention(q, q, q, out=out) is out


def test_jax_arrays_are_not_written_to() -> None:
    jnp = pytest.importorskip("jax.numpy", reason="these are JAX's rules")
    q, out = np.ones((4, 8), np.float32), jnp.zeros((4, 8))
    with pytest.raises(ValueError, match="out is read-only"):
        flashcore.attention(q, q, q, out=out)
    assert (out == 0).all()


def test_refused_call_leaves_out_alone() -> None:
    out = np.full((2, 3, 5, 16), 7, np.float32)
    with pytest.raises(ValueError, match="scale"):
        flashcore.attention(*qkv(), out=out, scale=float("nan"))
    assert (out == 7).all()
