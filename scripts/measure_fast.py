"""What each way of drawing faster costs: `python scripts/measure_fast.py --out runs/fast.json`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.postcards.comparisons.fast import main

if __name__ == "__main__":
    main()
