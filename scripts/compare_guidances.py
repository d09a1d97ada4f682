"""Guidances at their best scales: `python scripts/compare_guidances.py --out runs/guidances.json`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.postcards.comparisons.guidances import main

if __name__ == "__main__":
    main()
