"""
training.py - does a model learn the same with flashcore? A small GPT on bytes, the text being this repository's own
files, trained for 200 steps with PyTorch's scaled_dot_product_attention and with flashcore.attention in its place, all
else equal: weights, batches, AdamW.

float32: the loss differs from SDPA's by at most 1e-3 at every step. bfloat16 (autocast over float32 weights): it
differs from SDPA's of the same seed by at most the spread of SDPA's losses over three seeds, at every step; the seed
decides the weights that one begins with, and the spread is the largest within 10 steps before and after.
"""

import argparse
import dataclasses
import math
import pathlib
import sys

import contenders as who
import environment
import report
import torch
import torch.nn.functional as F

LOSS_MAX = 1e-3  # of the difference in float32
SEEDS = (who.SEED, who.SEED + 1, who.SEED + 2)
NEAR = 10  # steps
TEXT = ("*.md", "docs/*.md", "include/*.h", "csrc/**/*.[ch]", "kernels/**/*.cu*", "flashcore/**/*.py", "tests/*.py")


class Layer(torch.nn.Module):
    def __init__(self, width: int, heads: int, attention):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.projection = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = self.attention(*qkv, is_causal=True)
        x = x + self.projection(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(torch.nn.Module):
    """Bytes to the logits of the bytes that follow."""

    def __init__(self, attention, layers: int = 4, width: int = 128, heads: int = 4, context: int = 128):
        super().__init__()
        self.token, self.position = torch.nn.Embedding(256, width), torch.nn.Embedding(context, width)
        self.layers = torch.nn.Sequential(*(Layer(width, heads, attention) for _ in range(layers)))
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, 256)

    def forward(self, tokens):
        return self.head(self.norm(self.layers(self.token(tokens) + self.position.weight)))


@dataclasses.dataclass(frozen=True)
class Run:
    contender: str
    dtype: str
    seed: int
    losses: list[float]


def read_text() -> torch.Tensor:
    files = sorted({path for pattern in TEXT for path in environment.ROOT.glob(pattern)})
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def train(attention, dtype: str, seed: int, text, options: argparse.Namespace) -> list[float]:
    """The loss at each step. Weights and batches are drawn on the CPU: those of a seed are the same on every device."""
    torch.manual_seed(seed)
    model = GPT(attention).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    context = model.position.num_embeddings
    places = torch.Generator().manual_seed(who.SEED)
    losses = []
    for _ in range(options.steps):
        begins = torch.randint(len(text) - context, (options.batch, 1), generator=places)
        tokens = text[begins + torch.arange(context + 1)].to(options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def runs(options: argparse.Namespace) -> list[Run]:
    import flashcore

    attentions = {"sdpa": F.scaled_dot_product_attention, "flashcore": flashcore.attention}
    asked = [("sdpa", "float32", who.SEED), ("flashcore", "float32", who.SEED), ("flashcore", "bfloat16", who.SEED)]
    asked += [("sdpa", "bfloat16", seed) for seed in SEEDS]
    text, done = read_text(), []
    for contender, dtype, seed in asked:
        losses = train(attentions[contender], dtype, seed, text, options)
        done.append(Run(contender, dtype, seed, losses))
        print(f"{contender}, {dtype}, seed {seed}: loss {losses[0]:.4f} to {losses[-1]:.4f}", file=sys.stderr)
    return done


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Our losses beside SDPA's of the same seed, and how far apart they may be, step by step."""

    dtype: str
    differences: list[float]
    allowed: list[float]

    @property
    def passed(self) -> bool:
        return all(one <= most for one, most in zip(self.differences, self.allowed, strict=True))  # False for NaN

    def __str__(self) -> str:
        shares = [one / most for one, most in zip(self.differences, self.allowed, strict=True)]
        worst = max(range(len(shares)), key=lambda step: math.inf if math.isnan(shares[step]) else shares[step])
        return (
            f"{self.dtype}: {'pass' if self.passed else 'MISS'}: of {len(shares)} steps the worst is step {worst + 1}, "
            f"where the losses differ by {self.differences[worst]:.2e}, allowed {self.allowed[worst]:.2e}; "
            f"largest difference at any step {max(self.differences):.2e}"
        )


def compare(done: list[Run]) -> list[Comparison]:
    result = []
    for dtype in ("float32", "bfloat16"):
        mine = next(run for run in done if (run.contender, run.dtype) == ("flashcore", dtype)).losses
        seeds = [run.losses for run in done if (run.contender, run.dtype) == ("sdpa", dtype)]
        allowed = [LOSS_MAX] * len(mine)
        if dtype == "bfloat16":
            spreads = [max(step) - min(step) for step in zip(*seeds, strict=True)]
            allowed = [max(spreads[max(0, step - NEAR) : step + NEAR + 1]) for step in range(len(mine))]
        differences = [abs(one - other) for one, other in zip(mine, seeds[0], strict=True)]
        result.append(Comparison(dtype, differences, allowed))
    return result


def plot(path: pathlib.Path, done: list[Run], compared: list[Comparison], caption: str) -> None:
    """The losses, and below them how far ours are from SDPA's and may be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True)
    for column, each in enumerate(compared):
        for run in done:
            if run.dtype == each.dtype:
                ours = run.contender == "flashcore"
                style = {"color": "C1", "linestyle": "--", "zorder": 3} if ours else {"color": "C0", "alpha": 0.6}
                axes[0][column].plot(run.losses, label=f"{run.contender}, seed {run.seed}", **style)
        axes[0][column].set_title(each.dtype)
        axes[0][column].legend()
        axes[1][column].semilogy(each.differences, color="C1", label="difference from SDPA, same seed")
        axes[1][column].semilogy(each.allowed, color="C3", label="allowed")
        axes[1][column].set_xlabel("step")
        axes[1][column].legend()
    axes[0][0].set_ylabel("loss")
    axes[1][0].set_ylabel("difference of losses")
    figure.suptitle(caption)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="training.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="20 steps of small batches: does it run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where PyTorch sees one")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 128 bytes in a step")
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="default: results/training-DATE.json")
    parser.add_argument("--plot", metavar="PNG", type=pathlib.Path, help="also draw the losses")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.quick:
        options.steps, options.batch = min(options.steps, 20), 4
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"training: torch {torch.__version__} sees no GPU here; use --device cpu", file=sys.stderr)
        return 2
    facts = environment.facts(options.device)
    try:
        done = runs(options)
    except (ImportError, NotImplementedError) as error:  # no flashcore here, or none that has gradients
        print(f"training: {error}", file=sys.stderr)
        return 2
    compared = compare(done)
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['torch_threads']} threads"
    caption = f"{where}, torch {facts['torch']}, flashcore {facts['flashcore']} at {facts['git']}"
    print(f"# training\n\n{__doc__.strip()}\n\n{caption}\n")
    last = ", ".join(f"{run.contender} {run.dtype} {run.losses[-1]:.4f}" for run in done if run.seed == who.SEED)
    print("\n".join([*map(str, compared), f"the last of {options.steps} losses: {last}"]))
    passed = all(each.passed for each in compared)

    stamp = facts["date"].replace(":", "").replace("+0000", "Z")
    path = options.json or environment.ROOT / "results" / f"training-{stamp}.json"
    settings = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(options).items()}
    conclusion = {"passed": passed, "compared": [dataclasses.asdict(each) for each in compared]}
    report.write_json(path, "training", facts, settings, [dataclasses.asdict(run) for run in done], conclusion)
    print(f"wrote {path}", file=sys.stderr)
    if options.plot:
        plot(options.plot, done, compared, caption)
        print(f"wrote {options.plot}", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
