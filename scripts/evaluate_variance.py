"""Fixed against learned variance of DDPM.

`python scripts/evaluate_variance.py --model runs/variance/export --out runs/variance.json`
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.postcards.comparisons.variance import main

if __name__ == "__main__":
    main()
