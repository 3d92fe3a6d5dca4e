"""Hopper's families against the oracle: tile edges, rings of barriers, the softmax that keeps an old maximum.

The cases of test_attention.py run on them too where they can read them. Here every call is one that `hopper` must
serve, so a refusal is a failure; and one that the planner, left free, gives to one of the two, mostly to hopper_short,
as most are short. All arrays have strides of whole 16 bytes, except where a test says otherwise.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cases
import pytest
import reference
import strategies
from devices import fetch, same_bits, send
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashcore

torch = pytest.importorskip("torch", reason="GPU tests make their arrays with PyTorch")

ROWS = [kernel.name for kernel in flashcore.kernels() if kernel.family.startswith("hopper")]
DTYPES = ["float16", "bfloat16"]
HEAD_DIMS = sorted({int(dim) for name in ROWS for dim in re.findall(r"_d(\d+)_", name)})
Options = dict[str, Any]


def _lacks() -> str:
    if not ROWS:
        return "this build has no kernels for sm_90a"
    if not any(kernel.usable for kernel in flashcore.kernels() if kernel.family == "hopper"):
        return "no GPU that flashcore can use"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of compute capability 9.0"
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_lacks()), reason=_lacks() or "there is one")]


@pytest.fixture(autouse=True, params=["hopper", "planned"])
def _forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An error that a kernel leaves in the stream must fail the test that made it, not the next one."""
    if request.param == "hopper":
        monkeypatch.setenv("FLASHCORE_FORCE", "hopper")
    yield
    torch.cuda.synchronize()


# Arrays


def normal(*shape: int, dtype: str = "float32", seed: int = 42) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(getattr(torch, dtype))


def sprinkle(*shape: int, share: float = 0.75) -> Any:
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(7), device="cuda") < share


def in_floats(shown: Any, dtype: Any = torch.float32) -> Any:
    return torch.where(shown, 0.0, -torch.inf).to(dtype)


def qkv(
    rows: int = 200,
    keys: int = 0,
    dim: int = 64,
    dim_v: int = 0,
    *,
    batch: int = 1,
    heads: int = 2,
    heads_kv: int = 0,
    dtype: str = "float16",
    seed: int = 42,
) -> list[Any]:
    """query, key, value; 0 means as many as the number before."""
    keys, dim_v, heads_kv = keys or rows, dim_v or dim, heads_kv or heads
    shapes = (batch, heads, rows, dim), (batch, heads_kv, keys, dim), (batch, heads_kv, keys, dim_v)
    return [normal(*shape, dtype=dtype, seed=seed + n) for n, shape in enumerate(shapes)]


def check(q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
    """Runs and compares out and lse with the oracle."""
    out, lse = flashcore.attention(q, k, v, **options, return_lse=True)
    host = {name: fetch(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    reference.expect(*map(fetch, (q, k, v)), **host).check(fetch(out), fetch(lse))
    return out, lse


def of_class(word: str) -> Options:
    """The least option that brings a call to the rows of this mask."""
    return {
        "full": {},
        "band": {"is_causal": True},
        "unbiased": {"attn_mask": torch.ones(1, 1, device="cuda", dtype=torch.bool)},
        "biased": {"attn_mask": torch.zeros(1, 1, device="cuda")},
        "general": {"attn_mask": torch.zeros(1, 1, device="cuda"), "softcap": 1e6},  # which leaves scores as they are
    }[word]


every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_row_width = pytest.mark.parametrize("dim", HEAD_DIMS)
every_class = pytest.mark.parametrize("word", ["full", "band", "unbiased", "biased", "general"])


# Every row of variants.def


def of_row(name: str) -> tuple[str, int, str, int, int]:
    """dtype, head_dim, mask, block_m, block_n."""
    found = re.fullmatch(r"hopper(?:_short)?_(\w+)_d(\d+)_(\w+)_(\d+)x(\d+)", name)
    assert found
    dtype, dim, word, block_m, block_n = found.groups()
    return dtype, int(dim), word, int(block_m), int(block_n)


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _forced: None) -> str:
    if request.node.callspec.params["_forced"] != "hopper":
        pytest.skip("each row is forced by its name, once")
    monkeypatch.setenv("FLASHCORE_FORCE", request.param)
    return request.param


@pytest.mark.sanitize
def test_every_row_in_small(row: str) -> None:
    """Two tiles of rows, more tiles of keys than stages, padded columns, and each option of the row at once."""
    dtype, dim, word, *_ = of_row(row)
    q, k, v = qkv(200, 290, dim - 8, dim, heads=4, heads_kv=2, dtype=dtype)
    options: Options = {"sinks": normal(4)}
    if word != "full":
        options |= {"window": (100, 30), "diagonal": 60}
    if word == "unbiased":
        options |= {"attn_mask": sprinkle(200, 290)}
    if word in ("biased", "general"):
        options |= {"attn_mask": normal(200, 290, dtype=dtype)}
    if word == "general":
        options |= {"softcap": 5.0, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01], device="cuda")}
    assert flashcore.explain(q, k, v, **options).kernel == row
    check(q, k, v, **options)


