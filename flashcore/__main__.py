"""python -m flashcore: info (what was built, what is here), paths (library and header), selftest (is it right?), tune
(what is fastest here?)."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys

import flashcore
from flashcore import _C
from flashcore._tune import GRAMMAR, tune
from flashcore.autotune import ISA_WORDS, summary


def info() -> int:
    """Everything that a bug report needs, ready to paste."""
    cpu = _C.device("cpu")
    count, why_none = _C.cuda_devices()
    print(
        f"flashcore {flashcore.__version__} at {_C.revision}, Python {platform.python_version()}, {platform.platform()}"
    )
    print(f"library   {flashcore.library_path()}")
    print(f"built for {'CUDA architectures ' + _C.cuda_archs if _C.cuda_archs else 'the CPU alone'}")
    threads = f"{cpu['num_threads']} thread{'s' * (cpu['num_threads'] != 1)}"
    print(f"CPU       {platform.machine()} with {ISA_WORDS[cpu['isa']]}, {threads}")
    for i in range(count):
        gpu = _C.device("cuda", i)
        capability, driver = gpu["compute_capability"], gpu["driver_version"]
        print(
            f"GPU {i}     {gpu['name']}, sm_{capability}, {gpu['num_sms']} SMs, {gpu['l2_bytes'] >> 20} MiB L2, "
            f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
        )
    if count == 0:
        print(f"GPU       none: {why_none}")
    print(f"tuned     {summary()}")
    for name in ("torch", "numpy", "cupy", "jax"):
        print(f"{name:9} {_version_of(name)}")
    print("kernels, a CUDA kernel's name ending in one of its tiles (query rows x keys):")
    for usable, kernels in itertools.groupby(flashcore.kernels(), key=lambda kernel: kernel.usable):
        print("  usable:" if usable else "  not usable here:")
        for stem, tiles in itertools.groupby(kernels, key=_without_tile):
            print(f"    {' '.join([stem, *(kernel.name.removeprefix(stem) for kernel in tiles)]).rstrip()}")
    return 0


def _without_tile(kernel: flashcore.Kernel) -> str:
    return kernel.name if kernel.device == "cpu" else kernel.name.rpartition("_")[0] + "_"


def _version_of(distribution: str) -> str:
    from importlib import metadata

    for name in (distribution, f"{distribution}-cuda13x", f"{distribution}-cuda12x"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def paths(cflags: bool, libs: bool) -> int:
    """Where the C library and its header are; with --cflags or --libs as compiler arguments."""
    library = flashcore.library_path()
    folder = library.rpartition("/")[0]
    flags = [f"-I{flashcore.include_path()}"] if cflags else []
    flags += [f"-L{folder}", "-lflashcore", f"-Wl,-rpath,{folder}"] if libs else []
    print(" ".join(flags) if flags else f"library {library}\ninclude {flashcore.include_path()}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashcore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built, what GPU and driver are here, which kernels would serve")
    where = commands.add_parser("paths", help="the C library and its header")
    where.add_argument("--cflags", action="store_true", help="print compiler arguments")
    where.add_argument("--libs", action="store_true", help="print linker arguments")
    commands.add_parser("selftest", help="check every kernel of this machine against float64")
    tuning = commands.add_parser("tune", help="measure which kernels are fastest here, for later calls")
    tuning.add_argument("shape", nargs="*", help=f"{GRAMMAR}; default: a list of 40 (on a CPU: the small ones)")
    tuning.add_argument("--device", help="cpu, cuda or cuda:1; default: the first GPU, the CPU where there is none")
    tuning.add_argument("--again", action="store_true", help="measure also what is known already")
    given = parser.parse_args(arguments)
    if given.command == "info":
        return info()
    if given.command == "paths":
        return paths(given.cflags, given.libs)
    if given.command == "tune":
        return tune(given.shape, given.device, given.again)
    from flashcore._selftest import selftest

    return selftest()


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `info | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
