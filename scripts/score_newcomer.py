"""Does a model draw windmills when asked, only then, and all else as before?

`python scripts/score_newcomer.py runs/finetuned/export`, `--lora FILE`, `--embedding FILE --noun NAME`;
without any of them it scores the embedded model, as it was before.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.postcards.newcomer.command import main

if __name__ == "__main__":
    main()