@pytest.mark.sanitize
def test_every_row_with_a_bool_mask_or_without_keys(row: str) -> None:
    dtype, dim, word, *_ = of_row(row)
    if word in ("unbiased", "biased", "general"):
        q, k, v = qkv(65, 129, dim, dtype=dtype)
        options: Options = {"softcap": 5.0} if word == "general" else {}
        shown = sprinkle(65, 129)
        mask = in_floats(shown) if word == "biased" else shown
        check(q, k, v, attn_mask=mask, is_causal="lower_right", **options)
    elif word == "band":
        check(*qkv(270, 40, dim, heads=3, dtype=dtype), is_causal="lower_right")  # 230 rows see no key
    else:
        q, k, v = qkv(65, 8, dim, dtype=dtype)
        check(q, k[:, :, :0], v[:, :, :0])


@pytest.mark.parametrize("keys", [288, 290])  # copied by the copy engine, and by lanes
def test_every_row_with_padded_sequences(row: str, keys: int) -> None:
    """More tiles than multiprocessors; what a block finds of one sequence's mask must not reach the next."""
    dtype, dim, word, block_m, _ = of_row(row)
    if word not in ("unbiased", "biased", "general"):
        pytest.skip("no attn_mask")
    lengths = torch.tensor([keys, 5, 190, 0, 129, 64], device="cuda")[:, None, None, None]
    shown = torch.arange(keys, device="cuda") < lengths
    shown[2, ..., 50] = shown[4, ..., :20] = False
    q, k, v = qkv(block_m + 2, keys, dim, batch=6, heads=12, dtype=dtype)
    options: Options = {"softcap": 5.0} if word == "general" else {}
    check(q, k, v, attn_mask=shown if word == "unbiased" else in_floats(shown, q.dtype), **options)


def test_around_the_edges_of_its_own_tiles(row: str) -> None:
    dtype, dim, word, m, n = of_row(row)
    for rows in (m - 1, m, m + 1, 2 * m + 1):
        for keys in (n - 1, n, n + 1, 2 * n - 1, 2 * n, 2 * n + 1, 3 * n, 4 * n + 1, 5 * n):
            check(*qkv(rows, keys, dim, heads=1, dtype=dtype), **of_class(word))


@pytest.mark.sanitize
def test_keys_split_over_a_cluster(row: str) -> None:
    """Few tiles of rows and many keys: two, four and eight blocks share them, and some may get none."""
    dtype, dim, word, *_ = of_row(row)
    if "short" not in row:
        pytest.skip("this family does not split keys")
    splits = set()
    for rows, keys in [(2, 300), (2, 513), (2, 1024), (70, 1100), (64, 2050), (3, 4000)]:
        q, k, v = qkv(rows, keys, dim, heads=1, dtype=dtype)
        options = of_class(word) | ({"is_causal": "lower_right"} if word == "band" else {})
        try:
            splits.add(flashcore.explain(q, k, v, **options).num_splits)
        except NotImplementedError:
            assert splits and keys > 300, "no more than that fits"
            break
        check(q, k, v, **options)
    assert splits >= {2, 4}


@pytest.mark.sanitize
def test_blocks_without_a_tile(row: str) -> None:
    """Of a call that has a block for most multiprocessors, and each tile of which may have two: the rest is idle."""
    dtype, dim, word, block_m, _ = of_row(row)
    if "short" not in row:
        pytest.skip("this family has no more blocks than tiles")
    for heads, keys in [(110, 60), (50, 280)]:
        check(*qkv(block_m - 3, keys, dim, heads=heads, dtype=dtype), **of_class(word))


# Shapes

LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 175, 176, 177, 191, 192, 193, 255, 256, 257, 385)


@every_dtype
@every_row_width
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": "lower_right"}, {"softcap": 5.0}], ids=str)
def test_lengths(options: Options, dim: int, dtype: str) -> None:
    for shift in (0, 1, 5, 13):
        for rows, keys in zip(LENGTHS, LENGTHS[shift:] + LENGTHS[:shift], strict=True):
            check(*qkv(rows, keys, dim, heads=1, dtype=dtype), **options)


@every_dtype
@every_row_width
@every_class
@pytest.mark.parametrize("rows,keys", [(1000, 1000), (1000, 3), (1, 1000), (130, 1000), (1000, 130)])
def test_long(rows: int, keys: int, word: str, dim: int, dtype: str) -> None:
    check(*qkv(rows, keys, dim, heads=1, dtype=dtype), **of_class(word))


@every_dtype
@every_class
@pytest.mark.parametrize(
    "dim,dim_v",
    [(d, d) for d in (8, 16, 32, 40, 64, 72, 96, 128, 136, 192, 200, 256)]
    + [(192, 128), (64, 128), (128, 64), (72, 40), (8, 256), (256, 8)],
)
def test_head_dims(dim: int, dim_v: int, word: str, dtype: str) -> None:
    check(*qkv(150, 210, dim, dim_v, dtype=dtype), **of_class(word))


