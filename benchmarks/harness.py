"""
harness.py - the run that every question shares: options, the machine's facts, rows measured one after another with
progress on stderr, the check that all contenders computed the same, tables on stdout, JSON in results/.

A question is a file beside this one: the rows it asks about, how a row is measured, the tables that answer it.

Exit status: 0 done, 1 a bar was missed or results disagree, 2 this machine cannot answer.
"""

import argparse
import contextlib
import dataclasses
import gc
import math
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable

import contenders as who
import environment
import report
import timers


@dataclasses.dataclass(frozen=True)
class Row:
    problem: who.Problem  # or what has its name, dtype and make()
    panel: str = ""  # of the plot
    x: int = 0
    quick: bool = False  # part of --quick

    @property
    def name(self) -> str:
        return self.problem.name


@dataclasses.dataclass
class Job:
    """What a question's measure() is given for one row."""

    problem: who.Problem
    inputs: list[who.Inputs]
    contenders: list[who.Contender]  # those that serve the row
    effort: timers.Effort
    options: argparse.Namespace

    def per_set(self) -> dict:
        """For each contender one call per input set, and its scope: what the device timers take."""
        return {item.name: ([item.prepare(each) for each in self.inputs], item.scope) for item in self.contenders}

    def single(self) -> dict:
        """For each contender one call, and its scope: what the host and CPU timers take."""
        return {item.name: (item.prepare(self.inputs[0]), item.scope) for item in self.contenders}


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """What a question says of all its rows together."""

    lines: list[str]
    passed: bool = True  # False: exit status 1
    facts: dict = dataclasses.field(default_factory=dict)  # for the JSON


@dataclasses.dataclass(frozen=True)
class Question:
    name: str
    text: str  # what is asked, and how it is measured: the head of the report and of --help
    device: str  # "cuda" or "cpu"
    rows: Callable[[], list[Row]]
    contenders: Callable[[], list[who.Contender]]
    measure: Callable[[Job], dict[str, dict[str, float]]]  # contender -> metric -> figure; "us" for verdicts
    tables: tuple[report.Table, ...]  # the first decides verdicts and the plot
    sets: Callable[[who.Problem, int], int] = lambda problem, cache_bytes: 1  # how many input sets
    conclude: Callable[[list[dict], argparse.Namespace], Conclusion] = lambda results, options: Conclusion([])
    compares: bool = True  # ours with the first peer's result, by roundings; else measure() judges results


class CannotRun(Exception):
    """This machine cannot answer; the words say what to do."""


def require(question: Question, options: argparse.Namespace) -> None:
    try:
        import torch
    except ImportError as error:
        raise CannotRun(f"the peers are PyTorch's, which is not here ({error}): pip install torch") from error
    if question.device == "cuda" and not torch.cuda.is_available():
        raise CannotRun(
            "this question needs an NVIDIA GPU that PyTorch can use; "
            f"torch {torch.__version__} sees none. Run it on such a machine, or ask cpu.py here"
        )
    if not options.peers_only:
        try:
            from flashcore import attention  # noqa: F401
        except ImportError as error:
            raise CannotRun(f"flashcore is not here ({error}): pip install . first, or use --peers-only") from error


def parse(question: Question, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{question.name}.py", description=question.text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few rows, a few rounds: does it run? Not for figures")
    parser.add_argument(
        "--sample-ms",
        type=float,
        help="how long a contender runs before the next one's turn, default 2; by 20 or more a GPU reaches its power "
        "limit, as it does in long work",
    )
    parser.add_argument("--rows", metavar="WORDS", help='only rows whose name holds all these words, "D128 causal"')
    parser.add_argument("--peers", metavar="NAMES", help="only these peers, separated by commas")
    parser.add_argument("--peers-only", action="store_true", help="without flashcore")
    parser.add_argument(
        "--bar",
        metavar="BAR",
        help="a number: be that many times as fast as the best peer; or a "
        'JSON file {row: {"speed": times, "peer": name} or {"us": time}}; a miss exits 1',
    )
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="default: results/QUESTION-DATE.json")
    parser.add_argument("--plot", metavar="PNG", type=pathlib.Path, help="also draw the first table")
    parser.add_argument("--threads", type=int, help="CPU threads, for all contenders; default: PyTorch's choice")
    return parser.parse_args(arguments)


def select(question: Question, options: argparse.Namespace) -> tuple[list[Row], list[who.Contender]]:
    rows = [row for row in question.rows() if row.quick or not options.quick]
    if options.rows:
        rows = [row for row in rows if set(options.rows.split()) <= set(row.name.split())]
    if not rows:
        raise CannotRun(f"no row's name holds all of {options.rows!r}; one is {question.rows()[0].name!r}")
    contenders = question.contenders()
    if options.peers:
        wanted = set(options.peers.split(","))
        known = {item.name for item in contenders if item.kind != "ours"}
        if wanted - known:
            raise CannotRun(f"no such peer: {', '.join(sorted(wanted - known))}; there are {', '.join(sorted(known))}")
        contenders = [item for item in contenders if item.kind == "ours" or item.name in wanted]
    if options.peers_only:
        contenders = [item for item in contenders if item.kind == "peer"]
    return rows, contenders


