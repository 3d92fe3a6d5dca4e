"""Every refusal, and its words: what was given, what is allowed, what to do."""

from __future__ import annotations

import warnings
from typing import Any

import cases
import numpy as np
import pytest

import flashcore


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def call(**changes: Any) -> Any:
    """A good call with some arguments changed."""
    arguments = {"query": zeros(2, 4, 5, 16), "key": zeros(2, 2, 7, 16), "value": zeros(2, 2, 7, 8), **changes}
    return flashcore.attention(**arguments)


# Each row: what is wrong, the exception, words that must be there in this order.
SHAPES = [
    ({"key": zeros(2, 2, 7, 12)}, ["(2, 4, 5, 16)", "(2, 2, 7, 12)", "head_dim"]),
    ({"value": zeros(2, 2, 6, 8)}, ["(2, 2, 7, 16)", "(2, 2, 6, 8)", "sequence length"]),
    ({"value": zeros(2, 3, 7, 8)}, ["(2, 3, 7, 8)", "heads"]),
    ({"key": zeros(2, 3, 7, 16), "value": zeros(2, 3, 7, 8)}, ["(2, 4, 5, 16)", "(2, 3, 7, 16)", "multiple"]),
    ({"query": zeros(2, 2, 5, 16), "key": zeros(2, 4, 7, 16), "value": zeros(2, 4, 7, 8)}, ["multiple"]),
    ({"key": zeros(3, 2, 7, 16)}, ["(2, 4, 5, 16)", "(3, 2, 7, 16)", "batch"]),
    ({"query": zeros(2, 4, 5, 0), "key": zeros(2, 2, 7, 0)}, ["head_dim is 0", "1 to 256"]),
    ({"value": zeros(2, 2, 7, 0)}, ["head_dim_v is 0", "1 to 256"]),
    ({"query": zeros(16)}, ["(16,)", "2 dimensions"]),
    ({"key": zeros(*[1] * 17)}, ["key", "17 dimensions", "16"]),
    ({"query": zeros(2, 5, 3, 16), "layout": "bshd"}, ["multiple", "bshd"]),
    ({"attn_mask": zeros(5, 6)}, ["attn_mask", "(5, 6)", "(2, 4, 5, 7)"]),
    ({"attn_mask": zeros(3, 7, dtype=bool)}, ["(3, 7); it must broadcast"]),
    ({"attn_mask": zeros(2, 7, dtype=bool)}, ["(2, 7)", "(batch, keys) is given as mask[:, None, None, :]"]),
    ({"attn_mask": zeros(2, 3, 5, 7)}, ["attn_mask", "(2, 3, 5, 7)", "(2, 4, 5, 7)"]),
    ({"attn_mask": zeros(1, 2, 4, 5, 7)}, ["attn_mask", "(1, 2, 4, 5, 7)", "(2, 4, 5, 7)"]),
    ({"sinks": zeros(2)}, ["sinks", "(2,)", "4"]),
    ({"sinks": zeros()}, ["sinks", "()", "query head"]),
    ({"sinks": zeros(1)}, ["sinks", "(1,)", "query head"]),
    ({"alibi_slopes": zeros(3, 4)}, ["alibi_slopes", "(3, 4)", "(2, 4)"]),
]

DTYPES = [
    ({"key": zeros(2, 2, 7, 16, dtype=np.float16)}, ["float32", "float16", "same"]),
    ({"value": zeros(2, 2, 7, 8, dtype=np.float64)}, ["float32", "float64", "same"]),
    ({"query": zeros(2, 4, 5, 16, dtype=np.int32)}, ["query", "int32", "allowed", "float16"]),
    ({"query": zeros(2, 4, 5, 16, dtype=bool)}, ["query", "bool", "allowed", "float16"]),
    ({"attn_mask": zeros(5, 7, dtype=np.float16)}, ["attn_mask", "float16", "bool", "float32"]),
    ({"attn_mask": zeros(5, 7, dtype=np.int64)}, ["attn_mask", "int64", "bool", "mask.bool()[:, None, None, :]"]),
    ({"attn_mask": zeros(5, 7, dtype=np.uint8)}, ["attn_mask", "uint8", "bool"]),
    ({"sinks": zeros(4, dtype=bool)}, ["sinks", "bool", "float32"]),
    ({"alibi_slopes": zeros(4, dtype=np.float64)}, ["alibi_slopes", "float64", "float32"]),
]

