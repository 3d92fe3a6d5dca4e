"""fc_attention_backward on the CPU, through the C API: every case, dtype and instruction set against the oracle."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import capi
import cases
import ml_dtypes
import numpy as np
import pytest
import reference
from capi import CPU, INVALID, OK, UNSUPPORTED
from cases import CASES, DTYPES, Case, Inputs
from devices import fetch, to_torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Array, ExpectedGradients
from test_properties import problems

import flashcore

KERNELS = [
    pytest.param(kernel.name, marks=() if kernel.usable else pytest.mark.skip(reason=f"no {kernel.name} here"))
    for kernel in flashcore.kernels()
    if kernel.device == "cpu"
]
BEST = next(kernel.name for kernel in flashcore.kernels() if kernel.device == "cpu" and kernel.usable)

# Gradients are laid in memory as their inputs are, but they may not repeat.
REPEATS = ("repeat_batch", "repeat_heads", "repeat_rows")


@dataclass
class Call:
    """A backward problem with all its arrays: the forward's inputs and results, and a place for each gradient."""

    inputs: Inputs
    out: Array
    lse: Array
    dout: Array
    dlse: Array | None
    gradients: dict[str, Array]  # in the shapes of the inputs
    fields: dict[str, Any] = field(default_factory=dict)  # of the backward's problem
    num_threads: int = 1

    def forward_problem(self) -> capi.Problem:
        options = self.inputs.options
        arrays = [self._bhsd(x) for x in (*self.inputs.arrays, self.out)]
        made = capi.problem(*arrays, lse=self.lse, num_threads=self.num_threads)
        capi.set_options(made, options)
        return made

    def problem(self) -> capi.BackwardProblem:
        forward = self.forward_problem()
        shapes = capi.broadcast_shapes(forward)
        made = capi.backward_problem(forward, self._bhsd(self.dout), **self.fields)
        if self.dlse is not None:
            made.dlse = capi.tensor(self.dlse)
        for name, array in self.gradients.items():
            like = {"dbias": "attn_mask", "dsinks": "sinks"}.get(name)
            setattr(made, name, capi.tensor(np.broadcast_to(array, shapes[like]) if like else self._bhsd(array)))
        return made

    def run(self) -> dict[str, Array]:
        assert capi.backward(self.problem()) == OK, capi.last_error()
        for name, array in self.gradients.items():
            assert cases.guard_intact(array), f"wrote around {name}"
        return self.gradients

    def _bhsd(self, x: Array) -> Array:
        return x.swapaxes(1, 2) if self.inputs.options.get("layout") == "bshd" else x


def _gradients_of(case: Case, made: Inputs) -> dict[str, Array]:
    """A place full of NaN, with guards, for each gradient there is."""

    def blank(x: Array, strides: str = "contiguous") -> Array:
        return cases.place(np.full(x.shape, np.nan, x.dtype), "padded_rows" if strides in REPEATS else strides)

    gradients = {"dq": blank(made.query, case.strides_q)}
    gradients |= {name: blank(x, case.strides_kv) for name, x in (("dk", made.key), ("dv", made.value))}
    mask = made.options.get("attn_mask")
    if mask is not None and mask.dtype != np.bool_:
        # A broadcast dimension that is 1 long has whatever stride; capi.tensor() sees it after broadcast_to.
        gradients["dbias"] = blank(mask, "columns" if case.mask == "added_columns" else "contiguous")
    if "sinks" in made.options:
        gradients["dsinks"] = blank(made.options["sinks"])
    return gradients


def _cotangents(case: Case, made: Inputs) -> tuple[Array, Array | None]:
    """dout as the query is laid in memory, dlse in every second case."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()) + 1)
    shape = (*made.query.shape[:-1], made.value.shape[-1])
    dout = cases.place(rng.standard_normal(shape).astype(made.query.dtype), case.strides_q)
    rows = (case.batch, case.num_heads_q, case.seqlen_q)
    with_dlse = zlib.crc32(case.name.encode()) % 2 == 0
    return dout, cases.place(rng.standard_normal(rows).astype(made.lse_dtype)) if with_dlse else None


def _expect(case: Case, dtype: np.dtype[Any]) -> tuple[Array, Array, ExpectedGradients]:
    """The forward's results, correctly rounded, and the gradients."""
    made = cases.inputs(case, dtype)
    dout, dlse = _cotangents(case, made)
    out, lse = reference.attention(*made.arrays, **made.options)
    expected = reference.expect_gradients(*made.arrays, dout, dlse, **made.options)
    return out.astype(dtype), lse.astype(made.lse_dtype), expected


