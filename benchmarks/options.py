"""
options.py - what do masks and options cost on a GPU? Device microseconds per call, all contenders in turn, each call
on inputs that no cache holds. PyTorch is given a mask that says the same, where one can: a window as bools, say.

Below the tables: what each mask adds to the call without it, beside its bytes; what a window takes beside its share of
the keys of a full call; and what bfloat16 takes beside float16.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from typing import Any

import contenders as who
import harness
import timers
from report import Table


def _rows_and_keys(problem, device):
    import torch

    index = torch.arange(problem.seqlen, device=device)
    return index[:, None], index


def _shape(problem, each_head):
    """Of a mask that says something of each score, for each head or one for all."""
    batch, heads = (problem.batch, problem.num_heads_q) if each_head else (1, 1)
    return batch, heads, problem.seqlen, problem.seqlen


def _true(shape, share, device):
    """Bools of which such a share is true at random, and each row's first."""
    import torch

    mask = torch.rand(shape, generator=torch.Generator(device).manual_seed(who.SEED), device=device) < share
    mask[..., 0] = True
    return mask


def _with_odd_rows(mask):
    """The same, in rows that are one element longer: no copy engine reads them."""
    import torch

    room = torch.empty((*mask.shape[:-1], mask.shape[-1] + 1), device=mask.device, dtype=mask.dtype)
    room[..., :-1] = mask
    return room[..., :-1]


def _mask(make: Callable[[Any, str], Any]):
    """The option of an attn_mask, which says the same to both."""

    def option(problem, device):
        import torch

        mask = make(problem, device)
        # PyTorch's cuDNN makes NaN of a mask of float32 beside a query of 16 bits.
        peer_mask = mask if mask.dtype == torch.bool else mask.to(getattr(torch, problem.dtype))
        return {"options": {"attn_mask": mask}, "peer_mask": peer_mask}

    return option


def _bias(each_head: bool, dtype: str | None = None, has_odd_rows: bool = False):
    def make(problem, device):
        import torch

        generator = torch.Generator(device).manual_seed(who.SEED)
        number = getattr(torch, dtype or problem.dtype)
        mask = torch.randn(_shape(problem, each_head), generator=generator, device=device, dtype=number)
        return _with_odd_rows(mask) if has_odd_rows else mask

    return _mask(make)


def _bools(each_head: bool, share: float = 0.7, has_odd_rows: bool = False):
    def make(problem, device):
        mask = _true(_shape(problem, each_head), share, device)
        return _with_odd_rows(mask) if has_odd_rows else mask

    return _mask(make)


def _padding(problem, device):
    """[batch, 1, 1, keys]: half of the keys are true in the first batch, all in the last."""
    import torch

    lengths = torch.linspace(problem.seqlen / 2, problem.seqlen, problem.batch, device=device).long()
    return (torch.arange(problem.seqlen, device=device) < lengths[:, None])[:, None, None]


def _float_padding(problem, device):
    import torch

    padding = _padding(problem, device)
    zero = torch.zeros(padding.shape, device=device, dtype=getattr(torch, problem.dtype))
    return zero.masked_fill(~padding, -torch.inf)


def _random_keys(problem, device):
    return _true((problem.batch, 1, 1, problem.seqlen), 0.7, device)


def _causal(problem, device):
    rows, keys = _rows_and_keys(problem, device)
    return keys <= rows


