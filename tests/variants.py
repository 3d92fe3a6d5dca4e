"""The rows of kernels/variants.def, as the tests read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).resolve().parent.parent / "kernels" / "variants.def"


class Variant(NamedTuple):
    op: str  # forward or backward
    family: str
    dtype: str
    head_dim: int
    mask: str
    block_m: int
    block_n: int
    threads: int
    arch: str

    @property
    def row(self) -> str:
        """The kernel's name without its tile."""
        return f"{self.family}_{self.dtype}_d{self.head_dim}_{self.mask}"

    @property
    def name(self) -> str:
        return f"{self.row}_{self.block_m}x{self.block_n}"


def read(op: str) -> list[Variant]:
    """In the order of the file; none where the tests lie without the sources."""
    macro = {"forward": "FC_VARIANT", "backward": "FC_BACKWARD_VARIANT"}[op]
    rows = re.findall(rf"^{macro}\(([^)]*)\)", FILE.read_text(), re.MULTILINE) if FILE.exists() else []
    split = ([column.strip() for column in row.split(",")] for row in rows)
    return [
        Variant(op, family, dtype, int(head_dim), mask, int(block_m), int(block_n), int(threads), arch)
        for family, dtype, head_dim, mask, block_m, block_n, threads, arch in split
    ]