def try_once(contender: who.Contender, inputs: who.Inputs):
    """The contender's output, or Refused with the reason."""
    try:
        with contextlib.ExitStack() as stack:
            if contender.kind == "peer":  # PyTorch warns once per reason why a backend refuses
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            stack.enter_context(contender.scope())
            return contender.prepare(inputs)()
    except who.Refused:
        raise
    except Exception as error:  # whatever a peer raises, it does not serve this row
        raise who.Refused(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def disagreement(ours, expected) -> float:
    """The largest difference, in units of what rounding to this dtype may do to the largest element."""
    import torch

    unit = torch.finfo(expected.dtype).eps * expected.abs().max().float()
    return float((ours.float() - expected.float()).abs().max() / unit)


def disagreement_max(problem: who.Problem) -> float:
    """
    How far two correct results may differ, in those units. By a rounding or two of the output, plus that of the
    probabilities: below 4 units, and a wrong scale, mask or tile is off by hundreds in the 16-bit types. In float32 the
    sums themselves round as coarsely as the output: one over seqlen terms walks by about sqrt(seqlen) units.
    """
    return 32.0 + (math.sqrt(problem.seqlen) if problem.dtype == "float32" else 0.0)


def run_row(question: Question, row: Row, contenders: list[who.Contender], options: argparse.Namespace) -> dict:
    import torch

    problem = row.problem
    cache_bytes = 0
    if question.device == "cuda":
        cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    inputs = problem.make(question.device, question.sets(problem, cache_bytes))
    result = {
        "name": row.name,
        "problem": dataclasses.asdict(problem),
        "panel": row.panel,
        "x": row.x,
        "input_sets": len(inputs),
        "contenders": {item.name: {"kind": item.kind} for item in contenders},
    }
    serving = []
    expected = None
    for item in contenders:
        figures = result["contenders"][item.name]
        try:
            output = try_once(item, inputs[0])
        except who.Refused as reason:
            figures["refused"] = str(reason)
            continue
        serving.append(item)
        if question.compares and item.kind == "peer" and expected is None:
            expected = output
        elif item.kind == "ours" and expected is not None:
            figures["disagreement"] = disagreement(output, expected)
            figures["disagreement_max"] = disagreement_max(problem)
        del output
    expected = None
    effort = timers.QUICK if options.quick else timers.FULL
    if options.sample_ms:
        effort = dataclasses.replace(effort, sample_us=1e3 * options.sample_ms)
    for name, figures in question.measure(Job(problem, inputs, serving, effort, options)).items():
        result["contenders"].setdefault(name, {"kind": "note"}).update(figures)
    if any(item.kind == "ours" for item in serving):
        result["plan"] = inputs[0].explain()
    return result


def main(question: Question, arguments: list[str] | None = None) -> int:
    options = parse(question, arguments)
    # What somebody tuned here before would make figures that nobody else gets.
    os.environ.setdefault("FLASHCORE_AUTOTUNE", "0")
    try:
        require(question, options)
        rows, contenders = select(question, options)
        bars = report.read_bars(options.bar, [row.name for row in question.rows()])
    except (CannotRun, OSError, ValueError) as error:
        print(f"{question.name}: {error}", file=sys.stderr)
        return 2
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    facts = environment.facts(question.device)
    if facts["load"] > 0.25 * facts["cpu_cores"]:
        print(f"this machine is busy (load {facts['load']}, {facts['cpu_cores']} cores): expect noise", file=sys.stderr)
    results = []
    begin = time.monotonic()
    for index, row in enumerate(rows):
        results.append(run_row(question, row, contenders, options))
        report.judge(results[-1], question.tables[0], bars.get(row.name))
        gc.collect()
        if question.device == "cuda":
            torch.cuda.empty_cache()
        elapsed = time.monotonic() - begin
        left = elapsed / (index + 1) * (len(rows) - index - 1)
        print(f"[{index + 1}/{len(rows)}] {row.name}: {elapsed:.0f} s, about {left:.0f} s left", file=sys.stderr)

    where = facts.get("gpu") or f"{facts['cpu']}, {facts['torch_threads']} threads"
    caption = f"{where}, torch {facts['torch']}, flashcore {facts['flashcore']} at {facts['git']}"
    print(f"# {question.name}\n\n{question.text.strip()}\n\n{caption}\n")
    for table in question.tables:
        judged = table is question.tables[0] and any("bar" in result for result in results)
        if text := report.markdown(results, table, judged):
            print(text + "\n")
    wrong = [
        f"flashcore's result differs at {result['name']}: {figures['disagreement']:.3g} roundings of the largest "
        f"element, allowed {figures['disagreement_max']:.0f}"
        for result in results
        for figures in result["contenders"].values()
        if not figures.get("disagreement", 0.0) <= figures.get("disagreement_max", 0.0)
    ]
    conclusion = question.conclude(results, options)
    print("\n".join(report.remarks(results) + wrong + conclusion.lines))

    stamp = facts["date"].replace(":", "").replace("+0000", "Z")
    path = options.json or environment.ROOT / "results" / f"{question.name}-{stamp}.json"
    settings = {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(options).items()}
    settings["seed"] = who.SEED
    report.write_json(path, question.name, facts, settings, results, dataclasses.asdict(conclusion))
    print(f"wrote {path}", file=sys.stderr)
    if options.plot:
        report.plot(options.plot, results, question.tables[0], caption)
        print(f"wrote {options.plot}", file=sys.stderr)
    missed = any(result.get("passed") is False for result in results)
    return 1 if wrong or missed or not conclusion.passed else 0
