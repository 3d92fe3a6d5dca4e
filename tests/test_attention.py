"""Every case on every kernel of this machine in every dtype, against the oracle."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
from cases import DTYPES, Case
from devices import Kernel, can_send, fetch, same_bits, send

import flashcore


def _send_all(given: cases.Inputs, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not all(can_send(array, device) for array in given.arrays):
        pytest.skip("PyTorch has no negative strides")
    arrays = tuple(send(array, device) for array in given.arrays)
    return arrays, {name: send(x, device) for name, x in given.options.items()}


def _supported(kernel: Kernel, dtype: str) -> None:
    if kernel.device == "cuda" and dtype == "float64":
        pytest.skip("float64 is served on the CPU alone; test_refusals.py checks the words")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.params())
def test_case(kernel: Kernel, case: Case, dtype: str) -> None:
    _supported(kernel, dtype)
    given = cases.inputs(case, DTYPES[dtype])
    arrays, options = _send_all(given, kernel.device)
    out, lse = map(fetch, flashcore.attention(*arrays, **options, return_lse=True))
    assert out.dtype == DTYPES[dtype]
    assert lse.dtype == given.lse_dtype
    cases.expected(case, DTYPES[dtype]).check(out, lse)


OUT_STRIDES = [name for name in cases.STRIDES if not name.startswith("repeat")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strides", OUT_STRIDES)
@pytest.mark.parametrize("name", ["everything", "causal_65", "lower_right_many_rows", "head_dim_v_one", "no_keys"])
def test_out_is_written_and_nothing_beside_it(kernel: Kernel, name: str, strides: str, dtype: str) -> None:
    _supported(kernel, dtype)
    case = cases.CASES[name]
    given = cases.inputs(case, DTYPES[dtype])
    right = cases.expected(case, DTYPES[dtype])
    arrays, options = _send_all(given, kernel.device)
    place = cases.place(np.full(right.out.shape, np.nan, DTYPES[dtype]), strides)
    if not can_send(place, kernel.device):
        pytest.skip("PyTorch has no negative strides")
    out = send(place, kernel.device)
    assert flashcore.attention(*arrays, **options, out=out) is out
    if kernel.device == "cuda":  # bring the whole buffer back to look at its guard bytes
        buffer = cases.buffer_of(place)
        buffer[...] = fetch(out.as_strided((buffer.size // place.itemsize,), (1,), 0)).view(np.uint8)
    right.check(place)
    assert cases.guard_intact(place), "bytes beside the output were written"
    assert same_bits(place, flashcore.attention(*arrays, **options)), "the bits depend on where the output lies"


@pytest.mark.parametrize("name", ["everything", "strides_padded_rows", "mask_added_columns", "sinks"])
def test_inputs_are_not_written(kernel: Kernel, name: str) -> None:
    if kernel.device == "cuda":
        pytest.skip("the CPU kernels are checked by bytes; on a GPU compute-sanitizer does")
    given = cases.inputs(cases.CASES[name], DTYPES["float32"])
    kept = [*given.arrays, *(x for x in given.options.values() if isinstance(x, np.ndarray))]
    before = [cases.buffer_of(x).tobytes() for x in kept]
    flashcore.attention(*given.arrays, **given.options)
    assert [cases.buffer_of(x).tobytes() for x in kept] == before


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
@pytest.mark.parametrize("seqlen", [600, 1025])
def test_many_tiles(kernel: Kernel, seqlen: int, options: dict[str, Any], dtype: str) -> None:
    case = Case(f"many_tiles_{seqlen}", batch=1, seqlen_q=seqlen, seqlen_k=seqlen, head_dim=40, options=options)
    given = cases.inputs(case, DTYPES[dtype])
    arrays, _ = _send_all(given, kernel.device)
    right = cases.reference.expect(*given.arrays, **options)
    right.check(*map(fetch, flashcore.attention(*arrays, **options, return_lse=True)))


def test_forced_kernel_is_the_one_that_runs(kernel: Kernel) -> None:
    given = cases.inputs(cases.CASES["plain"], DTYPES["float32" if kernel.device == "cpu" else "float16"])
    arrays, _ = _send_all(given, kernel.device)
    plan = flashcore.explain(*arrays)
    assert kernel.force in (plan.kernel, plan.family)