@cache
def _expected(name: str, dtype: str) -> tuple[Array, Array, ExpectedGradients]:
    return _expect(CASES[name], DTYPES[dtype])


def make(case: Case, dtype: str, **options: Any) -> tuple[Call, ExpectedGradients]:
    known = CASES.get(case.name) is case
    out, lse, expected = _expected(case.name, dtype) if known else _expect(case, DTYPES[dtype])
    made = cases.inputs(case, DTYPES[dtype])
    dout, dlse = _cotangents(case, made)
    gradients = _gradients_of(case, made)
    strides = "contiguous" if case.strides_q in REPEATS else case.strides_q
    return Call(made, cases.place(out, strides), cases.place(lse), dout, dlse, gradients, **options), expected


def check(call: Call, expected: ExpectedGradients) -> None:
    for name, result in call.run().items():
        expected.check(name, result)


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.params())
def test_cases(case: Case, dtype: str, isa: str) -> None:
    check(*make(case, dtype, fields={"kernel": isa.encode()}))


# What may be left out, summed, or repeated


def _bits(gradients: dict[str, Array]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in gradients.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["everything", "grouped"])
def test_any_subset_of_gradients_has_the_same_bits(name: str, dtype: str) -> None:
    whole, _ = make(CASES[name], dtype)
    bits = _bits(whole.run())
    for count in range(len(bits)):
        for subset in itertools.combinations(bits, count):
            call, _ = make(CASES[name], dtype)
            call.gradients = {wanted: call.gradients[wanted] for wanted in subset}
            assert _bits(call.run()) == {wanted: bits[wanted] for wanted in subset}


