"""Prints README.md's support matrix from kernels/variants.def; --write puts it there, --check fails on a stale one."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- support matrix: docs/support_matrix.py --write -->\n", "<!-- end of support matrix -->\n"


# What a family's masks say of the options it serves.
OPTIONS = {
    frozenset({"any"}): "all",
    frozenset({"full", "band", "unbiased", "general"}): "all but dropout",
    frozenset({"full", "band", "unbiased", "biased", "general"}): "all but dropout",
}


def matrix() -> str:
    """A row per family: dtypes, masks, the largest head_dim it serves and the GPUs it runs on."""
    rows: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    masks: dict[str, set[str]] = defaultdict(set)
    text = (ROOT / "kernels/variants.def").read_text()
    backward = set(re.findall(r"^FC_BACKWARD_VARIANT\((\w+)", text, re.M))
    for row in re.findall(r"^FC_VARIANT\(([^)]*)\)", text, re.M):
        family, dtype, head_dim, mask, _block_m, _block_n, _threads, arch = (
            column.strip() for column in row.split(",")
        )
        rows[family, arch][dtype].append(int(head_dim))
        masks[family].add(mask)
    lines = ["| kernel | runs on | dtypes | head_dim | options | backward |", "|---|---|---|---|---|---|"]
    for (family, arch), dtypes in rows.items():
        where = f"sm_{arch} alone" if arch.endswith("a") else f"sm_{arch} and later"
        most = max(max(dims) for dims in dtypes.values())
        lines.append(
            f"| {family} | NVIDIA GPUs, {where} | {', '.join(dtypes)} | 1 to {most} "
            f"| {OPTIONS.get(frozenset(masks[family])) or ', '.join(masks[family])} "
            f"| {'yes' if family in backward else 'by portable'} |"
        )
    for isa in ("AVX-512", "AVX2", "baseline"):
        lines.append(
            f"| cpu ({isa}) | {'any CPU' if isa == 'baseline' else 'x86-64'} "
            "| float16, bfloat16, float32, float64 | 1 to 256 | all | yes |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    current, _, after = rest.partition(END)
    match sys.argv[1:]:
        case ["--write"]:
            README.write_text(before + BEGIN + matrix() + END + after)
        case ["--check"]:
            if current != matrix():
                print("README.md's support matrix is stale: run python docs/support_matrix.py --write", file=sys.stderr)
                return 1
        case _:
            print(matrix(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
