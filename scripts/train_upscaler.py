"""Train an upscaler for what another model draws, on an exported autoencoder of factor 2.

python scripts/train_vae.py --config configs/postcard_upscaler_vae.yaml --run_dir runs/upscaler_vae
python scripts/train_upscaler.py --vae runs/upscaler_vae/export --run_dir runs/upscaler
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.errors import UserError
from ldm.pretrain.command import start
from ldm.pretrain.recipe import Recipe
from ldm.train.task import Task

if TYPE_CHECKING:
    from ldm.checkpoint import Parts
    from ldm.models import AutoencoderKL, AutoencoderTiny


def make_task(recipe: Recipe, args: argparse.Namespace) -> Task:
    import torch

    from ldm.checkpoint import load_folder, load_tokenizer
    from ldm.checkpoint.parts import check_fit
    from ldm.pretrain.data import load_pictures
    from ldm.pretrain.upscaler import UpscalerTask, make_pairs
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
        make_pairs(large, little, base, data.cache, recipe.model["wear"])
        for large, little in zip(load_pictures(data), load_pictures(small), strict=True)
    )
    return UpscalerTask(parts, train, held_out, recipe.loss)


def rescaled(vae: AutoencoderKL | AutoencoderTiny) -> AutoencoderKL | AutoencoderTiny:
    """The same autoencoder with the factor that diffusers' pipeline works with, whatever a config says."""
    from ldm.models import build

    other = build(vae.to_config() | {"scaling_factor": 0.08333})
    other.load_state_dict(vae.state_dict())
    assert isinstance(other, type(vae))
    return other


def new_parts(model: dict[str, Any], vae: AutoencoderKL | AutoencoderTiny, tokenizer: Any) -> Parts:
    """An upscaler of random weights as the recipe has it. Its text encoder is there for the layout only."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldm.checkpoint import Defaults, Parts
    from ldm.models import UNet, build

    unet = build(model["unet"])
    if not isinstance(unet, UNet):
        raise UserError(f"model.unet is a {type(unet).__name__}, no U-Net")
    ids = {f"{each}_token_id": getattr(tokenizer, f"{each}_token_id") for each in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    return Parts(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**model["text_config"], **ids, **sizes)),
        tokenizer=tokenizer,
        scheduler=model["scheduler"],
        low_res_scheduler=model["low_res_scheduler"],
        max_noise_level=model["max_noise_level"],
        defaults=Defaults(**model["defaults"]),
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", type=Path, required=True, help="a folder of a VAE, or of a model")
    parser.add_argument(
        "--base",
        type=Path,
        default=Path("weights/postcard"),
        help="the model whose pictures are to be upscaled: its VAE wears some",
    )
    parser.add_argument("--init_from", type=Path, help="an upscaler's folder, whose U-Net to go on from")


if __name__ == "__main__":
    start(make_task, "configs/postcard_upscaler.yaml", arguments)
