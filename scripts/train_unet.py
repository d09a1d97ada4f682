"""Train the denoiser on an exported VAE and text encoder.

python scripts/train_unet.py --vae runs/vae/export --clip runs/clip/export --run_dir runs/unet
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import UserError
from ldm.pretrain.command import start
from ldm.pretrain.recipe import Recipe
from ldm.train.task import Task


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch

    from ldm.checkpoint.clip import load_text_encoder, load_tokenizer
    from ldm.checkpoint.component import load_module
    from ldm.checkpoint.folder import read_words
    from ldm.checkpoint.io import read_config
    from ldm.checkpoint.parts import Defaults, Parts, check_fit
    from ldm.models import UNet, build
    from ldm.pretrain.data import load_pictures
    from ldm.pretrain.unet import UNetTask, prepare
    from ldm.pretrain.vae import load_vae
    from ldm.pretrain.vocabulary import known_words
    from ldm.pretrain.widen import widen_latents

    torch.manual_seed(recipe.run.seed)
    model = dict(recipe.model)
    vae = load_vae(args.vae)
    unet = load_module(args.init_from / "unet", torch.float32) if args.init_from else build(model["unet"])
    if not isinstance(unet, UNet):
        raise UserError(f"{args.init_from}/unet holds a {type(unet).__name__}; give a model folder")
    scheduler = model["scheduler"]
    if args.init_from:
        unet = widen_latents(unet, vae.latent_channels)
        scheduler = read_config(args.init_from / "scheduler" / "scheduler_config.json")
    parts = Parts(
        unet=unet,
        vae=vae,
        text_encoder=load_text_encoder(args.clip / "text_encoder", torch.float32),
        tokenizer=load_tokenizer(args.clip / "tokenizer"),
        scheduler=scheduler,
        defaults=Defaults(**model["defaults"]),
        words=read_words(args.clip / "words.txt"),
    )
    text = args.clip / "text_encoder"
    check_fit(parts, {"unet": args.init_from or args.config, "vae": args.vae, "text_encoder": text})
    pictures = load_pictures(recipe.data, repainted=recipe.loss.get("repainted", 0) > 0)
    if parts.words:
        seen = known_words(caption for each in pictures[0].captions for caption in each)
        parts = replace(parts, words=parts.words | set(seen))
    train, held_out = (prepare(each, vae, parts.tokenizer, recipe.data.cache) for each in pictures)
    return UNetTask(parts, train, held_out, recipe.loss, model["prompts"])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", type=Path, required=True, help="a folder of a VAE, or of a model")
    parser.add_argument(
        "--init_from", type=Path, help="a model folder whose U-Net to go on from, widened where the VAE is"
    )
    parser.add_argument("--clip", type=Path, required=True, help="text_encoder/, tokenizer/ and words.txt")


if __name__ == "__main__":
    start(make_task, "configs/postcard_unet.yaml", arguments)
