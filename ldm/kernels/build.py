"""The kernels as a shared library: compiled once for this processor, when first used, and kept.

A few plain C functions need neither torch's headers (a minute to compile, where these take 5 seconds) nor its
loader. OpenMP's functions are left open in the library, and found in the one that torch has loaded: so both
use the same threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "cpp"
# Nobody traps floating point exceptions: else loops with a choice between numbers would not become vectors.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-trapping-math", "-fopenmp", "-fPIC")
# Where the library is kept; and a way to do without: LDM_KERNELS=off.
SWITCH = "LDM_KERNELS"


@cache
def library() -> ctypes.CDLL | None:
    """The library, compiled if this processor has none yet; None where there is none, which is said once."""
    if os.environ.get(SWITCH, "").lower() in ("0", "off", "no") or not sys.platform.startswith("linux"):
        return None
    try:
        path = folder() / f"kernels-{_digest()}.so"
        if not path.is_file():
            compile_to(path)
        # torch has loaded OpenMP for all to see.
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        what = getattr(error, "stderr", None) or error
        first = str(what).strip().partition("\n")[0]
        warnings.warn(
            f"no kernels for this CPU, so torch's own are used, which take longer in fp32: {first} "
            f"(a C++ compiler, g++ or clang++ as CXX, makes them; {SWITCH}=off silences this)",
            stacklevel=2,
        )
        return None


def folder() -> Path:
    """Where compiled libraries are kept: beside other caches of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / "kernels"


def compile_to(path: Path) -> None:
    """Raises OSError where there is no compiler or no place, SubprocessError where the compiler fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unit, whole = Path(scratch) / "kernels.o", Path(scratch) / path.name
        _run(*FLAGS, "-c", str(SOURCES / "kernels.cpp"), "-o", str(unit))
        _run("-shared", str(unit), "-o", str(whole))
        whole.replace(path)


def _run(*arguments: str) -> None:
    subprocess.run([_compiler(), *arguments], check=True, capture_output=True, text=True, timeout=300)


def _compiler() -> str:
    return os.environ.get("CXX") or "g++"


def _digest() -> str:
    """Of all that the library depends on: sources, flags, the compiler, and what the processor can do."""
    parts = [file.read_bytes() for file in sorted(SOURCES.iterdir())]
    parts += [" ".join(FLAGS).encode(), _compiler().encode(), platform.machine().encode(), _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """What it says it can do: a home folder may be shared by several."""
    text = Path("/proc/cpuinfo").read_bytes()
    return next((line for line in text.splitlines() if line.startswith((b"flags", b"Features"))), b"")