REPEATABLE = [
    Case(
        "repeat_one_head", batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=700, seqlen_k=900, options={"diagonal": 7}
    ),
    Case("repeat_causal", batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=600, seqlen_k=600, options=cases.CAUSAL),
    Case("repeat_window", batch=1, seqlen_q=900, seqlen_k=900, options={"window": (100, 30)}),
    Case("repeat_bias", batch=2, num_heads_q=4, seqlen_q=300, seqlen_k=500, mask="added_matrix", sinks=True),
    Case("repeat_bias_keys", batch=3, seqlen_q=200, seqlen_k=500, mask="added_keys"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", REPEATABLE, ids=str)
def test_bits_do_not_depend_on_threads_or_runs(case: Case, dtype: str) -> None:
    call, expected = make(case, dtype)
    check(call, expected)
    bits = _bits(call.gradients)
    for num_threads in (1, 2, 3, 8, 1000) * 3:
        for array in call.gradients.values():
            array[...] = np.nan
        call.num_threads = num_threads
        assert _bits(call.run()) == bits, f"{num_threads} threads"


def test_callers_at_the_same_time_have_the_same_bits() -> None:
    """One has the pool, the others work alone."""
    from concurrent.futures import ThreadPoolExecutor

    case = REPEATABLE[1]
    calls = [make(case, "float32", num_threads=2)[0] for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        bits = [_bits(gradients) for gradients in pool.map(lambda call: call.run(), calls)]
    assert bits == bits[:1] * 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "broadcast", list(itertools.product((False, True), repeat=4)), ids=lambda x: "".join("01"[i] for i in x)
)
def test_dbias_is_summed_to_the_shape_of_the_mask(broadcast: tuple[bool, ...], dtype: str) -> None:
    case = Case("dbias", num_heads_q=4, num_heads_kv=2, seqlen_q=150, seqlen_k=270, head_dim=16, options=cases.CAUSAL)
    made = cases.inputs(case, DTYPES[dtype])
    full = (case.batch, case.num_heads_q, case.seqlen_q, case.seqlen_k)
    shape = tuple(1 if once else size for once, size in zip(broadcast, full, strict=True))
    mask = np.random.default_rng(5).standard_normal(shape).astype(DTYPES[dtype])
    check(*_with_options(case, made, {"attn_mask": cases.place(mask)}, num_threads=3))


def _with_options(case: Case, made: Inputs, more: dict[str, Any], **rest: Any) -> tuple[Call, ExpectedGradients]:
    """A case's arrays under options that no case names."""
    made = Inputs(*made.arrays, {**made.options, **more})
    dout, dlse = _cotangents(case, made)
    out, lse = reference.attention(*made.arrays, **made.options)
    expected = reference.expect_gradients(*made.arrays, dout, dlse, **made.options)
    out, lse = out.astype(made.query.dtype), lse.astype(made.lse_dtype)
    return Call(made, out, lse, dout, dlse, _gradients_of(case, made), **rest), expected


def test_dbias_may_sum_what_the_mask_does_not() -> None:
    """And need not sum what the mask repeats: only its own strides say."""
    case = Case("dbias_own", seqlen_q=100, seqlen_k=200, mask="added")
    call, expected = make(case, "float32")
    made = call.problem()
    summed = cases.place(np.full((1, 1, *expected.values["dbias"].shape[2:]), np.nan, np.float32))
    made.dbias = capi.tensor(np.broadcast_to(summed, expected.values["dbias"].shape))
    assert capi.backward(made) == OK, capi.last_error()
    exact = expected.values["dbias"].sum(axis=(0, 1), keepdims=True)
    bound = expected.bounds["dbias"].sum(axis=(0, 1), keepdims=True)
    assert (np.abs(summed - exact) <= bound).all()
    assert cases.guard_intact(summed)

    case = Case("dbias_unsummed", seqlen_q=100, seqlen_k=200, mask="added_matrix")
    call, _ = make(case, "float32")
    made = call.problem()
    whole = cases.place(np.full((2, 2, 100, 200), np.nan, np.float32))
    made.dbias = capi.tensor(whole)
    assert capi.backward(made) == OK, capi.last_error()
    exact = reference.gradients(*call.inputs.arrays, call.dout, call.dlse, **call.inputs.options).dbias
    np.testing.assert_allclose(whole, exact, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 6), (2, 1), (1, 6), (6,), (1,)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_dsinks_are_summed_to_the_shape_of_the_sinks(shape: tuple[int, ...], dtype: str) -> None:
    case = Case("dsinks", num_heads_q=6, num_heads_kv=2, seqlen_q=150)
    made = cases.inputs(case, DTYPES[dtype])
    sinks = cases.place(np.random.default_rng(6).standard_normal(shape).astype(DTYPES[dtype]))
    call, expected = _with_options(case, made, {"sinks": np.broadcast_to(sinks, (2, 6))})
    call.gradients["dsinks"] = cases.place(np.full(shape, np.nan, sinks.dtype))
    expected.values["dsinks"] = reference._sum_to(expected.values["dsinks"], shape)
    expected.sizes["dsinks"] = reference._sum_to(expected.sizes["dsinks"], shape)
    expected.bounds["dsinks"] = reference._sum_to(expected.bounds["dsinks"], shape)
    check(call, expected)


@pytest.mark.parametrize("sink", [-5000.0, -4998.0, -6000.0, 0.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_lse_far_from_zero_keeps_its_sum(dtype: str, sink: float) -> None:
    """Scores and a sink of some -5000: their differences are what counts, and lse alone cannot hold them in float32."""
    case = Case("far_from_zero", num_heads_q=4, seqlen_q=100, seqlen_k=300)
    made = cases.inputs(case, DTYPES[dtype])
    mask = cases.place(np.full((1, 1), -5000, DTYPES[dtype]))
    sinks = cases.place(np.full(4, sink, DTYPES[dtype]))
    check(*_with_options(case, made, {"attn_mask": mask, "sinks": sinks}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dout_may_repeat(dtype: str) -> None:
    """out.sum() has a gradient of one element with strides of 0."""
    case = CASES["grouped"]
    call, _ = make(case, dtype)
    call.dout = np.broadcast_to(np.ones((), DTYPES[dtype]), call.out.shape)
    expected = reference.expect_gradients(*call.inputs.arrays, call.dout, call.dlse, **call.inputs.options)
    check(call, expected)


@pytest.mark.parametrize("empty", ["batch", "rows", "keys"])
def test_summed_gradients_of_nothing_are_zero(empty: str) -> None:
    sizes = {"batch": {"batch": 0}, "rows": {"seqlen_q": 0}, "keys": {"seqlen_k": 0}}[empty]
    case = Case("empty_sum", sinks=True, **sizes)
    made = cases.inputs(case, DTYPES["float32"])
    mask = np.zeros((1, 1, 1, 1), np.float32)
    check(*_with_options(case, made, {"attn_mask": cases.place(mask)}))


# What must not be read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["lower_right_many_rows", "mask_bool_dark_rows", "mask_added_dark_rows", "diagonal_down"]
)
def test_dout_of_rows_that_see_no_key_does_not_matter(name: str, dtype: str) -> None:
    call, expected = make(CASES[name], dtype)
    dark = np.isneginf(call.lse)
    assert dark.any()
    call.dout[dark] = np.nan
    call.out[dark] = np.nan
    if call.dlse is not None:
        call.dlse[dark] = np.nan
    check(call, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 37), (16, 200), (129, 1)], ids=str)
def test_keys_and_values_behind_a_sequence_end_do_not_matter(lengths: tuple[int, int], dtype: str) -> None:
    case = Case("lengths", num_heads_q=4, seqlen_q=100, seqlen_k=200)
    made = cases.inputs(case, DTYPES[dtype])
    mask = (np.arange(200) < np.array(lengths)[:, None])[:, None, None]
    call, expected = _with_options(case, made, {"attn_mask": cases.place(mask), "softcap": 5.0})
    for b, length in enumerate(lengths):
        made.key[b, :, length:] = np.nan
        made.value[b, :, length:] = np.nan
    check(call, expected)


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_a_mask_hides_between_others_does_not_matter(dtype: str, kind: str) -> None:
    case = Case("hole", seqlen_q=100, seqlen_k=200)
    made = cases.inputs(case, DTYPES[dtype])
    visible = np.ones((1, 200), bool)
    visible[:, 50:60] = False
    mask = visible if kind == "bool" else np.where(visible, 0.5, -np.inf).astype(DTYPES[dtype])
    call, expected = _with_options(case, made, {"attn_mask": cases.place(mask)})
    made.value[:, :, 50:60] = np.nan
    check(call, expected)


def test_a_nan_stays_where_it_is_seen() -> None:
    """A NaN key reaches the dq of the rows that see it, its own dk, and not the keys that other rows alone see."""
    case = Case("nan_key", batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=64, seqlen_k=64, options={"window": (0, 0)})
    call, _ = make(case, "float32")
    call.inputs.key[0, 0, 40] = np.nan
    call.lse[0, 0, 40] = np.nan
    call.out[0, 0, 40] = np.nan
    gradients = call.run()
    assert np.isnan(gradients["dq"][0, 0, 40]).all()
    assert np.isfinite(gradients["dq"][0, 0, :32]).all()
    assert np.isfinite(gradients["dk"][0, 0, [*range(32), *range(48, 64)]]).all()


@pytest.mark.uninstrumented
def test_memory_is_linear_in_the_sequence_length() -> None:
    """One head of 16384 rows and keys: scores would be a gigabyte."""
    program = """
        import resource, sys
        sys.path.insert(0, sys.argv[1])
        import numpy as np, capi
        q, k, v, out, do, dq, dk, dv = (np.ones((1, 1, 16384, 8), np.float32) for _ in range(8))
        lse = np.zeros((1, 1, 16384), np.float32)
        forward = capi.problem(q, k, v, out, lse=lse, flags=capi.CAUSAL, num_threads=2)
        assert capi.forward(forward) == capi.OK
        made = capi.backward_problem(forward, do, dq=dq, dk=dk, dv=dv)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert capi.backward(made) == capi.OK
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(program), str(Path(__file__).parent)]
    kibibytes = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert kibibytes < 16 << 10


@pytest.mark.parametrize("dtype", [capi.FLOAT16, capi.FLOAT32, capi.FLOAT64])
def test_workspace_is_linear_in_the_sequence_length(dtype: int) -> None:
    def workspace(seqlen: int) -> int:
        status, plan = capi.backward_plan(
            shapes_only(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=seqlen, seqlen_k=seqlen, dtype=dtype)
        )
        assert status == OK, capi.last_error()
        return int(plan.workspace_bytes)

    row = workspace(1 << 20) / (1 << 20)
    assert row <= (64 + 4) * 8
    assert workspace(1 << 30) <= 1.01 * row * (1 << 30)
    assert workspace(1 << 10) <= 1.5 * row * (1 << 10)


# Words


def shapes_only(**shape: Any) -> capi.BackwardProblem:
    """A problem without arrays, which asks for dq, dk and dv."""
    forward = capi.shapes_only(**{"device_type": CPU, "dtype": capi.FLOAT32, **shape})
    rows = (forward.num_heads_q * forward.seqlen_q, forward.seqlen_q, 1, 0)
    lse = capi.FLOAT64 if forward.query.dtype == capi.FLOAT64 else capi.FLOAT32
    forward.lse = capi.Tensor(None, (ctypes.c_int64 * 4)(*rows), lse, 0)
    made = capi.BackwardProblem(struct_size=ctypes.sizeof(capi.BackwardProblem), forward=ctypes.pointer(forward))
    made.dout, made.dq, made.dk, made.dv = forward.out, forward.query, forward.key, forward.value
    return made


def _set(name: str, **fields: Any) -> Callable[[capi.BackwardProblem], None]:
    def change(made: capi.BackwardProblem) -> None:
        target = made if name == "" else made.forward.contents if name == "forward" else getattr(made, name)
        for field_name, value in fields.items():
            setattr(target, field_name, value)

    return change


def _tensor(dtype: int, *strides: int) -> capi.Tensor:
    return capi.Tensor(None, (ctypes.c_int64 * 4)(*strides), dtype, 0)


MASK = _tensor(capi.FLOAT32, 0, 0, 512, 1)
REFUSED: dict[str, tuple[Callable[[capi.BackwardProblem], None], str]] = {
    "forward is checked too": (_set("forward", softcap=-2.0), "softcap is -2"),
    "no forward": (_set("", forward=None), "forward is NULL; set it to the problem that fc_attention_forward"),
    "no lse": (
        _set("forward", lse=_tensor(0)),
        "lse is not given, and the backward needs it; ask fc_attention_forward",
    ),
    "no dout": (_set("dout", dtype=0), "dout has dtype none; it must be that of query, float32"),
    "dout of another dtype": (_set("dout", dtype=capi.FLOAT16), "dout has dtype float16; it must be that of query"),
    "dlse of another dtype": (
        _set("dlse", dtype=capi.FLOAT64),
        "dlse has dtype float64; it must be that of lse, float32",
    ),
    "dlse without dtype": (_set("dlse", data=64), "dlse.data is given, but dlse.dtype is not"),
    "dq of another dtype": (_set("dq", dtype=capi.FLOAT64), "dq has dtype float64; it must be that of query, float32"),
    "dk without dtype": (_set("dk", dtype=0, data=64), "dk.data is given, but dk.dtype is not; set it to its fc_dtype"),
    "dv onto itself": (_set("dv", strides=(ctypes.c_int64 * 4)(0, 0, 64, 1)), "puts two elements at one address"),
    "dq beyond memory": (_set("dq", strides=(ctypes.c_int64 * 4)(2**62, 1, 1, 1)), "64-bit address space"),
    "dbias of no mask": (_set("", dbias=MASK), "attn_mask is not given; only a mask that is added"),
    "dbias of a bool mask": (
        lambda made: (_set("forward", attn_mask=_tensor(capi.BOOL, 0, 0, 512, 1))(made), _set("", dbias=MASK)(made)),
        "attn_mask is bool; only a mask that is added to the scores has a gradient",
    ),
    "dbias of another dtype": (
        lambda made: (_set("forward", attn_mask=MASK)(made), _set("", dbias=_tensor(capi.FLOAT16, 0, 0, 512, 1))(made)),
        "dbias has dtype float16; it must be that of attn_mask, float32",
    ),
    "dbias onto itself": (
        lambda made: (_set("forward", attn_mask=MASK)(made), _set("", dbias=_tensor(capi.FLOAT32, 0, 0, 1, 1))(made)),
        "dbias: shape (1, 1, 512, 512)",
    ),
    "dsinks of no sinks": (
        _set("", dsinks=_tensor(capi.FLOAT32, 0, 1, 0, 0)),
        "sinks are not; leave dsinks.dtype FC_NONE",
    ),
    "dalibi_slopes": (_set("", dalibi_slopes=_tensor(capi.FLOAT32, 0, 1)), "alibi_slopes have no gradient here"),
    "negative block": (_set("", block_m=-1), "block_m is -1"),
    "unknown block": (
        _set("", block_n=48),
        "block_n=48: no such tile for this problem's backward on the CPU; there are",
    ),
    "unknown kernel": (
        _set("", kernel=b"warp_drive"),
        "'warp_drive' is forced, but the CPU has no such backward kernel",
    ),
    "struct_size": (_set("", struct_size=8), "fc_backward_problem.struct_size is 8; set it to sizeof"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    change, words = REFUSED[name]
    made = shapes_only()
    assert capi.backward_plan(made)[0] == OK, capi.last_error()
    change(made)
    assert capi.backward_plan(made)[0] == INVALID
    assert words in capi.last_error()
    assert capi.library().fc_attention_backward(ctypes.byref(made), None, 0, None) == INVALID


@pytest.mark.parametrize("name", ["dout", "dlse", "dq", "dk", "dv", "dbias", "dsinks"])
def test_null_and_unaligned_data(name: str) -> None:
    call, _ = make(CASES["everything"], "float32")
    call.dlse = cases.place(np.zeros_like(call.lse))
    made = call.problem()
    assert capi.backward(made) == OK, capi.last_error()
    data = getattr(made, name).data
    for address, words in ((None, f"{name}.data is NULL"), (data + 1, f"{name}.data is 0x")):
        getattr(made, name).data = address
        buffer = np.empty(capi.backward_plan(made)[1].workspace_bytes + 64, np.uint8)
        assert capi.backward(made, buffer[-buffer.ctypes.data % 64 :]) == INVALID
        assert words in capi.last_error()


def test_a_refused_call_writes_nothing() -> None:
    call, _ = make(CASES["plain"], "float32")
    made = call.problem()
    needed = capi.backward_plan(made)[1].workspace_bytes
    assert needed > 0
    assert capi.library().fc_attention_backward(ctypes.byref(made), None, needed, None) == INVALID
    assert f"workspace has 0 bytes; this problem needs {needed} (fc_attention_backward_plan tells)" in capi.last_error()
    buffer = np.full(needed + 128, 7, np.uint8)
    start = -buffer.ctypes.data % 64
    assert capi.backward(made, buffer[start : start + needed - 1]) == INVALID
    assert f"workspace has {needed - 1} bytes" in capi.last_error()
    assert capi.backward(made, buffer[start + 8 :]) == INVALID
    assert "aligned to 64 bytes" in capi.last_error()
    assert (buffer == 7).all()
    assert all(np.isnan(array).all() for array in call.gradients.values())


def test_gpu_is_refused_in_words() -> None:
    made = shapes_only(device_type=capi.CUDA, dtype=capi.FLOAT16)
    assert capi.backward_plan(made, capi.gpu_device(90))[0] == UNSUPPORTED
    assert "no backward kernel for GPUs; move the arrays to the CPU" in capi.last_error()
    assert capi.backward_plan(made, capi.cpu_device())[0] == INVALID


def test_a_newer_struct_is_known_by_its_tail() -> None:
    class Grown(ctypes.Structure):
        _fields_ = [("known", capi.BackwardProblem), ("later", ctypes.c_int64)]

    call, expected = make(CASES["plain"], "float32")
    grown = Grown(known=call.problem())
    grown.known.struct_size = ctypes.sizeof(Grown)
    assert capi.backward(grown) == OK, capi.last_error()  # type: ignore[arg-type]
    for name, array in call.gradients.items():
        expected.check(name, array)
    grown.later = 1
    assert capi.backward(grown) == INVALID  # type: ignore[arg-type]
    assert "does not know" in capi.last_error()


def test_plan() -> None:
    made = shapes_only(batch=3, num_heads_q=8, num_heads_kv=2, seqlen_q=100, seqlen_k=300)
    status, plan = capi.backward_plan(made, capi.cpu_device(isa=0, num_threads=4))
    assert (status, plan.block_m, plan.block_n, plan.num_splits, plan.slow) == (OK, 64, 128, 1, 0)
    assert plan.grid == 3 * 2 * 3, "a task is a block of keys of one key/value head"
    assert plan.num_threads == 4
    assert flashcore.kernels()[plan.kernel].name == "cpu_baseline"
    assert plan.workspace_bytes % 64 == 0
    made.forward.contents.attn_mask = made.dbias = _tensor(capi.FLOAT32, 0, 0, 300, 1)
    assert capi.backward_plan(made, capi.cpu_device())[1].grid == 3, "what dbias sums over is walked in one task"
    made.forward.contents.kernel = b"cpu_avx512"
    made.forward.contents.block_m = 48
    status, plan = capi.backward_plan(made, capi.cpu_device())
    assert (status, plan.block_m) == (OK, 64), "the forward's kernel and tile are not the backward's"
    made.kernel, made.block_m, made.block_n = b"cpu", 64, 128
    assert capi.backward_plan(made, capi.cpu_device())[0] == OK


# Second opinions


@pytest.mark.parametrize("name", ["everything", "grouped", "sinks_dark_rows", "mask_added_keys", "window_self"])
def test_oracle_by_finite_differences(name: str) -> None:
    """In long double: along a random direction, the loss changes as the gradients say."""
    made = cases.inputs(CASES[name], DTYPES["float64"])
    dout, _ = _cotangents(CASES[name], made)
    rng = np.random.default_rng(11)
    _, lse = reference.attention(*made.arrays, **made.options)
    dlse = np.where(np.isfinite(lse), rng.standard_normal(lse.shape), 0)
    right = reference.gradients(*made.arrays, dout, dlse, **made.options)

    inputs: dict[str, Array] = dict(zip(("dq", "dk", "dv"), made.arrays, strict=True))
    inputs |= {"dbias": made.options["attn_mask"]} if "attn_mask" in made.options else {}
    inputs |= {"dsinks": made.options["sinks"]} if "sinks" in made.options else {}

    def loss(moved: dict[str, Array]) -> Any:
        options = dict(made.options)
        for gradient, option in (("dbias", "attn_mask"), ("dsinks", "sinks")):
            if gradient in moved:
                options[option] = moved[gradient]
        work: dict[str, Any] = {"work": np.longdouble, "store": lambda x: x}
        out, lse = reference._formula(moved["dq"], moved["dk"], moved["dv"], **options, **work)
        return (out * dout).sum() + (np.where(np.isfinite(lse), lse, 0) * dlse).sum()

    for gradient, array in inputs.items():
        direction = rng.standard_normal(array.shape).astype(np.longdouble)
        step = np.longdouble(1e-5)
        ahead, behind = (
            loss(inputs | {gradient: array.astype(np.longdouble) + way * step * direction}) for way in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        said = (reference._sum_to(getattr(right, gradient), array.shape) * direction).sum()
        assert abs(slope - said) <= 1e-7 * max(abs(said), 1), gradient


@pytest.mark.parametrize("case", list(CASES.values()), ids=str)
def test_zeros_never_pass(case: Case) -> None:
    """But where the gradient is nothing beside the rounding of what it is summed from."""
    for dtype in DTYPES:
        _, _, expected = _expected(case.name, dtype)
        for name, exact in expected.values.items():
            unit = float(ml_dtypes.finfo(DTYPES[dtype]).eps) * expected.sizes[name].max(initial=0)
            if np.abs(exact).max(initial=0) > unit:
                with pytest.raises(AssertionError):
                    expected.check(name, np.zeros_like(exact))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_refuse_wrong_gradients(dtype: str) -> None:
    """Each mistake is one that backward kernels really make; each must fail."""
    case = CASES["grouped"]
    made = cases.inputs(case, DTYPES[dtype])
    dout, _ = _cotangents(case, made)
    dlse = np.random.default_rng(3).standard_normal(made.query.shape[:-1]).astype(made.lse_dtype)
    expected = reference.expect_gradients(*made.arrays, dout, dlse, **made.options)
    right = reference.gradients(*made.arrays, dout, dlse, **made.options)
    for name in ("dq", "dk", "dv"):
        expected.check(name, getattr(right, name).astype(DTYPES[dtype]))

    def without(**options: Any) -> Any:
        return reference.gradients(*made.arrays, dout, dlse, **{**made.options, **options})

    no_dlse = reference.gradients(*made.arrays, dout, None, **made.options)
    mistakes = {
        "dlse forgotten": ("dq", no_dlse.dq),
        "delta of the wrong sign": ("dk", 2 * without().dk - 3 * no_dlse.dk),
        "scale forgotten": ("dq", right.dq * 8),
        "not causal": ("dv", without(is_causal=False).dv),
        "band off by one": ("dk", without(diagonal=1).dk),
        "one head of the group lost": ("dv", right.dv * 2 / 3),
        "last row lost": ("dv", right.dv - reference.gradients(*made.arrays, _only_last(dout), **made.options).dv),
        "dk and dv exchanged": ("dk", right.dv),
        "one tile added twice": ("dq", np.concatenate([right.dq[:, :, :64], 2 * right.dq[:, :, 64:]], axis=2)),
        "one NaN": ("dk", np.where(np.arange(right.dk.size).reshape(right.dk.shape) == 99, np.nan, right.dk)),
    }
    for mistake, (name, wrong) in mistakes.items():
        with pytest.raises(AssertionError):
            expected.check(name, wrong.astype(DTYPES[dtype]))
            pytest.fail(f"{mistake}: passed", pytrace=False)


def _only_last(dout: Array) -> Array:
    return np.where(np.arange(dout.shape[-2])[:, None] == dout.shape[-2] - 1, dout, np.zeros((), dout.dtype))


@given(case=problems(), dtype=st.sampled_from(sorted(DTYPES)), num_threads=st.integers(1, 4))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_problem(case: Case, dtype: str, num_threads: int) -> None:
    check(*make(case, dtype, num_threads=num_threads))


TORCH_CASES = ("plain", "grouped", "causal_129", "mask_added", "mask_added_matrix", "mask_bool", "head_dim_v_wider")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TORCH_CASES)
def test_torch_agrees(name: str, dtype: str) -> None:
    """PyTorch's autograd passes the same bounds, and so do we on what our own forward made."""
    torch = pytest.importorskip("torch", reason="PyTorch is the second opinion")
    case = CASES[name]
    made = cases.inputs(case, DTYPES[dtype])
    dout, _ = _cotangents(case, made)
    expected = reference.expect_gradients(*made.arrays, dout, **made.options)

    inputs = [to_torch(x).requires_grad_() for x in made.arrays]
    options = {option: to_torch(x) for option, x in made.options.items()}
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        inputs.append(options["attn_mask"].requires_grad_())
    out = torch.nn.functional.scaled_dot_product_attention(*inputs[:3], enable_gqa=True, **options)
    for gradient, result in zip(
        ("dq", "dk", "dv", "dbias"), torch.autograd.grad(out, inputs, to_torch(dout)), strict=False
    ):
        expected.check(gradient, fetch(result))

    call, _ = make(case, dtype)
    call.dlse = None
    assert capi.forward(call.forward_problem()) == OK, capi.last_error()
    check(call, expected)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0, "window": (4, 2)}], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    """PyTorch's numerical differentiation of our forward against our backward, out and lse both in the loss."""
    torch = pytest.importorskip("torch", reason="gradcheck is PyTorch's")

    def call(query: Any, key: Any, value: Any, mask: Any, sinks: Any) -> Call:
        arrays = [np.ascontiguousarray(x.detach().numpy()) for x in (query, key, value, mask, sinks)]
        made = Inputs(*arrays[:3], {"attn_mask": arrays[3], "sinks": arrays[4], **options})
        out = np.empty((*arrays[0].shape[:-1], arrays[2].shape[-1]))
        made_call = Call(made, out, np.empty(arrays[0].shape[:-1]), out, None, {})
        assert capi.forward(made_call.forward_problem()) == OK, capi.last_error()
        return made_call

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, *inputs: Any) -> Any:
            context.save_for_backward(*inputs)
            made = call(*inputs)
            return torch.from_numpy(made.out), torch.from_numpy(made.lse)

        @staticmethod
        def backward(context: Any, dout: Any, dlse: Any) -> Any:
            made = call(*context.saved_tensors)
            made.dout, made.dlse = np.ascontiguousarray(dout.numpy()), np.ascontiguousarray(dlse.numpy())
            names = ("dq", "dk", "dv", "dbias", "dsinks")
            made.gradients = {
                name: np.full(x.shape, np.nan) for name, x in zip(names, context.saved_tensors, strict=True)
            }
            assert capi.backward(made.problem()) == OK, capi.last_error()
            return tuple(torch.from_numpy(made.gradients[name]) for name in names)

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 2), (4, 1, 7), (4,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(Attention.apply, inputs)
