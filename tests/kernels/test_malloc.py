"""That memory is kept shows in pages that the kernel need not clear, that it is not in resident ones.

Each in a process of its own: in the heap of one with a long past there may be room.
"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")

CODE = """
from contextlib import nullcontext
from resource import RUSAGE_SELF, getrusage
from ldm.kernels.malloc import freed_memory_kept
with freed_memory_kept() if {kept} else nullcontext():
    bytearray(64 << 20)
    before = getrusage(RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)[::4096] = bytes(1 << 14)
    print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_used_again(kept):
    command = [sys.executable, "-c", CODE.format(kept=kept)]
    faults = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (faults < 1 << 10) == kept


AFTER = """
import re, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from tiny_training import Line, tiny_recipe
from ldm.train.loop import train

def resident():  # MiB of this process's own memory
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) / 1024

train(Line(), tiny_recipe(1), Path({folder!r}))
blocks = [torch.ones(48 << 18) for _ in range(2)]
held = resident()
del blocks
print("given back:", held - resident())
"""


def test_what_is_freed_after_a_training_is_given_back(tmp_path):
    """A process that goes on: a model that is loaded and dropped leaves nothing, as before."""
    code = AFTER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(said.rpartition("given back:")[2]) > 90


HOLES = """
import re
from contextlib import nullcontext
from pathlib import Path
from ldm.kernels.malloc import freed_memory_given_back

def resident():  # MiB
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) / 1024

bytearray(24 << 20)  # freed, and from now on glibc takes so large blocks from its heap
before = resident()
with freed_memory_given_back() if {given_back} else nullcontext():
    held = []
    for k in range(20):
        large = bytearray(16 << 20)
        held.append(bytearray(100 << 10))
        del large
    large = [bytearray(20 << 20) for _ in range(3)]
    del large
print(resident() - before)
"""


@pytest.mark.parametrize("given_back", [True, False])
def test_what_is_held_leaves_no_holes(given_back):
    command = [sys.executable, "-c", HOLES.format(given_back=given_back)]
    more = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (more < 8) == given_back


NESTED = """
from resource import RUSAGE_SELF, getrusage
from ldm.kernels.malloc import freed_memory_given_back, freed_memory_kept
with freed_memory_kept():
    with freed_memory_given_back():
        pass
    bytearray(64 << 20)
    before = getrusage(RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)[::4096] = bytes(1 << 14)
    print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


def test_a_block_leaves_the_one_around_it_as_it_was():
    """A preview over bands within a training."""
    command = [sys.executable, "-c", NESTED]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 1 << 10