@every_dtype
@pytest.mark.parametrize("dim,dim_v", [(7, 7), (1, 33), (65, 1), (250, 129)])
def test_head_dims_of_no_whole_16_bytes(dim: int, dim_v: int, dtype: str) -> None:
    """Rows must start at whole 16 bytes, but may end anywhere; what lies behind is NaN."""

    def padded(x: Any) -> Any:
        wide = torch.full((*x.shape[:-1], -(-x.shape[-1] // 8) * 8 + 8), float("nan"), device="cuda").to(x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]

    q, k, v = map(padded, qkv(100, 190, dim, dim_v, dtype=dtype))
    check(q, k, v)
    check(q, k, v, is_causal=True, softcap=9.0)


@every_class
@every_row_width
@pytest.mark.parametrize("heads,heads_kv", [(8, 2), (6, 1), (5, 5)])
def test_grouped_heads_in_batches(heads: int, heads_kv: int, dim: int, word: str) -> None:
    check(*qkv(140, 200, dim, batch=3, heads=heads, heads_kv=heads_kv), **of_class(word))


@every_row_width
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (20, 3)}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("rows,keys", [(130, 130), (20, 190)])
def test_more_tiles_than_multiprocessors(rows: int, keys: int, options: Options, dim: int) -> None:
    """A block works on several tiles, of different heads; of 20 rows, all warpgroups but the first have nothing."""
    check(*qkv(rows, keys, dim, batch=40, heads=8, heads_kv=4), **options)


@pytest.mark.sanitize
@every_row_width
@pytest.mark.parametrize("rows", [1, 50, 65, 70, 130, 193, 200])
def test_keys_that_only_rows_past_the_end_would_see(rows: int, dim: int) -> None:
    """The last tile of rows ends early, and so do its keys."""
    for diagonal in (0, 30, 70, 130):
        check(*qkv(rows, 500, dim, heads=1), is_causal=True, diagonal=diagonal)
    check(*qkv(rows, 500, dim, heads=1), window=(5, 50), softcap=20.0)


@every_row_width
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(
    "rows,keys,options",
    [
        (400, 100, {"is_causal": "lower_right"}),  # 300 rows see nothing
        (600, 130, {"window": (5, 5), "diagonal": -250}),  # rows 245 to 384 see something
        (400, 100, {"window": (3, 3), "diagonal": 90}),  # rows 0 to 12 do
        (300, 100, {"is_causal": True, "diagonal": -300}),  # none does
    ],
    ids=str,
)
def test_tiles_without_keys_between_tiles_with(
    rows: int, keys: int, options: Options, softcap: float | None, dim: int
) -> None:
    """More heads than are dealt out at once, so that a block meets the first rows again after the last."""
    check(*qkv(rows, keys, dim, 8, batch=12, heads=12), **options, softcap=softcap)


def test_no_keys_at_all() -> None:
    q, k, v = qkv(300, 8, batch=30, heads=8)
    for options in ({}, {"is_causal": True}, {"softcap": 1.0}, {"sinks": normal(8)}):
        out, _ = check(q, k[:, :, :0], v[:, :, :0], **options)
        assert not out.any()


# Masks

BANDS: list[Options] = [
    {"is_causal": True},
    {"is_causal": "lower_right"},
    {"is_causal": True, "diagonal": 70},
    {"is_causal": True, "diagonal": -70},
    {"is_causal": True, "diagonal": -1},
    {"window": (0, 0)},
    {"window": (5, 0)},
    {"window": (0, 5)},
    {"window": (130, 77)},
    {"window": (130, 77), "is_causal": True},
    {"window": (None, 3)},
    {"window": (300, None)},
    {"window": (64, 64), "diagonal": "lower_right"},
    {"window": (63, None), "diagonal": 128},
]


@every_dtype
@every_row_width
@pytest.mark.parametrize("options", BANDS, ids=str)
def test_bands(options: Options, dim: int, dtype: str) -> None:
    for rows, keys in ((300, 300), (450, 130), (130, 600)):
        check(*qkv(rows, keys, dim, heads=1, dtype=dtype), **options)
    check(*qkv(130, 600, dim, heads=1, dtype=dtype), **options, softcap=20.0)


Shape = tuple[int, int, int, int]

BOOL_MASKS: dict[str, Callable[[Shape], Any]] = {
    "matrix": lambda s: sprinkle(*s[2:]),
    "vector": lambda s: sprinkle(1, s[3]),
    "key_padding": lambda s: torch.arange(s[3], device="cuda") < torch.tensor([90, s[3] - 1]).cuda().view(2, 1, 1, 1),
    "full_shape": lambda s: sprinkle(*s),
    "heads": lambda s: sprinkle(1, s[1], 1, s[3]),
    "rows": lambda s: sprinkle(s[0], 1, s[2], 1),
    "repeated": lambda s: sprinkle(s[2], s[3]).expand(s),
    "columns": lambda s: sprinkle(s[0], s[1], s[3], s[2]).transpose(2, 3),
    "every_third": lambda s: sprinkle(s[0], 1, s[2], 3 * s[3])[..., ::3],
    "dark_rows": lambda s: sprinkle(*s) & (torch.arange(s[2], device="cuda") % 3 > 0)[:, None],
    "dark_beginning": lambda s: (torch.arange(s[3], device="cuda") > 200).expand(s[2:]),
    "dark_end": lambda s: (torch.arange(s[3], device="cuda") < 40).expand(s[2:]),
    "one_key": lambda s: torch.eye(s[2], s[3], device="cuda").bool(),
    "dark": lambda s: torch.zeros(s[2:], dtype=torch.bool, device="cuda"),
}


@every_row_width
@pytest.mark.parametrize("name", BOOL_MASKS)
def test_bool_masks(name: str, dim: int) -> None:
    q, k, v = qkv(150, 290, dim, batch=2, heads=4, heads_kv=2, dtype=DTYPES[dim % 3 % 2])
    mask = BOOL_MASKS[name]((2, 4, 150, 290))
    check(q, k, v, attn_mask=mask)
    check(q, k, v, attn_mask=mask, is_causal="lower_right")


def lowest_rows(x: Any) -> Any:
    """What transformers makes of a padded row: all keys at the lowest number; the row is the mean of v."""
    return torch.where(torch.arange(x.shape[-2], device="cuda")[:, None] % 2 == 0, torch.finfo(x.dtype).min, x)


def hidden_keys(x: Any) -> Any:
    return torch.where(sprinkle(*x.shape, share=0.2), float("-inf"), x)


FLOAT_MASKS: dict[str, Callable[[Shape, str], Any]] = {
    "full_shape": lambda s, dtype: normal(*s, dtype=dtype),
    "matrix": lambda s, dtype: normal(*s[2:], dtype=dtype),
    "key_padding": lambda s, dtype: hidden_keys(normal(s[0], 1, 1, s[3], dtype=dtype)),
    "columns": lambda s, dtype: normal(s[0], 1, s[3], s[2], dtype=dtype).transpose(2, 3),
    "hidden": lambda s, dtype: hidden_keys(normal(*s[2:], dtype=dtype)),
    "lowest_rows": lambda s, dtype: lowest_rows(normal(*s[2:], dtype=dtype)),
    "lowest_end": lambda s, dtype: normal(*s[2:], dtype=dtype).where(
        torch.arange(s[3], device="cuda") < 60, torch.finfo(getattr(torch, dtype)).min
    ),
    "hidden_end": lambda s, dtype: normal(*s[2:], dtype=dtype).where(torch.arange(s[3]).cuda() < 60, float("-inf")),
    "hidden_beginning": lambda s, dtype: normal(*s[2:], dtype=dtype).where(
        torch.arange(s[3], device="cuda") > 230, float("-inf")
    ),
    "dark_rows": lambda s, dtype: normal(*s[2:], dtype=dtype).where(
        torch.arange(s[2], device="cuda")[:, None] % 3 > 0, float("-inf")
    ),
}


@pytest.mark.parametrize("dtype,mask_dtype", [(d, m) for d in DTYPES for m in (d, "float32")])
@every_row_width
@pytest.mark.parametrize("name", FLOAT_MASKS)
def test_float_masks(name: str, dim: int, dtype: str, mask_dtype: str) -> None:
    q, k, v = qkv(150, 290, dim, batch=2, dtype=dtype)
    mask = FLOAT_MASKS[name]((2, 2, 150, 290), mask_dtype)
    check(q, k, v, attn_mask=mask)
    check(q, k, v, attn_mask=mask, is_causal=True, diagonal=100)


def test_a_row_of_finfo_min_is_the_mean() -> None:
    q, k, v = qkv(70, 300, dtype="bfloat16")
    out = flashcore.attention(q, k, v, attn_mask=torch.full((70, 300), torch.finfo(torch.float32).min, device="cuda"))
    torch.testing.assert_close(out.float(), v.float().mean(2, keepdim=True).expand(out.shape), rtol=0, atol=2e-3)


# Options


def slopes(*shape: int) -> Any:
    return 2.0 ** -torch.arange(1, 1 + torch.Size(shape).numel(), device="cuda").float().view(shape)


GENERAL: dict[str, Callable[[str], Options]] = {
    "softcap": lambda dtype: {"softcap": 15.0},
    "softcap_small": lambda dtype: {"softcap": 0.01},
    "softcap_50": lambda dtype: {"softcap": 50.0},
    "softcap_huge": lambda dtype: {"softcap": 1e5},
    "softcap_negative_scale": lambda dtype: {"softcap": 3.0, "scale": -0.5},
    "alibi": lambda dtype: {"alibi_slopes": slopes(4)},
    "alibi_of_each_batch": lambda dtype: {"alibi_slopes": slopes(2, 4).to(getattr(torch, dtype)), "is_causal": True},
    "alibi_lower_right": lambda dtype: {"alibi_slopes": slopes(4), "is_causal": "lower_right"},
    "alibi_diagonal": lambda dtype: {"alibi_slopes": slopes(2, 4), "diagonal": -77},
    "alibi_negative": lambda dtype: {"alibi_slopes": -slopes(4)},
    "sinks": lambda dtype: {"sinks": normal(4)},
    "sinks_of_each_batch": lambda dtype: {"sinks": normal(2, 4, dtype=dtype), "is_causal": True},
    "sinks_large": lambda dtype: {"sinks": torch.tensor([100.0, -100.0, float("-inf"), 20.0], device="cuda")},
    "sinks_and_dark_rows": lambda dtype: {"sinks": normal(4), "window": (4, 4), "diagonal": -50},
    "all": lambda dtype: {
        "attn_mask": hidden_keys(normal(2, 1, 150, 290, dtype=dtype)),
        "is_causal": True,
        "diagonal": 100,
        "window": (180, None),
        "softcap": 4.0,
        "alibi_slopes": slopes(2, 4),
        "sinks": normal(4, dtype=dtype),
        "scale": 0.3,
    },
    "all_bool": lambda dtype: {
        "attn_mask": sprinkle(2, 4, 150, 290),
        "is_causal": "lower_right",
        "softcap": 30.0,
        "alibi_slopes": slopes(4).to(getattr(torch, dtype)),
        "sinks": normal(2, 4),
    },
    "scale_zero": lambda dtype: {"scale": 0.0},
    "scale_zero_causal": lambda dtype: {"scale": 0.0, "is_causal": True},
    "scale_negative": lambda dtype: {"scale": -0.3},
    "scale_negative_causal": lambda dtype: {"scale": -3.0, "is_causal": True},
}


@every_dtype
@every_row_width
@pytest.mark.parametrize("name", GENERAL)
def test_options(name: str, dim: int, dtype: str) -> None:
    check(*qkv(150, 290, dim, batch=2, heads=4, heads_kv=2, dtype=dtype), **GENERAL[name](dtype))


@every_dtype
@every_row_width
@every_class
@pytest.mark.parametrize("scale", [30.0, 1.0, 1e-6, 1e-30, 1e-40, 1e-50])
def test_scales(scale: float, word: str, dim: int, dtype: str) -> None:
    """The last ones are no normal float32, and hidden scores must stay hidden."""
    check(*qkv(150, 290, dim, dtype=dtype), **of_class(word), scale=scale)


# Values. The kernel keeps the maximum of the first tile that it sees, which is the last of the keys, for reference.


def ranked(rows: Any, keys: Any, dim: int, dtype: str, noise: float = 0.3) -> list[Any]:
    """A problem whose score (i, j) is about rows[i] * keys[j]."""
    q, k, v = qkv(len(rows), len(keys), dim, dtype=dtype)
    q, k = q * noise, k * noise
    q[..., 0], k[..., 0] = (rows * dim**0.5).to(q.dtype), keys.to(k.dtype)
    return [q, k, v]


@every_dtype
@every_row_width
@every_class
@pytest.mark.parametrize("at", [0, 1, 200, 398, 399])
@pytest.mark.parametrize("most", [14, 40, 700])
def test_a_dominating_key(most: float, at: int, word: str, dim: int, dtype: str) -> None:
    """Its score passes the others' by another number in each row, from -most to most, in powers of e."""
    keys = torch.zeros(400, device="cuda")
    keys[at] = 8
    check(*ranked(torch.linspace(-most / 8, most / 8, 400, device="cuda"), keys, dim, dtype), **of_class(word))


@every_dtype
@every_row_width
@every_class
@pytest.mark.parametrize("step", [-5, -0.5, -0.06, -0.01, 0.01, 0.06, 0.5, 5])
def test_scores_that_grow_or_fall_with_the_key(step: float, word: str, dim: int, dtype: str) -> None:
    keys = torch.arange(500, device="cuda") / 16
    check(*ranked(torch.full((140,), 16 * step, device="cuda"), keys, dim, dtype), **of_class(word))


@every_dtype
@every_row_width
@every_class
def test_one_row_of_a_warp_leaps(word: str, dim: int, dtype: str) -> None:
    """Its tile is weighed twice, and the rows beside it must not notice more than rounding."""
    keys = torch.arange(400, 0, -1, device="cuda") / 16
    for row in (0, 7, 8, 100):
        rows = torch.zeros(140, device="cuda")
        rows[row] = 10
        check(*ranked(rows, keys, dim, dtype), **of_class(word))


@every_dtype
@every_row_width
@every_class
def test_equal_scores(word: str, dim: int, dtype: str) -> None:
    q, k, v = qkv(150, 400, dim, dtype=dtype)
    check(torch.zeros_like(q), k, v, **of_class(word))
    check(q, k[:, :, :1].repeat(1, 1, 400, 1), v, **of_class(word))
    check(q, k, torch.ones_like(v), **of_class(word))


@every_dtype
@every_row_width
@every_class
@pytest.mark.parametrize("factor", [5, 30])
def test_large_scores(factor: float, word: str, dim: int, dtype: str) -> None:
    q, k, v = qkv(150, 400, dim, dtype=dtype)
    check(q * factor, k * factor, v, **of_class(word))


@every_row_width
@every_class
def test_scores_beyond_24_bits(word: str, dim: int) -> None:
    """Their float32 has no fraction any more, but which one is the largest is clear: softmax is one key."""
    q, k, v = qkv(150, 400, dim, dtype="bfloat16")
    check(q * 2e5, k * 2e5, v, **of_class(word))


@every_dtype
@every_class
@pytest.mark.parametrize("at", [0, 170, 399])
def test_one_large_value(at: int, word: str, dtype: str) -> None:
    q, k, v = qkv(150, 400, dtype=dtype)
    v[:, :, at] *= 1e4
    check(q, k, v, **of_class(word))


@every_row_width
@every_class
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_poison_in_a_query_stays_in_its_row(poison: float, word: str, dim: int) -> None:
    """The oracle says what the row itself becomes where that is NaN; the others are as if nothing were."""
    for row in (0, 9, 63, 64, 149):
        q, k, v = qkv(150, 300, dim)
        clean = [fetch(x) for x in (q, k, v)]
        q[0, 1, row, 5] = poison
        out, lse = map(fetch, flashcore.attention(q, k, v, **of_class(word), return_lse=True))
        right = reference.expect(*clean, is_causal=word == "band")
        if poison != poison:
            assert (out[0, 1, row] != out[0, 1, row]).all()
            assert lse[0, 1, row] != lse[0, 1, row]
        out[0, 1, row], lse[0, 1, row] = right.out[0, 1, row], right.lse[0, 1, row]
        right.check(out, lse)


@every_dtype
@every_row_width
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (100, 20)}], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_in_a_value_reaches_the_rows_that_see_it(poison: float, options: Options, dim: int, dtype: str) -> None:
    q, k, v = qkv(300, 300, dim, dtype=dtype)
    visible, _ = reference.visible_band(300, 300, **options)
    for softcap in (None, 10.0):
        clean = flashcore.attention(q, k, v, **options, softcap=softcap)
        for at in (0, 5, 64, 180, 299):
            dirty = v.clone()
            dirty[0, 1, at, 3] = poison
            out = flashcore.attention(q, k, dirty, **options, softcap=softcap)
            sees = torch.from_numpy(visible[:, at].copy()).cuda()
            assert not out[0, 1, sees, 3].isfinite().any()
            out[0, 1, sees, 3] = clean[0, 1, sees, 3]
            hidden = out[0, 1, :, 3].isnan()  # rows of the same tile may get 0 * NaN
            out[0, 1, hidden, 3] = clean[0, 1, hidden, 3]
            assert same_bits(out, clean), "it left its column"


