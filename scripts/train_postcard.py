"""Train the whole embedded model in a given time: autoencoder, text encoder, denoiser, and the decoder again.

python scripts/train_postcard.py --minutes 150 --run_dir runs/postcard [--init_from weights/postcard]

Uses a GPU if there is one, else two processes on the CPU. Run it again to go on where it was stopped. What
each part has learnt so far is in <run_dir>/<part>/export; the model, when all is done, in <run_dir>/model.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import reported
from ldm.pretrain.postcard import train_postcard

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Other arguments (--set, --train_data_dir) go to each trainer.",
    )
    parser.add_argument("--minutes", type=float, required=True, help="of training in all")
    parser.add_argument("--run_dir", type=Path, required=True, help="everything goes here")
    parser.add_argument("--init_from", type=Path, help="a postcard model to go on from")
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        help="on a CPU; each has a batch of its own (default: %(default)s)",
    )
    args, others = parser.parse_known_args()
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes must be above 0 (got {args.minutes:g})")
    if args.processes < 1:
        parser.error(f"--processes must be at least 1 (got {args.processes})")
    with reported(training=True):
        status = train_postcard(CHECKOUT, **vars(args), others=others)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
