"""Guidance compared: `python scripts/measure_guidance.py --out runs/guidance`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.postcards.comparisons.conditions import main

if __name__ == "__main__":
    main()
