"""fc_attention_backward through the C API: every case, dtype and kernel against the oracle.

On the CPU, on a GPU, and the GPU's portable kernels on the emulator too.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
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
from gradients import CUDA, EMULATED, Call, bits, check, cotangents, everywhere, expected_of, make, with_options
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import Array
from test_properties import problems

import flashcore

KERNELS = [
    pytest.param(kernel.name, marks=() if kernel.usable else pytest.mark.skip(reason=f"no {kernel.name} here"))
    for kernel in flashcore.kernels()
    if kernel.device == "cpu"
]
BEST = next(kernel.name for kernel in flashcore.kernels() if kernel.device == "cpu" and kernel.usable)


def _cases_on_gpus() -> list[Any]:
    """Every dtype on a GPU; on the emulator float32, and float16 where a sanitizer looks too."""
    return [
        pytest.param(case, device, dtype, id=f"{case}-{device}-{dtype}", marks=[*marks, *place.marks])
        for case, marks in ((param.values[0], param.marks) for param in cases.params())
        for place, device in ((CUDA, "cuda"), (EMULATED, "emulated"))
        for dtype in ("float32", "float16", "bfloat16")
        if device == "cuda" or dtype == "float32" or (dtype == "float16" and case.sanitize)
    ]


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.params())
def test_cases(case: Case, dtype: str, isa: str) -> None:
    check(*make(case, dtype, fields={"kernel": isa.encode()}))


@pytest.mark.parametrize("case,device,dtype", _cases_on_gpus())
def test_cases_on_gpus(case: Case, device: str, dtype: str) -> None:
    if device == "cuda" and "reversed" in case.strides_q + case.strides_kv:
        pytest.skip("PyTorch has no negative strides")
    check(*make(case, dtype, device=device, fields={"kernel": b"portable"}))


# What may be left out, summed, or repeated


@everywhere("float32", "float16")
@pytest.mark.parametrize("name", ["everything", "grouped"])
def test_any_subset_of_gradients_has_the_same_bits(device: str, name: str, dtype: str) -> None:
    whole, _ = make(CASES[name], dtype, device=device)
    right = bits(whole.run())
    for count in (0, 1) if device == "emulated" else range(len(right)):
        for subset in itertools.combinations(right, count):
            call, _ = make(CASES[name], dtype, device=device)
            call.gradients = {wanted: call.gradients[wanted] for wanted in subset}
            assert bits(call.run()) == {wanted: right[wanted] for wanted in subset}


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
    right = bits(call.gradients)
    for num_threads in (1, 2, 3, 8, 1000) * 3:
        for array in call.gradients.values():
            array[...] = np.nan
        call.num_threads = num_threads
        assert bits(call.run()) == right, f"{num_threads} threads"


def test_callers_at_the_same_time_have_the_same_bits() -> None:
    """One has the pool, the others work alone."""
    from concurrent.futures import ThreadPoolExecutor

    case = REPEATABLE[1]
    calls = [make(case, "float32", num_threads=2)[0] for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        results = [bits(gradients) for gradients in pool.map(lambda call: call.run(), calls)]
    assert results == results[:1] * 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", REPEATABLE, ids=str)
def test_bits_do_not_depend_on_the_run_on_a_gpu(case: Case, dtype: str) -> None:
    call, expected = make(case, dtype, device="cuda")
    check(call, expected)
    right = bits(call.gradients)
    for _ in range(10):
        for array in call.gradients.values():
            array[...] = np.nan
        assert bits(call.run()) == right


@everywhere(*DTYPES)
@pytest.mark.parametrize(
    "broadcast", list(itertools.product((False, True), repeat=4)), ids=lambda x: "".join("01"[i] for i in x)
)
def test_dbias_is_summed_to_the_shape_of_the_mask(broadcast: tuple[bool, ...], device: str, dtype: str) -> None:
    case = Case("dbias", num_heads_q=4, num_heads_kv=2, seqlen_q=150, seqlen_k=270, head_dim=16, options=cases.CAUSAL)
    made = cases.inputs(case, DTYPES[dtype])
    full = (case.batch, case.num_heads_q, case.seqlen_q, case.seqlen_k)
    shape = tuple(1 if once else size for once, size in zip(broadcast, full, strict=True))
    mask = np.random.default_rng(5).standard_normal(shape).astype(DTYPES[dtype])
    check(*with_options(case, made, {"attn_mask": cases.place(mask)}, num_threads=3, device=device))


@everywhere("float32")
def test_dbias_may_sum_what_the_mask_does_not(device: str, dtype: str) -> None:
    """And need not sum what the mask repeats: only its own strides say."""
    case = Case("dbias_own", seqlen_q=100, seqlen_k=200, mask="added")
    call, expected = make(case, dtype, device=device)
    call.gradients = {"dbias": cases.place(np.full((1, 1, *expected.values["dbias"].shape[2:]), np.nan, np.float32))}
    exact = expected.values["dbias"].sum(axis=(0, 1), keepdims=True)
    bound = expected.bounds["dbias"].sum(axis=(0, 1), keepdims=True)
    assert (np.abs(call.run()["dbias"] - exact) <= bound).all()

    case = Case("dbias_unsummed", seqlen_q=100, seqlen_k=200, mask="added_matrix")
    call, _ = make(case, dtype, device=device)
    call.gradients = {"dbias": cases.place(np.full((2, 2, 100, 200), np.nan, np.float32))}
    exact = reference.gradients(*call.inputs.arrays, call.dout, call.dlse, **call.inputs.options).dbias
    np.testing.assert_allclose(call.run()["dbias"], exact, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 6), (2, 1), (1, 6), (6,), (1,)], ids=str)
@everywhere("float32", "float16", "float64")
def test_dsinks_are_summed_to_the_shape_of_the_sinks(shape: tuple[int, ...], device: str, dtype: str) -> None:
    case = Case("dsinks", num_heads_q=6, num_heads_kv=2, seqlen_q=150)
    made = cases.inputs(case, DTYPES[dtype])
    sinks = cases.place(np.random.default_rng(6).standard_normal(shape).astype(DTYPES[dtype]))
    call, expected = with_options(case, made, {"sinks": np.broadcast_to(sinks, (2, 6))}, device=device)
    call.gradients["dsinks"] = cases.place(np.full(shape, np.nan, sinks.dtype))
    expected.values["dsinks"] = reference._sum_to(expected.values["dsinks"], shape)
    expected.sizes["dsinks"] = reference._sum_to(expected.sizes["dsinks"], shape)
    expected.bounds["dsinks"] = reference._sum_to(expected.bounds["dsinks"], shape)
    check(call, expected)


@pytest.mark.parametrize("sink", [-5000.0, -4998.0, -6000.0, 0.0])
@everywhere("float32", "float64")
def test_an_lse_far_from_zero_keeps_its_sum(device: str, dtype: str, sink: float) -> None:
    """Scores and a sink of some -5000: their differences are what counts, and lse alone cannot hold them in float32."""
    case = Case("far_from_zero", num_heads_q=4, seqlen_q=100, seqlen_k=300)
    made = cases.inputs(case, DTYPES[dtype])
    mask = cases.place(np.full((1, 1), -5000, DTYPES[dtype]))
    sinks = cases.place(np.full(4, sink, DTYPES[dtype]))
    check(*with_options(case, made, {"attn_mask": mask, "sinks": sinks}, device=device))


@everywhere("float32", "bfloat16")
def test_dout_may_repeat(device: str, dtype: str) -> None:
    """out.sum() has a gradient of one element with strides of 0."""
    case = CASES["grouped"]
    call, _ = make(case, dtype, device=device)
    call.dout = np.broadcast_to(cases.place(np.ones((1,), DTYPES[dtype])), call.out.shape)
    expected = reference.expect_gradients(*call.inputs.arrays, call.dout, call.dlse, **call.inputs.options)
    check(call, expected)


@everywhere("float32")
@pytest.mark.parametrize("empty", ["batch", "rows", "keys"])
def test_summed_gradients_of_nothing_are_zero(empty: str, device: str, dtype: str) -> None:
    sizes = {"batch": {"batch": 0}, "rows": {"seqlen_q": 0}, "keys": {"seqlen_k": 0}}[empty]
    case = Case("empty_sum", sinks=True, **sizes)
    made = cases.inputs(case, DTYPES[dtype])
    mask = np.zeros((1, 1, 1, 1), np.float32)
    check(*with_options(case, made, {"attn_mask": cases.place(mask)}, device=device))


@everywhere("float32")
@pytest.mark.parametrize(
    "window", [(0, 0), (1, 0), (0, 1), (65, 0), (0, 65), (33, 31), (None, 1), (1, None), (62, None)], ids=str
)
def test_bands_that_end_where_a_tile_does(window: tuple[int, int], device: str, dtype: str) -> None:
    """The first or last of the rows that see a key, or keys that a row sees, is alone in a tile of 32, 64 or 128; or
    all but one are."""
    for head_dim in (16, 136):
        case = Case("edge", num_heads_kv=1, seqlen_q=150, seqlen_k=140, head_dim=head_dim, options={"window": window})
        check(*make(case, dtype, device=device))


# What must not be read


@everywhere(*DTYPES)
@pytest.mark.parametrize(
    "name", ["lower_right_many_rows", "mask_bool_dark_rows", "mask_added_dark_rows", "diagonal_down"]
)
def test_rows_that_see_no_key_do_not_matter(name: str, device: str, dtype: str) -> None:
    call, expected = make(CASES[name], dtype, device=device)
    dark = np.isneginf(call.lse)
    assert dark.any()
    call.inputs.query[dark] = np.nan
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
    call, expected = with_options(case, made, {"attn_mask": cases.place(mask), "softcap": 5.0})
    for b, length in enumerate(lengths):
        made.key[b, :, length:] = np.nan
        made.value[b, :, length:] = np.nan
    check(call, expected)


@everywhere("float32", "float16")
@pytest.mark.parametrize("name", ["lower_right_many_rows", "mask_bool_dark_rows"])
def test_a_row_that_sees_no_key_has_no_gradient_whatever_the_keys_hold(name: str, device: str, dtype: str) -> None:
    call, _ = make(CASES[name], dtype, device=device)
    dark = np.isneginf(call.lse)
    call.inputs.key[:, :, 3] = np.nan
    call.inputs.value[:, :, 3] = np.inf
    assert not call.run()["dq"][dark].any()


@pytest.mark.parametrize("kind", ["bool", "added"])
@everywhere(*DTYPES)
def test_a_value_that_a_mask_hides_between_others_does_not_matter(device: str, dtype: str, kind: str) -> None:
    case = Case("hole", seqlen_q=100, seqlen_k=200)
    made = cases.inputs(case, DTYPES[dtype])
    visible = np.ones((1, 200), bool)
    visible[:, 50:60] = False
    mask = visible if kind == "bool" else np.where(visible, 0.5, -np.inf).astype(DTYPES[dtype])
    call, expected = with_options(case, made, {"attn_mask": cases.place(mask)}, device=device)
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


def test_a_gpu_without_code_for_it_is_refused_in_words() -> None:
    made = shapes_only(device_type=capi.CUDA, dtype=capi.FLOAT16)
    assert capi.backward_plan(made, capi.gpu_device(35))[0] == UNSUPPORTED
    assert "no backward kernel of this build runs on compute capability 3.5" in capi.last_error()
    assert "move the arrays to the CPU, where every dtype and option is served" in capi.last_error()
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
    assert plan.num_tiles == 3 * 2 * 3, "a task is a block of keys of one key/value head"
    assert plan.num_threads == 4
    assert flashcore.kernels()[plan.kernel].name == "cpu_baseline"
    assert plan.workspace_bytes % 64 == 0
    made.forward.contents.attn_mask = made.dbias = _tensor(capi.FLOAT32, 0, 0, 300, 1)
    assert capi.backward_plan(made, capi.cpu_device())[1].num_tiles == 3, "what dbias sums over is walked in one task"
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
    dout, _ = cotangents(CASES[name], made)
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
        _, _, expected = expected_of(case.name, dtype)
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
    dout, _ = cotangents(case, made)
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


@pytest.mark.parametrize("device", [CUDA, EMULATED])
@given(case=problems(), dtype=st.sampled_from(["float16", "bfloat16", "float32"]))
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50)
def test_any_problem_on_gpus(device: str, case: Case, dtype: str) -> None:
    assume(device == "emulated" or "reversed" not in case.strides_q + case.strides_kv)
    check(*make(case, dtype, device=device))


# On a GPU alone


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_long_sequences_after_their_own_forward(dtype: str, head_dim: int, is_causal: bool) -> None:
    """Whatever kernel the forward takes, its out and lse are what the backward reads."""
    case = Case(
        "long", batch=1, num_heads_q=4, num_heads_kv=2, seqlen_q=1025, seqlen_k=1537, head_dim=head_dim, sinks=True,
        options={"is_causal": "lower_right"} if is_causal else {},
    )  # fmt: skip
    call, expected = make(case, dtype, device="cuda")
    call.out[...], call.lse[...] = np.nan, np.nan
    sent = call.sent()
    assert capi.forward(sent.forward_problem()) == OK, capi.last_error()
    assert capi.backward(sent.problem()) == OK, capi.last_error()
    for name, gradient in sent.gradients.items():
        expected.check(name, fetch(gradient))


@pytest.mark.gpu
def test_more_heads_than_a_grid_has_rows() -> None:
    case = Case("many", batch=35000, num_heads_q=4, num_heads_kv=2, seqlen_q=3, seqlen_k=2, head_dim=8, sinks=True)
    check(*make(case, "float32", device="cuda"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 256])
def test_offsets_beyond_32_bits(head_dim: int) -> None:
    """Rows 2^25 elements apart, of inputs side by side in one buffer and gradients in another."""
    import torch

    call, expected = make(Case("far", batch=1, num_heads_q=1, num_heads_kv=1, head_dim=head_dim), "float16")
    sent = replace(call, device="cuda").sent()
    far = [torch.full((70, 1 << 25), torch.nan, dtype=torch.float16, device="cuda") for _ in range(2)]

    def spread(x: Any, buffer: Any, place: int) -> Any:
        view = buffer[:, place * head_dim : (place + 1) * head_dim][None, None]
        return view.copy_(x)

    inputs = [spread(x, far[0], place) for place, x in enumerate(sent.inputs.arrays)]
    out, dout = (spread(x, far[0], place) for place, x in ((3, sent.out), (4, sent.dout)))
    gradients = {name: spread(x, far[1], place) for place, (name, x) in enumerate(sent.gradients.items())}
    sent = replace(sent, inputs=Inputs(*inputs, {}), out=out, dout=dout, gradients=gradients)
    assert sent.problem().dq.strides[2] == 1 << 25
    assert capi.backward(sent.problem()) == OK, capi.last_error()
    for name, gradient in gradients.items():
        expected.check(name, fetch(gradient))
    assert far[1][:, len(gradients) * head_dim :].isnan().all()


@pytest.mark.gpu
def test_a_captured_backward_has_the_same_bits() -> None:
    import torch

    call, expected = make(CASES["everything"], "float16", device="cuda")
    check(call, expected)
    sent = call.sent()
    made = sent.problem()
    workspace = torch.empty(capi.backward_plan(made)[1].workspace_bytes, dtype=torch.uint8, device="cuda")

    def enqueue() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        size = workspace.numel()
        status = capi.library().fc_attention_backward(ctypes.byref(made), workspace.data_ptr(), size, stream)
        assert status == OK, capi.last_error()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    for _ in range(3):
        for gradient in sent.gradients.values():
            gradient.fill_(torch.nan)
        graph.replay()
        assert {name: fetch(x).tobytes() for name, x in sent.gradients.items()} == bits(call.gradients)


@pytest.mark.gpu
def test_a_backward_is_enqueued_and_not_waited_for() -> None:
    """On the stream it is given: what the stream writes to dout before it counts."""
    import torch

    call, expected = make(CASES["grouped"], "float16", device="cuda")
    sent = call.sent()
    made, right = sent.problem(), sent.dout.clone()
    sent.dout.zero_()
    workspace = torch.empty(capi.backward_plan(made)[1].workspace_bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**9)
        sent.dout.copy_(right)
    pointer, size = workspace.data_ptr(), workspace.numel()
    status = capi.library().fc_attention_backward(ctypes.byref(made), pointer, size, stream.cuda_stream)
    assert status == OK, capi.last_error()
    assert not stream.query(), "the call waited"
    stream.synchronize()
    for name, gradient in sent.gradients.items():
        expected.check(name, fetch(gradient))


@pytest.mark.gpu
def test_a_gpu_wants_its_workspace_aligned() -> None:
    call, _ = make(CASES["plain"], "float16", device="cuda")
    made = call.sent().problem()
    size = capi.backward_plan(made)[1].workspace_bytes
    assert capi.library().fc_attention_backward(ctypes.byref(made), 64, size, None) == INVALID
    assert "on a GPU it must be aligned to 256 bytes" in capi.last_error()


# Beside PyTorch


TORCH_CASES = ("plain", "grouped", "causal_129", "mask_added", "mask_added_matrix", "mask_bool", "head_dim_v_wider")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TORCH_CASES)
def test_torch_agrees(name: str, dtype: str) -> None:
    """PyTorch's autograd passes the same bounds, and so do we on what our own forward made."""
    torch = pytest.importorskip("torch", reason="PyTorch is the second opinion")
    case = CASES[name]
    made = cases.inputs(case, DTYPES[dtype])
    dout, _ = cotangents(case, made)
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
