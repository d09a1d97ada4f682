"""`python scripts/txt2img.py --prompt "a red sailboat"`: the txt2img command, from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import txt2img

if __name__ == "__main__":
    sys.exit(txt2img())
