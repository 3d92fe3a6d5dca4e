"""Python in a process of its own, for what a process can do once: load the library, fork, capture its first call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import flashcore


def run_python(code: str, timeout: float = 60, **environment: str) -> str:
    """What a fresh process prints that finds the same flashcore, from whichever folder tests are run."""
    package = Path(flashcore.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(package), **environment},
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
