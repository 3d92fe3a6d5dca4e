"""A backward call with all its arrays, run through the C API on the CPU, on a GPU, or by the emulator of emulated.py.

The arrays are NumPy's, laid in poison by cases.place; for a GPU they travel as they are, and the gradients come back
with the poison around them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import capi
import cases
import emulated
import numpy as np
import pytest
import reference
from capi import OK
from cases import CASES, DTYPES, Case, Inputs
from devices import bring_back, send
from reference import Array, ExpectedGradients

# Where a test may run, for pytest.mark.parametrize.
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EMULATED = pytest.param(
    "emulated",
    marks=[
        pytest.mark.uninstrumented,
        pytest.mark.skipif(bool(emulated.lacks()), reason=emulated.lacks() or "it can be built"),
    ],
)
DEVICES = ["cpu", CUDA, EMULATED]


def everywhere(*dtypes: str) -> pytest.MarkDecorator:
    """Parametrizes `device` and `dtype`: all of these on the CPU, what there is on a GPU, and one on the emulator."""
    on_gpu = [dtype for dtype in dtypes if dtype != "float64"]
    places = [("cpu", dtype, []) for dtype in dtypes]
    places += [("cuda", dtype, CUDA.marks) for dtype in on_gpu]
    places += [("emulated", on_gpu[0], EMULATED.marks)]
    params = [pytest.param(device, dtype, id=f"{device}-{dtype}", marks=marks) for device, dtype, marks in places]
    return pytest.mark.parametrize("device,dtype", params)


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
    device: str = "cpu"  # of DEVICES

    def forward_problem(self) -> capi.Problem:
        options = self.inputs.options
        arrays = [self._bhsd(x) for x in (*self.inputs.arrays, self.out)]
        made = capi.problem(*arrays, lse=self.lse, num_threads=self.num_threads)
        made.device_type = capi.CPU if self.device == "cpu" else capi.CUDA
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
            setattr(made, name, capi.tensor(capi.broadcast(array, shapes[like]) if like else self._bhsd(array)))
        return made

    def run(self) -> dict[str, Array]:
        if self.device == "emulated":
            status = emulated.backward(emulated.library("portable"), self.problem())
            assert status == OK, f"status {status}: a block is stuck, or wrote outside the workspace"
        elif self.device == "cuda":
            sent = self.sent()
            assert capi.backward(sent.problem()) == OK, capi.last_error()
            for name, array in self.gradients.items():
                bring_back(sent.gradients[name], array)
        else:
            assert capi.backward(self.problem()) == OK, capi.last_error()
        for name, array in self.gradients.items():
            assert cases.guard_intact(array), f"wrote around {name}"
        return self.gradients

    def sent(self) -> Call:
        """The same on the GPU."""

        def moved(x: Any) -> Any:
            return x if x is None else send(x, "cuda")

        inputs = Inputs(
            *map(moved, self.inputs.arrays), {name: moved(option) for name, option in self.inputs.options.items()}
        )
        arrays = {name: moved(getattr(self, name)) for name in ("out", "lse", "dout", "dlse")}
        gradients = {name: moved(array) for name, array in self.gradients.items()}
        return replace(self, inputs=inputs, gradients=gradients, **arrays)

    def _bhsd(self, x: Any) -> Any:
        return x.swapaxes(1, 2) if self.inputs.options.get("layout") == "bshd" else x


def gradients_of(case: Case, made: Inputs) -> dict[str, Array]:
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


def cotangents(case: Case, made: Inputs) -> tuple[Array, Array | None]:
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
    dout, dlse = cotangents(case, made)
    out, lse = reference.attention(*made.arrays, **made.options)
    expected = reference.expect_gradients(*made.arrays, dout, dlse, **made.options)
    return out.astype(dtype), lse.astype(made.lse_dtype), expected


@cache
def expected_of(name: str, dtype: str) -> tuple[Array, Array, ExpectedGradients]:
    return _expect(CASES[name], DTYPES[dtype])


def make(case: Case, dtype: str, **options: Any) -> tuple[Call, ExpectedGradients]:
    known = CASES.get(case.name) is case
    out, lse, expected = expected_of(case.name, dtype) if known else _expect(case, DTYPES[dtype])
    made = cases.inputs(case, DTYPES[dtype])
    dout, dlse = cotangents(case, made)
    gradients = gradients_of(case, made)
    strides = "contiguous" if case.strides_q in REPEATS else case.strides_q
    return Call(made, cases.place(out, strides), cases.place(lse), dout, dlse, gradients, **options), expected


def check(call: Call, expected: ExpectedGradients) -> None:
    for name, result in call.run().items():
        expected.check(name, result)


def with_options(case: Case, made: Inputs, more: dict[str, Any], **rest: Any) -> tuple[Call, ExpectedGradients]:
    """A case's arrays under options that no case names."""
    made = Inputs(*made.arrays, {**made.options, **more})
    dout, dlse = cotangents(case, made)
    out, lse = reference.attention(*made.arrays, **made.options)
    expected = reference.expect_gradients(*made.arrays, dout, dlse, **made.options)
    out, lse = cases.place(out.astype(made.query.dtype)), cases.place(lse.astype(made.lse_dtype))
    return Call(made, out, lse, dout, dlse, gradients_of(case, made), **rest), expected


def bits(gradients: dict[str, Array]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in gradients.items()}
