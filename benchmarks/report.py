"""
report.py - from measurements to what is read: Markdown tables, verdicts, a JSON file, a plot.

A result is one row measured: a plain dictionary, in the JSON as it is here.

    {"name": ..., "problem": {...}, "panel": ..., "x": ..., "contenders":
        {"cudnn": {"kind": "peer", "us": 8.9, ...}, "fa3": {"kind": "peer", "refused": "not installed: ..."}, ...},
     "plan": ..., "best": "cudnn", "speed": 1.04, "bar": {...}, "passed": True}
"""

import dataclasses
import json
import math
import pathlib


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: the metric or metrics of a cell (joined by " / ", the first decides), and how they are written."""

    title: str
    metrics: tuple[str, ...]
    form: str = "{:.1f}"
    higher_is_better: bool = False

    def value(self, figures: dict) -> float | None:
        return figures.get(self.metrics[0])

    def cell(self, figures: dict) -> str:
        if self.value(figures) is None:
            return "-"
        return " / ".join(self.form.format(figures[metric]) for metric in self.metrics if metric in figures)


def ours(result: dict) -> dict:
    """Our figures; {} where we were not asked."""
    return next((figures for figures in result["contenders"].values() if figures["kind"] == "ours"), {})


def compare(result: dict, table: Table) -> tuple[str | None, float | None]:
    """The best peer's name, and how many times better than it we are (above 1: better), by one table's metric."""
    peers = {
        name: table.value(figures)
        for name, figures in result["contenders"].items()
        if figures["kind"] == "peer" and table.value(figures) is not None
    }
    if not peers:
        return None, None
    best = (max if table.higher_is_better else min)(peers, key=peers.get)
    own = table.value(ours(result))
    if own is None or min(own, peers[best]) <= 0:  # a difference of times may come out negative
        return best, None
    return best, own / peers[best] if table.higher_is_better else peers[best] / own


def judge(result: dict, table: Table, bar: dict | None) -> None:
    """Adds the best peer, our speed against it and, with a bar, whether it is passed.

    A bar is {"speed": 1.0}: at least that many times as fast as the best peer; with "peer": than this peer;
    or {"us": 3.0}: at most that long.
    """
    result["best"], result["speed"] = compare(result, table)
    if bar is None:
        return
    result["bar"] = bar
    ratio = of_bar(result)
    if "us" not in ours(result):
        result["passed"] = False
    else:  # a bar set by a peer that is not there cannot be judged: neither passed nor missed
        result["passed"] = None if ratio is None else ratio >= 1


def of_bar(result: dict) -> float | None:
    """How many times as fast as its bar a row is. None where it has none, or the bar's peer or we did not run."""
    bar, us = result.get("bar"), ours(result).get("us")
    if bar is None or us is None:
        return None
    if "us" in bar:
        return bar["us"] / us
    peer = result["contenders"].get(bar.get("peer", result["best"]), {})
    return peer["us"] / us / bar["speed"] if "us" in peer else None


def read_bars(given: str | None, rows: list[str]) -> dict[str, dict]:
    """A bar for each row: from a number (times as fast as the best peer), or a JSON file {"about": words, row: bar}."""
    if given is None:
        return {}
    try:
        return {row: {"speed": float(given)} for row in rows}
    except ValueError:
        pass
    bars = json.loads(pathlib.Path(given).read_text())
    bars.pop("about", None)  # JSON has no comments
    for row, bar in bars.items():
        if not isinstance(bar, dict) or len(bar.keys() & {"speed", "us"}) != 1 or bar.keys() - {"speed", "us", "peer"}:
            raise ValueError(f'{given}: the bar of "{row}" is {bar!r}; give {{"speed": times}} or {{"us": time}}')
    return {row: bar for row, bar in bars.items() if row in rows}


def markdown(results: list[dict], table: Table, judged: bool = False) -> str:
    """One table, of the rows that have its figure, or a verdict; "" where none has. The best figure of a row is bold;
    the last columns are ours against the best peer and the verdict."""
    names = list(
        dict.fromkeys(
            name
            for result in results
            for name, figures in result["contenders"].items()
            if figures["kind"] != "note" or table.value(figures) is not None
        )
    )
    head = ["shape", *names, "ours / best"] + ["bar"] * judged
    lines = [head, ["---"] * len(head)]
    for result in results:
        has_figure = any(table.value(figures) is not None for figures in result["contenders"].values())
        if not has_figure and not (judged and "bar" in result):
            continue
        best, speed = compare(result, table)
        leaders = (
            {best}
            if speed is None or speed < 1
            else {name for name, figures in result["contenders"].items() if figures["kind"] == "ours"}
        )
        line = [result["name"]]
        for name in names:
            cell = table.cell(result["contenders"].get(name, {}))
            line.append(f"**{cell}**" if name in leaders and cell != "-" else cell)
        line.append("-" if speed is None else f"{speed:.2f}")
        if judged:
            line.append({True: "pass", False: "MISS", None: "-"}[result.get("passed")])
        lines.append(line)
    if len(lines) == 2:
        return ""
    return "\n".join([f"{table.title}", "", *("| " + " | ".join(line) + " |" for line in lines)])


def remarks(results: list[dict]) -> list[str]:
    """What a reader of the table must know: where we refused, and verdicts in one line."""
    lines = []
    for result in results:
        for name, figures in result["contenders"].items():
            if figures["kind"] == "ours" and "refused" in figures:
                lines.append(f"{name} did not run {result['name']}: {figures['refused']}")
    verdicts = [result["passed"] for result in results if "bar" in result]
    if verdicts:
        lines.append(f"{verdicts.count(True)} of {len(verdicts)} bars passed, {verdicts.count(False)} missed")
    return lines


def geometric_mean(factors: list[float]) -> float:
    return math.exp(sum(map(math.log, factors)) / len(factors))


def write_json(
    path: pathlib.Path, question: str, environment: dict, settings: dict, results: list[dict], conclusion: dict
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "question": question,
        "environment": environment,
        "settings": settings,
        "conclusion": conclusion,
        "results": results,
    }
    path.write_text(json.dumps(whole, indent=1) + "\n")


def plot(path: pathlib.Path, results: list[dict], table: Table, caption: str) -> None:
    """One panel per result["panel"], one line per contender, the metric over result["x"] (a binary logarithm)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(result["panel"] for result in results))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False)
    colors = {name: f"C{index}" for index, name in enumerate(results[0]["contenders"])}
    for axis, panel in zip(axes.flat, panels, strict=False):
        here = [result for result in results if result["panel"] == panel]
        for name, color in colors.items():
            points = [(r["x"], table.value(r["contenders"].get(name, {}))) for r in here]
            points = [point for point in points if point[1] is not None]
            if points:
                is_ours = here[0]["contenders"][name]["kind"] == "ours"
                axis.plot(*zip(*points, strict=True), "o-", color=color, label=name, linewidth=2.5 if is_ours else 1)
        axis.set_xscale("log", base=2)
        axis.set_title(panel)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    axes[0][0].set_ylabel(table.title)
    axes[0][0].legend()
    figure.suptitle(caption)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
