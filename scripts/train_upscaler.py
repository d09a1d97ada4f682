"""Train an upscaler for what another model draws, on an exported autoencoder of factor 2.

python scripts/train_vae.py --config configs/postcard_upscaler_vae.yaml --run_dir runs/upscaler_vae
python scripts/train_upscaler.py --vae runs/upscaler_vae/export --run_dir runs/upscaler
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

    from ldm.checkpoint import load_folder, load_tokenizer
    from ldm.checkpoint.parts import check_fit
    from ldm.pretrain.data import load_pictures
    from ldm.pretrain.upscaler import UpscalerTask, make_pairs, new_parts, rescaled
    from ldm.pretrain.vae import load_vae
    from ldm.runtime import Runtime

    torch.manual_seed(recipe.run.seed)
    vae, base, data = rescaled(load_vae(args.vae)), load_vae(args.base), recipe.data
    if args.init_from:
        parts = replace(load_folder(args.init_from, Runtime(torch.device("cpu"), torch.float32)), vae=vae)
    else:
        parts = new_parts(dict(recipe.model), vae, load_tokenizer(args.base / "tokenizer"))
    check_fit(parts, {"unet": args.init_from or args.config, "vae": args.vae, "text_encoder": args.config})
    if data.size % (8 * vae.downscale):
        raise UserError(f"data.size must be a multiple of {8 * vae.downscale} pixels (got {data.size})")
    small = data.model_copy(update={"size": data.size // vae.downscale})
    train, held_out = (
        make_pairs(large, little, base, data.cache, recipe.model["latent_noise"])
        for large, little in zip(load_pictures(data), load_pictures(small), strict=True)
    )
    return UpscalerTask(parts, train, held_out, recipe.loss)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", type=Path, required=True, help="a folder of a VAE, or of a model")
    parser.add_argument(
        "--base",
        type=Path,
        default=Path("weights/postcard"),
        help="the model whose pictures are to be upscaled: its VAE degrades some",
    )
    parser.add_argument("--init_from", type=Path, help="an upscaler's folder, whose U-Net to go on from")


if __name__ == "__main__":
    start(make_task, "configs/postcard_upscaler.yaml", arguments)
