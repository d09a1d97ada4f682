"""That memory is kept shows in pages that the kernel need not clear again."""

import platform
import subprocess
import sys

import pytest

CODE = """
from resource import RUSAGE_SELF, getrusage
from ldm.train.memory import keep_freed_memory
if {kept}:
    keep_freed_memory()
bytearray(64 << 20)
before = getrusage(RUSAGE_SELF).ru_minflt
bytearray(64 << 20)[::4096] = bytes(1 << 14)
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_used_again(kept):
    command = [sys.executable, "-c", CODE.format(kept=kept)]
    faults = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (faults < 1 << 10) == kept
