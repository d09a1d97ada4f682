"""Train the autoencoder: `python scripts/train_vae.py --run_dir runs/vae`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.pretrain.command import start
from ldm.pretrain.recipe import Recipe
from ldm.train.task import Task


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch

    from ldm.pretrain.data import load_pictures
    from ldm.pretrain.vae import VAETask, build_vae, load_vae
    from ldm.pretrain.widen import widen_vae

    torch.manual_seed(recipe.run.seed)
    narrow = load_vae(args.widen) if args.widen else None
    if args.init_from:
        vae = load_vae(args.init_from)
    elif narrow is not None:
        vae = widen_vae(narrow, recipe.model.get("latent_channels", narrow.latent_channels))
    else:
        vae = build_vae(recipe.model)
    return VAETask(vae, *load_pictures(recipe.data), recipe.loss, args.decoder_only, narrow)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init_from", type=Path, help="a folder of a VAE, or of a model, to go on from")
    parser.add_argument(
        "--widen", type=Path, help="a folder of a VAE, or of a model, whose channels are to be the first"
    )
    parser.add_argument("--decoder_only", action="store_true", help="freeze the encoder")


if __name__ == "__main__":
    start(make_task, "configs/postcard_vae.yaml", arguments)
