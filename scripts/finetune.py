"""`python scripts/finetune.py --train_data_dir DIR --output_dir DIR`: `ldm finetune`, from a checkout.

`accelerate launch scripts/finetune.py ...` (or torchrun) for several processes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
