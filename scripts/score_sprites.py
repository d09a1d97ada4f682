"""Which things has a model of the sprites' world learnt, and how does it follow its frozen prompts?

python scripts/score_sprites.py --model runs/sprites/unet/export [--things 100] [--out figures.json]
With --thumbnails, at any time of its training: each thing on a plain background, no scorer needed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.postcards.scoring.things_command import main

if __name__ == "__main__":
    main()
