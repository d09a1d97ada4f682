"""What the benchmarks share: a peer measured in a process of its own, and what a process holds."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_new_process(what: str, peer: str, *arguments: object) -> Any:
    """What `bench.py <what> --peer <peer>` prints in its last line, from JSON; ends with its errors."""
    script = Path(__file__).with_name("bench.py")
    command = [sys.executable, script, what, "--peer", peer, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> dict[str, float]:
    """MiB by the names in /proc/self/status."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {name: int(kib) / 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.M)}