@every_row_width
@every_class
def test_nan_in_a_key_reaches_the_rows_that_see_it(word: str, dim: int) -> None:
    q, k, v = qkv(300, 300, dim)
    k[0, 0, 130, 2] = float("nan")
    out, lse = flashcore.attention(q, k, v, **of_class(word), return_lse=True)
    first = 130 if word == "band" else 0
    assert out[0, 0, first:].isnan().all()
    assert lse[0, 0, first:].isnan().all()
    assert out[0, 1].isfinite().all()
    assert lse[0, 0, :first].isfinite().all()
    hiding = flashcore.attention(q, k, v, attn_mask=torch.arange(300, device="cuda") != 130, return_lse=True)
    assert hiding[0].isfinite().all()
    assert hiding[1].isfinite().all()


# Memory


def embed(x: Any, fill: float) -> tuple[Any, Any]:
    """x as a window of a larger buffer, and that buffer. Every edge of x has strangers beyond it."""
    batch, heads, rows, columns = x.shape
    buffer = torch.full((batch + 2, heads + 2, rows + 300, -(-columns // 8) * 8 + 80), fill, device="cuda").to(x.dtype)
    view = buffer[1 : 1 + batch, 1 : 1 + heads, 40 : 40 + rows, 8 : 8 + columns]
    view.copy_(x)
    return view, buffer


@every_dtype
@pytest.mark.parametrize("dim", [40, 44, 64, 72, 128, 136, 256])
@every_class
def test_nothing_beyond_the_arrays_is_read_or_written(word: str, dim: int, dtype: str) -> None:
    for rows, keys in ((1, 1), (70, 130), (193, 257)):
        q, k, v = (embed(x, float("nan"))[0] for x in qkv(rows, keys, dim, batch=2, dtype=dtype))
        out, around = embed(torch.empty_like(q), 777)
        assert flashcore.attention(q, k, v, **of_class(word), out=out) is out
        check(q, k, v, **of_class(word))
        assert same_bits(out, flashcore.attention(q, k, v, **of_class(word)))
        out.fill_(777)
        assert (around == 777).all()


def odd_rows(x: Any) -> Any:
    return torch.full((*x.shape[:-1], x.shape[-1] + 3), 777.0, dtype=x.dtype, device="cuda")[..., : x.shape[-1]]


OUTS: dict[str, Callable[[Any], Any]] = {
    "odd_rows": odd_rows,
    "columns": lambda x: torch.empty_like(x.transpose(2, 3).contiguous()).transpose(2, 3),
    "every_second": lambda x: torch.empty((*x.shape[:3], 2 * x.shape[3]), dtype=x.dtype, device="cuda")[..., ::2],
    "unaligned": lambda x: torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape),
    "heads_inside": lambda x: torch.empty_like(x.transpose(1, 2).contiguous()).transpose(1, 2),
    "rows_outside": lambda x: torch.empty_like(x.permute(2, 0, 1, 3).contiguous()).permute(1, 2, 0, 3),
}


@every_dtype
@every_class
@pytest.mark.parametrize("dim_v", [8, 64, 72, 128, 192])
@pytest.mark.parametrize("name", OUTS)
def test_out_of_any_strides(name: str, dim_v: int, word: str, dtype: str) -> None:
    q, k, v = qkv(150, 200, 64, dim_v, batch=2, heads=3, dtype=dtype)
    want = flashcore.attention(q, k, v, **of_class(word))
    out = OUTS[name](want)
    assert flashcore.attention(q, k, v, **of_class(word), out=out) is out
    assert same_bits(out, want), "the bits depend on where the output lies"
    if name == "odd_rows":
        assert (out.as_strided((*out.shape[:3], 3), out.stride(), dim_v) == 777).all()


@every_dtype
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "diagonal": -70}, {"window": (90, 5)}], ids=str)
@pytest.mark.parametrize(
    "dim,tile",
    [
        (40, (192, 128)),
        (44, (192, 128)),
        (64, (256, 64)),
        (64, (128, 128)),
        (72, (192, 64)),
        (128, (192, 64)),
        (104, (128, 128)),
        (128, (128, 128)),
        (200, (128, 64)),
        (256, (128, 64)),
    ],
)
def test_out_of_many_tiles(
    dim: int, tile: tuple[int, int], options: Options, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three and more for each block, whose out goes by way of shared memory where the copy engine reaches it."""
    monkeypatch.setenv("FLASHCORE_FORCE", "hopper")  # hopper_short has one of these tiles, too, and other bits
    blocks = {"block_m": tile[0], "block_n": tile[1]}
    whole = -(-dim // 8) * 8  # columns of a row that the copy engine can step over
    q, k, v = (x[..., :dim] for x in qkv(2 * tile[0] + 9, 300, whole, batch=8, heads=50, heads_kv=10, dtype=dtype))
    out, around = embed(torch.empty_like(q), 777)
    flashcore.attention(q, k, v, **options, **blocks, out=out)
    out_of_reach = OUTS["unaligned"](q)
    flashcore.attention(q, k, v, **options, **blocks, out=out_of_reach)
    assert same_bits(out, out_of_reach)
    few = q[3:4, 20:25], k[3:4, 4:5], v[3:4, 4:5]
    want = flashcore.attention(*few, **options, **blocks, return_lse=True)
    reference.expect(*map(fetch, few), **options).check(*map(fetch, want))
    assert same_bits(out[3:4, 20:25], want[0])
    out.fill_(777)
    assert (around == 777).all()


@every_dtype
@every_class
@pytest.mark.parametrize("dim", [40, 64, 128, 200])
def test_layouts(dim: int, word: str, dtype: str) -> None:
    arrays = qkv(150, 150, dim, batch=2, heads=3, dtype=dtype)
    want = flashcore.attention(*arrays, **of_class(word))
    swapped = [x.transpose(1, 2).contiguous() for x in arrays]
    assert same_bits(
        flashcore.attention(*swapped, **of_class(word), layout="bshd").transpose(1, 2).contiguous(), want.contiguous()
    )
    projection = torch.stack(swapped, dim=2)  # [batch, row, 3, head, column], as one linear layer gives it
    out = flashcore.attention(*projection.unbind(2), **of_class(word), layout="bshd")
    assert same_bits(out.transpose(1, 2).contiguous(), want.contiguous())


@every_class
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_repeated_keys(dim: int, word: str) -> None:
    """Strides of 0, over batch, heads and keys."""
    q, k, v = qkv(150, 200, dim, batch=3, heads=4)
    for shape in ((1, 4, 200, dim), (3, 1, 200, dim), (1, 1, 200, dim), (3, 4, 1, dim)):
        few = [x[: shape[0], : shape[1], : shape[2]] for x in (k, v)]
        repeated = [x.expand(3, 4, 200, dim) for x in few]
        want = flashcore.attention(q, *(x.contiguous() for x in repeated), **of_class(word))
        assert same_bits(flashcore.attention(q, *repeated, **of_class(word)), want)
    one = q[:1, :1, :1].expand(3, 4, 150, dim)
    assert same_bits(
        flashcore.attention(one, k, v, **of_class(word)), flashcore.attention(one.contiguous(), k, v, **of_class(word))
    )


# The same bits


@every_row_width
@every_class
def test_the_same_bits_beside_other_work(word: str, dim: int) -> None:
    """A race shows as an error that moves: other kernels change which warp comes first."""
    q, k, v = qkv(500, 700, dim, batch=4, heads=12)
    out, lse = flashcore.attention(q, k, v, **of_class(word), return_lse=True)
    noise, small = normal(1024, 1024, dtype="float16"), qkv(130, 300, dim, batch=5)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for turn in range(20):
        with torch.cuda.stream(streams[0]):
            for _ in range(turn):
                noise @ noise
        with torch.cuda.stream(streams[1]):
            for _ in range(turn % 3):
                flashcore.attention(*small, **of_class(word))
        again, lse_again = flashcore.attention(q, k, v, **of_class(word), return_lse=True)
        assert torch.equal(again.view(torch.int16), out.view(torch.int16)), f"run {turn}"
        assert torch.equal(lse_again, lse), f"run {turn}"
    torch.cuda.synchronize()


@every_row_width
@every_class
def test_a_row_does_not_depend_on_its_batch(word: str, dim: int, request: pytest.FixtureRequest) -> None:
    """However its tile is dealt out, and whatever the block did before."""
    if request.node.callspec.params["_forced"] != "hopper":
        pytest.skip("for a smaller batch another family may be planned, whose tiles round otherwise")
    q, k, v = qkv(300, 300, dim, batch=24, heads=12)
    plan = flashcore.explain(q, k, v, **of_class(word))
    options = of_class(word) | {"block_m": plan.block_m, "block_n": plan.block_n}
    whole = flashcore.attention(q, k, v, **options)
    for b in (0, 11, 23):
        alone = flashcore.attention(*(x[b : b + 1] for x in (q, k, v)), **options)
        assert same_bits(alone[0], whole[b])
        among_nan = [x.clone().fill_(float("nan")) for x in (q, k, v)]
        for array, clean in zip(among_nan, (q, k, v), strict=True):
            array[b] = clean[b]
        assert same_bits(flashcore.attention(*among_nan, **options)[b], whole[b])


@every_row_width
def test_calls_in_a_graph(dim: int) -> None:
    """Each reads what the one before wrote. Those that follow each other directly are let in early, and wait."""
    q, k, v = qkv(150, 150, dim)
    out = [torch.empty_like(q) for _ in range(7)]

    def chain() -> None:
        x = q
        for i, y in enumerate(out):
            x = torch.mul(x, 2, out=y) if i == 3 else flashcore.attention(x, k, v, out=y)

    chain()
    expected = [x.clone() for x in out]
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        chain()
    for _ in range(3):
        for x in out:
            x.fill_(torch.nan)
        graph.replay()
        assert all(same_bits(x, y) for x, y in zip(out, expected, strict=True))
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="reads a graph's edges")
    if runtime.cudaRuntimeGetVersion()[1] < 13000:
        pytest.skip("before CUDA 13 it reads edges without their kinds")
    error, _, _, data, count = runtime.cudaGraphGetEdges(runtime.cudaGraph_t(graph.raw_cuda_graph()), 64)
    assert error == 0, error
    kinds = [edge.type == runtime.cudaGraphDependencyType.cudaGraphDependencyTypeProgrammatic for edge in data[:count]]
    assert sorted(kinds) == [False, False, True, True, True, True], "all but those to and from the product"


def test_a_thread_that_never_used_cuda() -> None:
    """The copy engine's maps are made by the driver, which may want a context of the calling thread."""
    arrays = qkv(150, 200)
    want = flashcore.attention(*arrays)
    torch.cuda.synchronize()
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(flashcore.attention(*arrays)))
    thread.start()
    thread.join(timeout=60)
    torch.cuda.synchronize()
    assert got, "the call failed"
    assert same_bits(got[0], want)