def _blocks(problem, device):
    rows, keys = _rows_and_keys(problem, device)
    size = -(-problem.seqlen // 4)
    return rows // size == keys // size


def _padding_and_causal(problem, device):
    padding = _padding(problem, device)
    return {"is_causal": True, "options": {"attn_mask": padding}, "peer_mask": padding & _causal(problem, device)}


def _window(left, right):
    def option(problem, device):
        rows, keys = _rows_and_keys(problem, device)
        mask = (keys >= rows - left) & (keys <= rows + right) if problem.seqlen <= 4_096 else None
        return {"options": {"window": (left, right)}, "peer_mask": mask}

    return option


def _sinks(problem, device):
    import torch

    return {"options": {"sinks": torch.zeros(problem.num_heads_q, device=device)}}


def _alibi(problem, device):
    import torch

    exponents = torch.arange(1, problem.num_heads_q + 1, device=device) * (-8.0 / problem.num_heads_q)
    return {"options": {"alibi_slopes": torch.exp2(exponents)}}


# What a row's name says -> what is given: of flashcore's options, and the mask that says the same to PyTorch.
OPTIONS: dict[str, Callable[[Any, str], dict]] = {
    "none": lambda problem, device: {},
    "bias": _bias(each_head=True),
    "bias-for-all-heads": _bias(each_head=False),
    "bias-of-odd-rows": _bias(each_head=False, has_odd_rows=True),
    "bias-in-float32": _bias(each_head=False, dtype="float32"),
    "bools": _bools(each_head=True),
    "bools-for-all-heads": _bools(each_head=False),
    "bools-of-odd-rows": _bools(each_head=False, has_odd_rows=True),
    "bools-all-true": _bools(each_head=False, share=1.0),
    "causal-as-bools": _mask(_causal),
    "blocks": _mask(_blocks),
    "padding": _mask(_padding),
    "padding-in-floats": _mask(_float_padding),
    "padding-and-causal": _padding_and_causal,
    "random-keys": _mask(_random_keys),
    "sinks": _sinks,
    "alibi": _alibi,
    "softcap": lambda problem, device: {"options": {"softcap": 30.0}},
    "window-512-0": _window(512, 0),
    "window-512-512": _window(512, 512),
}


@dataclasses.dataclass(frozen=True)
class Problem(who.Problem):
    option: str = "none"

    @property
    def name(self) -> str:
        return f"{super().name} {self.option}"

    def make(self, device: str, sets: int, seed: int = who.SEED) -> list[who.Inputs]:
        given = OPTIONS[self.option](self, device)
        return [dataclasses.replace(inputs, **given) for inputs in super().make(device, sets, seed)]


def rows() -> list[harness.Row]:
    sizes = ((4, 16, 2_048, 64), (4, 16, 2_048, 128), (2, 8, 2_048, 256))  # batch, heads, seqlen, head_dim
    problems = [Problem(*size, option=option) for size in sizes for option in OPTIONS]
    problems += [Problem(*size, dtype="bfloat16") for size in sizes]
    long = ("none", "window-512-0", "window-512-512")
    problems += [Problem(1, 16, 16_384, 128, option=option) for option in long]
    return [
        harness.Row(problem, f"D{problem.head_dim} S{problem.seqlen}", index, quick=problem.option in long[:2])
        for index, problem in enumerate(problems)
    ]


def measure(job: harness.Job) -> dict:
    times = timers.device_times(job.per_set(), job.effort)
    mask = job.inputs[0].options.get("attn_mask")
    figures = {name: {"us": statistics.median(samples)} for name, samples in times.items()}
    if mask is not None and "flashcore" in figures:
        figures["flashcore"]["mask_bytes"] = mask.numel() * mask.element_size()
    return figures


def _share(problem: dict, left: int, right: int) -> float:
    """Of all pairs of rows and keys those that a window lets see each other."""
    seqlen = problem["seqlen"]
    seen = sum(min(seqlen - 1, row + right) - max(0, row - left) + 1 for row in range(seqlen))
    return seen / seqlen**2


def conclude(results: list[dict], options: argparse.Namespace) -> harness.Conclusion:
    ours: dict[tuple, dict] = {}
    for result in results:
        problem, figures = result["problem"], result["contenders"].get("flashcore", {})
        if "us" in figures:
            key = problem["head_dim"], problem["seqlen"], problem["dtype"], problem["option"]
            ours[key] = figures | {"problem": problem}
    lines = []
    for (head_dim, seqlen, dtype, option), figures in ours.items():
        plain = ours.get((head_dim, seqlen, dtype, "none"))
        half = ours.get((head_dim, seqlen, "float16", option))
        where = f"D{head_dim} S{seqlen} {option}"
        if plain and "mask_bytes" in figures:
            more, megabytes = figures["us"] - plain["us"], figures["mask_bytes"] / 1e6
            lines.append(f"{where}: {more:+.0f} us over none, for {megabytes:.3g} MB")
        elif plain and option.startswith("window"):
            left, right = map(int, option.split("-")[1:])
            share = figures["us"] / plain["us"] / _share(figures["problem"], left, right)
            lines.append(f"{where}: {share:.2f} of its share of the full call")
        if dtype != "float16" and half:
            lines.append(f"{where} {dtype}: {figures['us'] / half['us']:.3f} of float16's time")
    return harness.Conclusion(lines)


QUESTION = harness.Question(
    name="options",
    text=__doc__,
    device="cuda",
    rows=rows,
    contenders=who.gpu_contenders,
    measure=measure,
    tables=(Table("us per call", ("us",)),),
    sets=who.Problem.sets_beyond,
    conclude=conclude,
)

if __name__ == "__main__":
    sys.exit(harness.main(QUESTION))
