"""Tells torch.compile what flashcore.attention is, once its tracer is loaded and not before.

The tracer, torch._dynamo, cannot look into a C function, but traces a Python function in its place, which
torch.compiler.substitute_in_graph names; and that loads the tracer. It takes seconds, and importing flashcore shall
neither cost them nor import torch. So the import of torch._dynamo is watched for, whichever package comes first.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

TRACER = "torch._dynamo"


def _register() -> None:
    import torch

    from flashcore import attention
    from flashcore.torch import _call, _install

    if hasattr(torch.compiler, "substitute_in_graph"):  # torch 2.5
        torch.compiler.substitute_in_graph(attention)(_call.attention)
        torch.compiler.assume_constant_result(_install.warn_of)


class _Watch(MetaPathFinder):
    """Lets the other finders find the tracer, and has it registered with as soon as it has run."""

    def __init__(self) -> None:
        self.asking = threading.local()  # the other finders: not ourselves again

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != TRACER or getattr(self.asking, "now", False):
            return None
        self.asking.now = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking.now = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: Any) -> None:
            run(module)
            if self in sys.meta_path:  # what was only looked for, or failed, may be imported yet
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Registers now, where the tracer is loaded; otherwise when it will be."""
    if TRACER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())
