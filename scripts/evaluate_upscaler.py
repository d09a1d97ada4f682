"""Measure an upscaler: `python scripts/evaluate_upscaler.py --pictures upscaled.png`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.postcards.comparisons.upscaling import main

if __name__ == "__main__":
    main()
