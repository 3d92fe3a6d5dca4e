"""
environment.py - the facts that a figure means nothing without: machine, GPU, driver, versions, source revision, date.
"""

import datetime
import os
import pathlib
import platform
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def facts(device: str) -> dict:
    """A flat dictionary, ready for JSON; what cannot be found out is None."""
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git_revision(),
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),  # of the last minute, before this run
        "os": platform.platform(),
        "python": platform.python_version(),
        "flashcore": version("flashcore"),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }
    return result | (gpu_facts() if device == "cuda" else cpu_facts())


def gpu_facts() -> dict:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "power_limit": output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader", "--id=0"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "flash_attn_3": version("flash_attn_3"),
    }


def cpu_facts() -> dict:
    import torch

    return {"torch_threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def git_revision() -> str | None:
    """The commit, with "-dirty" where the tree differs from it."""
    return output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def cpu_name() -> str | None:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def version(package: str) -> str | None:
    import importlib

    try:
        return getattr(importlib.import_module(package), "__version__", "unknown")
    except ImportError:
        return None


def output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
