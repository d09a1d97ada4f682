"""Train the embedded model on the world of sprites: autoencoder, text encoder, denoiser, the decoder again.

python scripts/train_sprites.py --run_dir DIR [--set unet.run.max_minutes=600]

The same command again goes on where it was stopped (Ctrl-C or SIGTERM: it saves first). One thread, with
OMP_NUM_THREADS=1, leaves the other cores to others. The model is in DIR/model;
while the denoiser learns, what it can already do is in DIR/unet/export.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import UserError, reported

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_dir", type=Path, required=True, help="data, states, logs and weights go here")
    parser.add_argument(
        "--init_from",
        type=Path,
        default=ROOT / "weights" / "postcard",
        help="a model folder to begin from: its latents are kept, its denoiser goes on; default: %(default)s",
    )
    parser.add_argument("--from_nothing", action="store_true", help="begin with random weights instead")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="take its autoencoder, text encoder or both as they are"
    )
    parser.add_argument("--configs", type=Path, default=ROOT / "configs", help="where sprites_*.yaml are")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.SECTION.KEY=VALUE",
        help="e.g. unet.run.max_minutes=600; stages: vae, clip, unet, decoder",
    )
    args = parser.parse_args()
    with reported(training=True):
        overrides: dict[str, list[str]] = {}
        for each in args.set:
            stage, dot, rest = each.partition(".")
            if not dot:
                raise UserError(f"--set {each}: write it as stage.section.key=value")
            overrides.setdefault(stage, []).append(rest)
        from ldm.pretrain.sprite_stages import train_all

        old = None if args.from_nothing else args.init_from
        if train_all(args.configs, args.run_dir, old, overrides, args.keep):
            print(f"the model is in {args.run_dir / 'model'}")


if __name__ == "__main__":
    main()
