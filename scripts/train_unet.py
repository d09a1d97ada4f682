"""Train the denoiser on an exported VAE and text encoder.

python scripts/train_unet.py --vae runs/vae/export --clip runs/clip/export --run_dir runs/unet
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.pretrain.command import start
from ldm.pretrain.recipe import Recipe
from ldm.train.task import Task


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch

    from ldm.checkpoint.parts import check_fit
    from ldm.pretrain.data import load_pictures
    from ldm.pretrain.unet import UNetTask, make_parts, prepare
    from ldm.pretrain.vocabulary import known_words

    torch.manual_seed(recipe.run.seed)
    parts = make_parts(dict(recipe.model), args.vae, args.clip, args.init_from)
    text = args.clip / "text_encoder"
    check_fit(parts, {"unet": args.init_from or args.config, "vae": args.vae, "text_encoder": text})
    pictures = load_pictures(recipe.data, repainted=recipe.loss.get("repainted", 0) > 0)
    if parts.words:
        seen = known_words(caption for each in pictures[0].captions for caption in each)
        parts = replace(parts, words=parts.words | set(seen))
    train, held_out = (prepare(each, parts.vae, parts.tokenizer, recipe.data.cache) for each in pictures)
    return UNetTask(parts, train, held_out, recipe.loss, recipe.model["prompts"])


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", type=Path, required=True, help="a folder of a VAE, or of a model")
    parser.add_argument(
        "--init_from", type=Path, help="a model folder whose U-Net to go on from, widened where the VAE is"
    )
    parser.add_argument("--clip", type=Path, required=True, help="text_encoder/, tokenizer/ and words.txt")


if __name__ == "__main__":
    start(make_task, "configs/postcard_unet.yaml", arguments)
