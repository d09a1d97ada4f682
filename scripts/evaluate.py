"""Score a postcard model: `python scripts/evaluate.py --model weights/postcard --out runs/figures.json`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.postcards.scoring.command import main

if __name__ == "__main__":
    main()