OPTIONS = [
    ({"scale": float("nan")}, ["scale", "nan", "finite"]),
    ({"scale": float("inf")}, ["scale", "inf", "finite"]),
    ({"scale": -float("inf")}, ["scale", "-inf", "finite"]),
    ({"softcap": -1.0}, ["softcap", "-1", "positive"]),
    ({"softcap": float("nan")}, ["softcap", "nan", "finite"]),
    ({"softcap": float("inf")}, ["softcap", "inf", "finite"]),
    ({"window": (-2, 0)}, ["window", "-2", "open"]),
    ({"window": (0, -7)}, ["window", "-7", "open"]),
    ({"window": (1, 2, 3)}, ["window", "(1, 2, 3)", "(left, right)"]),
    ({"window": (1,)}, ["window", "(1,)", "(left, right)"]),
    ({"diagonal": 2**61}, ["diagonal", str(2**61), "2^60"]),
    ({"diagonal": "upper_right"}, ["diagonal", "upper_right", "lower_right"]),
    ({"is_causal": "upper"}, ["is_causal", "upper", "lower_right"]),
    ({"is_causal": "lower_right", "diagonal": 3}, ["lower_right", "diagonal", "3"]),
    ({"layout": "sbhd"}, ["layout", "sbhd", "bhsd", "bshd"]),
    ({"block_m": 17, "block_n": 33}, ["block_m", "17", "block_n", "33", "there are"]),
    ({"block_m": -64}, ["block_m", "-64", "allowed"]),
    ({"stream": 5}, ["stream", "5", "CPU"]),
    ({"dropout_p": -0.1}, ["dropout_p", "-0.1"]),
    ({"dropout_p": 1.5}, ["dropout_p", "1.5"]),
    ({"dropout_p": float("nan")}, ["dropout_p", "nan"]),
    ({"dropout_p": 0.5}, ["dropout_p", "0.5", "dropout_seed is not given", "pass", "two 64-bit integers"]),
    ({"dropout_p": 0.5, "dropout_seed": np.zeros(2)}, ["dropout_seed", "float64", "two integers of 64 bits"]),
    ({"dropout_p": 0.5, "dropout_seed": np.int16([1] * 8)}, ["dropout_seed", "int16", "two integers of 64 bits"]),
    ({"dropout_p": 0.5, "dropout_seed": np.int64([1, 2, 3])}, ["dropout_seed", "(3,)", "two integers of 64 bits"]),
    ({"dropout_p": 0.5, "dropout_seed": np.int64([[1, 2]])}, ["dropout_seed", "(1, 2)", "two integers of 64 bits"]),
    ({"dropout_p": 0.5, "dropout_seed": np.int64([1, 2, 3])[::2]}, ["dropout_seed", "(2,)", "contiguous"]),
    ({"dropout_p": 0.5, "dropout_seed": np.int32([1] * 5)[1:]}, ["dropout_seed", "not aligned", "copy"]),
]

TYPES = [
    ({"query": [[1.0]]}, ["query", "list", "allowed"]),
    ({"attn_mask": [[True]]}, ["attn_mask", "list", "allowed"]),
    ({"sinks": 1.0}, ["sinks", "float", "allowed"]),
    ({"out": 3}, ["out", "int", "allowed"]),
    ({"scale": "0.1"}, ["scale", "str"]),
    ({"scale": 1j}, ["scale", "complex"]),
    ({"softcap": "big"}, ["softcap", "str"]),
    ({"is_causal": 0.5}, ["is_causal", "float", "lower_right"]),
    ({"window": 5}, ["window", "int", "(left, right)"]),
    ({"window": (1.5, 2)}, ["window", "1.5", "int"]),
    ({"window": ("a", 2)}, ["window", "'a'", "int"]),
    ({"diagonal": 1.5}, ["diagonal", "1.5", "int"]),
    ({"diagonal": None}, ["diagonal", "None"]),
    ({"layout": 3}, ["layout", "3", "bhsd"]),
    ({"block_m": 1.5}, ["block_m", "1.5", "int"]),
    ({"dropout_p": "0"}, ["dropout_p", "str"]),
    ({"dropout_p": 0.5, "dropout_seed": (1, 2)}, ["dropout_seed", "tuple", "allowed"]),
]


def _check(changes: dict[str, Any], exception: type[Exception], words: list[str]) -> None:
    with pytest.raises(exception) as caught:
        call(**changes)
    assert caught.type is exception
    message = str(caught.value)
    at = 0
    for word in words:
        found = message.find(word, at)
        assert found >= 0, f"{word!r} is missing, or not in this order, in: {message}"
        at = found + len(word)


def _names(row: tuple[dict[str, Any], list[str]]) -> str:
    return "-".join(row[0]) + "-" + row[1][-1]


