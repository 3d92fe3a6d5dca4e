"""python -m flashcore tune: flashcore.autotune over a list of shapes, on random inputs of torch's or NumPy's making.

Each shape is saved as soon as it is measured, and what is known already is passed over, so a run may be broken off and
taken up again.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import flashcore
from flashcore import _C
from flashcore.autotune import Tuning, is_off

GRAMMAR = "B8,H12,S512,D64 and after it any of causal, float16, bfloat16, float32; H32/8 for 8 key/value heads"


class CannotTune(Exception):
    """This machine or this command line cannot; the words say what to do."""


@dataclass(frozen=True)
class Shape:
    """Self-attention: seqlen queries and keys."""

    batch: int
    num_heads_q: int
    num_heads_kv: int
    seqlen: int
    head_dim: int
    is_causal: bool = False
    dtype: str = "float16"

    @property
    def name(self) -> str:
        heads = f"H{self.num_heads_q}" + (f"/{self.num_heads_kv}" if self.num_heads_kv != self.num_heads_q else "")
        causal = ",causal" if self.is_causal else ""
        return f"B{self.batch},{heads},S{self.seqlen},D{self.head_dim}{causal},{self.dtype}"

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.num_heads_q * self.seqlen**2 * self.head_dim * (0.5 if self.is_causal else 1.0)

    @staticmethod
    def parse(text: str) -> Shape:
        sizes, causal, dtype = {}, False, "float16"
        for word in text.split(","):
            if found := re.fullmatch(r"([BSD])([1-9]\d*)|(H)([1-9]\d*)(?:/([1-9]\d*))?", word):
                letter = found[1] or found[3]
                if letter in sizes:
                    raise CannotTune(f"{text!r} has {letter} twice; a shape is {GRAMMAR}")
                sizes[letter] = int(found[2] or found[4])
                sizes["K"] = int(found[5]) if found[5] else sizes.get("K", 0)
            elif word == "causal":
                causal = True
            elif word in ("float16", "bfloat16", "float32"):
                dtype = word
            else:
                raise CannotTune(f"{word!r} in {text!r} is not understood; a shape is {GRAMMAR}")
        if missing := [letter for letter in "BHSD" if letter not in sizes]:
            raise CannotTune(f"{text!r} lacks {', '.join(missing)}; a shape is {GRAMMAR}")
        heads_kv = sizes["K"] or sizes["H"]
        return Shape(sizes["B"], sizes["H"], heads_kv, sizes["S"], sizes["D"], causal, dtype)


def _default_shapes() -> list[Shape]:
    """Forty shapes of models that people run: encoders and small batches, decoders that read a prompt."""
    full = [(batch, 8, 8, seqlen, 64) for seqlen in (128, 256, 512, 1024) for batch in (1, 8, 16, 32)]
    bert = [(batch, 12, 12, seqlen, 64) for seqlen in (128, 512) for batch in (1, 8)]
    causal = [(batch, 12, 12, seqlen, 64) for seqlen in (128, 256, 512, 1024) for batch in (1, 8)]
    large = [(1, 32, 32, 512, 128), (1, 32, 8, 512, 128), (1, 32, 8, 2048, 128), (4, 32, 8, 2048, 128)]
    small = [(1, 1, 1, 512, 64), (4, 16, 16, 512, 32), (1, 16, 16, 1024, 128), (1, 8, 8, 1024, 256)]
    shapes = [Shape(*sizes) for sizes in [*full, *bert, *small]]
    shapes += [Shape(*sizes, is_causal=True) for sizes in [*causal, *large]]
    return shapes + [Shape(*sizes, dtype="bfloat16") for sizes in large]


SHAPES = _default_shapes()
MOST_FLOPS_ON_CPU = 2e9  # of the list: what is over in a tenth of a second on the slowest kernel


def shapes_for(device: str) -> list[Shape]:
    """The list, or on a CPU what of it such a machine would be given."""
    if device != "cpu":
        return SHAPES
    small = (shape for shape in SHAPES if shape.flops <= MOST_FLOPS_ON_CPU and shape.dtype == "float16")
    return [Shape(**{**vars(shape), "dtype": "float32"}) for shape in small]


def inputs(shape: Shape, device: str) -> tuple[Any, Any, Any]:
    """Query, key and value, normally distributed. Raises CannotTune where nothing here can make them."""
    heads = (shape.num_heads_q, shape.num_heads_kv, shape.num_heads_kv)
    sizes = [(shape.batch, number, shape.seqlen, shape.head_dim) for number in heads]
    if find_spec("torch"):
        import torch

        generator = torch.Generator(device).manual_seed(42)
        dtype = getattr(torch, shape.dtype)
        q, k, v = (torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes)
    elif device == "cpu" and shape.dtype != "bfloat16" and find_spec("numpy"):
        import numpy as np

        random = np.random.default_rng(42)
        q, k, v = (random.standard_normal(size, np.float32).astype(shape.dtype) for size in sizes)
    else:
        raise CannotTune(f"needs PyTorch{' or NumPy' if device == 'cpu' else ''} to make inputs; pip install torch")
    return q, k, v


def choose_device(given: str | None) -> str:
    count, why_none = _C.cuda_devices()
    if given is None:
        return "cuda:0" if count else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", given):
        raise CannotTune(f"device is {given!r}; allowed: cpu, cuda, cuda:0, cuda:1, ...")
    if given.startswith("cuda") and not count:
        raise CannotTune(f"there is no GPU: {why_none}")
    return "cuda:0" if given == "cuda" else given


def tune(given: list[str], device: str | None, again: bool) -> int:
    """Prints a line for each shape and the gain over all. Exit status: 0 done, 2 cannot."""
    try:
        if is_off():
            raise CannotTune("FLASHCORE_AUTOTUNE=0 turns tuning off; unset it")
        if forced := os.environ.get("FLASHCORE_FORCE"):
            raise CannotTune(f"FLASHCORE_FORCE={forced} leaves nothing to tune; unset it")
        where = choose_device(device)
        shapes = [Shape.parse(text) for text in given] or shapes_for(where)
        results = _tune_all(shapes, where, again)
    except CannotTune as error:
        print(f"flashcore tune: {error}", file=sys.stderr)
        return 2
    measured = [result for result in results if result.microseconds]
    gain = math.exp(sum(math.log(result.gain) for result in measured) / len(measured)) if measured else 1.0
    changed = sum(result.best != result.planned for result in measured)
    print(
        f"{len(measured)} of {len(shapes)} shapes measured; for {changed} another kernel was faster than the "
        f"planner's; geometric mean of the gain {gain:.3f}x"
    )
    if measured:
        print(f"saved in {measured[-1].saved}" if measured[-1].saved else "not saved")
    return 0


def _tune_all(shapes: list[Shape], device: str, again: bool) -> list[Tuning]:
    results = []
    begin = time.monotonic()
    for index, shape in enumerate(shapes):
        _say(f"[{index + 1}/{len(shapes)}, {time.monotonic() - begin:.0f} s] {shape.name}")
        try:
            q, k, v = inputs(shape, device)
            if not again and flashcore.explain(q, k, v, is_causal=shape.is_causal).tuned:
                _say("  known already; --again measures it anew")
                continue
            results.append(flashcore.autotune(q, k, v, is_causal=shape.is_causal, progress=_say))
        except (ValueError, NotImplementedError, MemoryError, RuntimeError) as error:
            raise CannotTune(f"{shape.name}: {error}") from error
    return results


def _say(line: str) -> None:
    print(line, flush=True)
