"""Random problems over the whole argument space, against the oracle."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import reference
from cases import DTYPES, Case
from devices import Kernel, can_send, fetch, may_refuse, same_bits, send
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from strategies import problems

import flashcore


def _call(kernel: Kernel, *arrays: Any, **options: Any) -> Any:
    """attention(); an example that may be refused, and is, says nothing."""
    try:
        return flashcore.attention(*arrays, **options)
    except NotImplementedError as error:
        if not may_refuse(kernel, error):
            raise
        assume(False)


def _needs_float32(kernel: Kernel) -> None:
    rows = [row.name for row in flashcore.kernels() if row.family == kernel.force]
    if kernel.device != "cpu" and not any("_float32_" in name for name in rows):
        pytest.skip(f"{kernel.force} has no float32")


@given(case=problems(), dtype=st.sampled_from(sorted(DTYPES)))
@settings(
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,  # a fast family reads few of these strides; test_hopper.py draws what it reads
    ]
)
def test_any_problem(kernel: Kernel, case: Case, dtype: str) -> None:
    assume(kernel.device == "cpu" or dtype != "float64")
    problem = cases.inputs(case, DTYPES[dtype])
    assume(all(can_send(x, kernel.device) for x in problem.arrays))
    arrays = [send(x, kernel.device) for x in problem.arrays]
    options = {name: send(x, kernel.device) for name, x in problem.options.items()}
    out, lse = _call(kernel, *arrays, **options, return_lse=True)
    right = reference.expect(*problem.arrays, **problem.options)
    right.check(fetch(out), fetch(lse))
    assert fetch(out).dtype == DTYPES[dtype]
    assert same_bits(flashcore.attention(*arrays, **options), out)


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 40),
    keys=st.integers(1, 140),
    shift=st.floats(-50, 50),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_adding_a_number_to_every_score_changes_only_lse(
    kernel: Kernel, seed: int, rows: int, keys: int, shift: float
) -> None:
    _needs_float32(kernel)
    rng = np.random.default_rng(seed)
    q, k, v = (cases.place(rng.standard_normal((1, 1, n, 16)).astype(np.float32)) for n in (rows, keys, keys))
    mask = cases.place(np.full((1, 1, 1, 1), shift, np.float32))
    sent = [send(x, kernel.device) for x in (q, k, v)]
    out, lse = map(fetch, flashcore.attention(*sent, return_lse=True))
    moved, moved_lse = map(fetch, flashcore.attention(*sent, attn_mask=send(mask, kernel.device), return_lse=True))
    np.testing.assert_allclose(moved, out, atol=5e-5)  # 50 + score is rounded to 2^-18
    np.testing.assert_allclose(moved_lse, lse + np.float32(shift), atol=5e-5)


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 40), keys=st.integers(1, 140))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_the_order_of_keys_does_not_matter(kernel: Kernel, seed: int, rows: int, keys: int) -> None:
    _needs_float32(kernel)
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, 1, n, 16)).astype(np.float32) for n in (rows, keys, keys))
    order = rng.permutation(keys)
    results = [
        fetch(flashcore.attention(*(send(cases.place(x), kernel.device) for x in arrays)))
        for arrays in ((q, k, v), (q, k[:, :, order], v[:, :, order]))
    ]
    np.testing.assert_allclose(*results, atol=5e-6)