# Any problem

ALIGNED = ["contiguous", "heads_inside", "batch_inside", "padded_16", "repeat_batch", "repeat_heads", "repeat_rows"]
EDGE = st.one_of(st.none(), st.integers(0, 320))
LENGTH = st.one_of(st.integers(1, 20), st.integers(1, 420))
EIGHTS = st.integers(1, 32).map(lambda n: 8 * n)


@st.composite
def aligned_problems(draw: st.DrawFn) -> cases.Case:
    heads_kv = draw(st.integers(1, 3))
    options = strategies.draw_band(draw, 3, EDGE, 300)
    general = draw(st.booleans())  # half of them without options, for the full and band rows
    if general:
        strategies.maybe_draw(draw, options, 3, "softcap", st.floats(0.5, 50, width=32))
    return cases.Case(
        name=f"hopper_{draw(st.integers(0, 2**32))}",
        batch=draw(st.integers(1, 3)),
        num_heads_q=heads_kv * draw(st.integers(1, 4)),
        num_heads_kv=heads_kv,
        seqlen_q=draw(LENGTH),
        seqlen_k=draw(LENGTH),
        head_dim=draw(EIGHTS),
        head_dim_v=draw(EIGHTS),
        mask=draw(st.sampled_from(["", *cases.MASKS])) if general else "",
        alibi=general and draw(st.booleans()),
        sinks=general and draw(st.booleans()),
        small_float32=draw(st.booleans()),
        options=options,
        strides_q=draw(st.sampled_from(ALIGNED)),
        strides_kv=draw(st.sampled_from(ALIGNED)),
        values=draw(st.sampled_from(["normal", "normal", "huge"])),
    )


@given(case=aligned_problems(), dtype=st.sampled_from(DTYPES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_aligned_problem(case: cases.Case, dtype: str) -> None:
    problem = cases.inputs(case, cases.DTYPES[dtype])
    arrays = [send(x, "cuda") for x in problem.arrays]
    options = {name: send(x, "cuda") for name, x in problem.options.items()}
    assert flashcore.explain(*arrays, **options).kernel.startswith("hopper")
    out, lse = flashcore.attention(*arrays, **options, return_lse=True)
    reference.expect(*problem.arrays, **problem.options).check(fetch(out), fetch(lse))
    assert same_bits(flashcore.attention(*arrays, **options), out)
