"""Choose the prompts that models of the sprites' world are scored on, once: assets/sprites/prompts.jsonl.

python scripts/choose_prompts.py --force
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import UserError, reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="default: assets/sprites/prompts.jsonl")
    parser.add_argument("--force", action="store_true", help="give up the prompts that are there")
    args = parser.parse_args()
    with reported():
        from ldm.postcards.scoring.frozen import FILE, choose_prompts, write_prompts

        out = args.out or FILE
        if out.exists() and not args.force:
            raise UserError(f"{out} is there, and figures of other prompts do not compare: --force")
        write_prompts(choose_prompts(), out)


if __name__ == "__main__":
    main()