@pytest.mark.parametrize("row", SHAPES, ids=_names)
def test_shapes(row: tuple[dict[str, Any], list[str]]) -> None:
    _check(row[0], ValueError, row[1])


@pytest.mark.parametrize("row", DTYPES, ids=_names)
def test_dtypes(row: tuple[dict[str, Any], list[str]]) -> None:
    _check(row[0], ValueError, row[1])


@pytest.mark.parametrize("row", OPTIONS, ids=_names)
def test_options(row: tuple[dict[str, Any], list[str]]) -> None:
    _check(row[0], ValueError, row[1])


@pytest.mark.parametrize("row", TYPES, ids=_names)
def test_types(row: tuple[dict[str, Any], list[str]]) -> None:
    _check(row[0], TypeError, row[1])


def test_the_good_call_is_good() -> None:
    assert call().shape == (2, 4, 5, 8)


def test_without_dropout_its_seed_is_not_looked_at() -> None:
    assert call(dropout_p=0, dropout_seed="none").shape == (2, 4, 5, 8)


def test_softcap_of_zero_is_none() -> None:
    assert call(softcap=0.0).shape == (2, 4, 5, 8)


def test_numbers_may_be_numpy_scalars() -> None:
    want = call(scale=0.5, window=(3, 2), diagonal=1, softcap=2.0)
    given = call(
        scale=np.float64(0.5),
        window=(np.int64(3), np.int32(2)),
        diagonal=np.int64(1),
        softcap=np.float32(2),
    )
    np.testing.assert_array_equal(given, want)


def test_numbers_beyond_64_bits() -> None:
    for changes in ({"diagonal": 10**30}, {"window": (10**30, 0)}, {"block_m": 10**30}, {"scale": 10**400}):
        with pytest.raises((ValueError, OverflowError), match=next(iter(changes))):
            call(**changes)


# The parser


def test_wrong_arguments() -> None:
    q = zeros(2, 4, 5, 16)
    with pytest.raises(TypeError, match="query"):
        flashcore.attention()
    with pytest.raises(TypeError, match="value"):
        flashcore.attention(q, q)
    with pytest.raises(TypeError, match="positional"):
        flashcore.attention(q, q, q, None, 0.0, False, None, False, (1, 1))
    with pytest.raises(TypeError, match="windows"):
        flashcore.attention(q, q, q, windows=(1, 1))
    with pytest.raises(TypeError, match="query"):
        flashcore.attention(q, q, q, query=q)


def test_explain_refuses_alike() -> None:
    q = zeros(2, 4, 5, 16)
    for changes in ({"scale": float("nan")}, {"layout": "sbhd"}, {"dropout_p": 0.5}):
        with pytest.raises((ValueError, NotImplementedError)) as by_call:
            flashcore.attention(q, q, q, **changes)
        with pytest.raises((ValueError, NotImplementedError)) as by_explain:
            flashcore.explain(q, q, q, **changes)
        assert str(by_call.value) == str(by_explain.value)


# The environment


def test_forced_kernel_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_FORCE", "warp_drive")
    _check({}, ValueError, ["warp_drive", "there are", "cpu_baseline"])


def test_force_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q = zeros(2, 4, 5, 16)
    for kernel in flashcore.kernels():
        if kernel.device == "cpu" and kernel.usable:
            monkeypatch.setenv("FLASHCORE_FORCE", kernel.name)
            assert flashcore.explain(q, q, q).kernel == kernel.name
    monkeypatch.delenv("FLASHCORE_FORCE")
    assert flashcore.explain(q, q, q).family == "cpu"
    monkeypatch.setenv("FLASHCORE_FORCE", "")
    assert flashcore.explain(q, q, q).family == "cpu"


def test_slow_word_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt setting must not pass for the default, at least where it would matter."""
    monkeypatch.setenv("FLASHCORE_SLOW", "allow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_slow_path_warning_is_a_user_warning() -> None:
    assert issubclass(flashcore.SlowPathWarning, UserWarning)


# After a refusal all is well


def test_a_refusal_changes_nothing() -> None:
    case = cases.CASES["plain"]
    given = cases.inputs(case, np.dtype(np.float32))
    for changes in ({"scale": float("nan")}, {"window": 3}, {"attn_mask": zeros(3, 3)}, {"dropout_p": 0.5}):
        with pytest.raises((ValueError, TypeError, NotImplementedError)):
            flashcore.attention(*given.arrays, **changes)
        cases.expected(case, np.dtype(np.float32)).check(flashcore.attention(*given.arrays))
