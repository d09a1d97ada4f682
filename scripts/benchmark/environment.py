"""The machine that figures are of, and the versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "openvino", "nncf", "cyllama", "numpy",
)  # fmt: skip
UNITS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")


@cache
def processor() -> dict[str, Any]:
    """Name, number of logical cores, and those of `UNITS` that it has (told by Linux only)."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        told = ""
    name = re.search(r"^model name\s*: (.+)$", told, re.M)
    flags = re.search(r"^flags\s*: (.+)$", told, re.M)
    units = [unit for unit in UNITS if flags and unit in flags[1].split()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": name[1] if name else platform.processor(), "cores": cores, "units": units}


def has_bf16() -> bool:
    """Whether the processor has units for bf16, without which it is imitated at a great price."""
    return bool({"avx512_bf16", "amx_bf16"} & {*processor()["units"]})


def graphics_card() -> str | None:
    """The first one's name, and its driver's version; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.splitlines()[0] if told.returncode == 0 and told.stdout else None


def versions() -> dict[str, str]:
    """Of what is installed, and of ldm its commit."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"ldm": commit(), **found}


def commit() -> str:
    """Short hash of this checkout, with a "+" if files were changed since; "unknown" outside of one."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout.strip()

    try:
        found = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no") if found else ""
    except OSError:
        return "unknown"
    return f"{found}{'+' if changed else ''}" if found else "unknown"


def load_average() -> float | None:
    """Processes that wanted a core in the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe(device: str) -> dict[str, Any]:
    """All of it, as JSON can hold it."""
    import psutil

    told: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": processor(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "versions": versions(),
        "load_average_before": load_average(),
    }
    if device != "cpu":
        told["graphics_card"] = graphics_card()
    return told
