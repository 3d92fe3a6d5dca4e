"""fc_attention_backward on the CPU, through the C API: every case, dtype and instruction set against the oracle."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import capi
import cases
import numpy as np
import pytest
import reference
from capi import OK
from cases import CASES, DTYPES, Case, Inputs
from reference import Array, ExpectedGradients

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
        made.flags = _flags(options)
        made.scale = options.get("scale") or 0
        made.softcap = options.get("softcap") or 0
        made.window_left, made.window_right = (max(edge or 0, 0) for edge in options.get("window") or (0, 0))
        made.diagonal = options["diagonal"] if isinstance(options.get("diagonal"), int) else 0
        for name, shape in self.broadcast_shapes(made).items():
            if name in options:
                setattr(made, name, capi.tensor(np.broadcast_to(options[name], shape)))
        return made

    def problem(self) -> capi.BackwardProblem:
        forward = self.forward_problem()
        shapes = self.broadcast_shapes(forward)
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

    @staticmethod
    def broadcast_shapes(made: capi.Problem) -> dict[str, tuple[int, ...]]:
        heads = (made.batch, made.num_heads_q)
        return {"attn_mask": (*heads, made.seqlen_q, made.seqlen_k), "sinks": heads, "alibi_slopes": heads}


def _flags(options: dict[str, Any]) -> int:
    left, right = (None if edge == -1 else edge for edge in options.get("window") or (None, None))
    return (
        (capi.CAUSAL if options.get("is_causal") else 0)
        | (capi.LOWER_RIGHT if "lower_right" in (options.get("is_causal"), options.get("diagonal")) else 0)
        | (capi.WINDOW_LEFT if left is not None else 0)
        | (capi.WINDOW_RIGHT if right is not None else 0)
        | (capi.SCALE if options.get("scale") is not None else 0)
    )


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
