"""The watermark's price and its errors: `python scripts/measure_watermark.py --count 1000 --size 128`.

Needs `pip install ldm[train]`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.postcards.comparisons.watermark import main

if __name__ == "__main__":
    main()
