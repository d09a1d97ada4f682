"""Make a random pipeline folder with the shapes of Stable Diffusion 1.5, about 2 GiB in fp16, 2.1 or XL.

python tests/make_sd15.py FOLDER           make it; then `txt2img --model FOLDER --prompt "..."`
python tests/make_sd15.py FOLDER --family sdxl
python tests/make_sd15.py FOLDER --check   compare one U-Net call with diffusers, both in fp32
"""

import argparse
import tempfile
from pathlib import Path

import torch
from hub_configs import SCHEDULERS, TEXT_ENCODERS, UNETS, VAES
from tiny_pipeline import write_tokenizer

from ldm.checkpoint import Parts, load_module, load_tokenizer, save_folder
from ldm.models import build
from ldm.models.clip import CLIPTextModel

# The names of U-Net and scheduler, VAE and text encoders in hub_configs.
FAMILIES = {
    "sd1": ("sd1", "sd1", ("clip_l",)),
    "sd2": ("sd2_base", "sd2", ("open_clip_h",)),
    "sdxl": ("sdxl", "sdxl", ("clip_l", "open_clip_g")),
}


def fill_randomly(module):
    """Weights that keep the variance of what passes through; norms at 1, biases at 0.

    Drawing billions of normals would take minutes: tensors repeat one million of them.
    """
    pool, tensors = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).half(), {}
    for name, meta in module.state_dict().items():
        if meta.ndim == 1:
            tensors[name] = torch.full(meta.shape, float("norm" in name and name.endswith("weight"))).half()
        else:
            noise = pool.repeat(meta.numel() // len(pool) + 1)[: meta.numel()].view(meta.shape)
            tensors[name] = noise * meta[0].numel() ** -0.5
    module.load_state_dict(tensors, assign=True)
    return module


def text_encoder(config, tokenizer):
    """Of that size, for our small vocabulary's start and end; its table stays as long as CLIP's."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextModel.from_config(config | ids)


def make(folder, family="sd1"):
    unet, vae, encoders = FAMILIES[family]
    with tempfile.TemporaryDirectory() as vocabulary:
        write_tokenizer(Path(vocabulary), window=77)
        tokenizer = load_tokenizer(Path(vocabulary))
    with torch.device("meta"):
        modules = [build(UNETS[unet]), build(VAES[vae])]
        modules += [text_encoder(TEXT_ENCODERS[name], tokenizer) for name in encoders]
    unet_, vae_, first, *second = map(fill_randomly, modules)
    others = {"text_encoder_2": second[0], "tokenizer_2": tokenizer} if second else {}
    save_folder(folder, Parts(unet_, vae_, first, tokenizer, SCHEDULERS[unet], **others))


@torch.no_grad()
def check(folder):
    """The relative error of one U-Net call."""
    from diffusers import UNet2DConditionModel

    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, 32, 32, generator=generator)
    context = torch.randn(1, 77, 768, generator=generator)
    theirs = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    wanted = theirs(sample, 500, context).sample
    del theirs
    ours = load_module(folder / "unet", torch.float32)(sample, 500, context)
    return float((ours - wanted).abs().max() / wanted.abs().max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    parser.add_argument("--check", action="store_true", help="compare one U-Net call with diffusers")
    arguments = parser.parse_args()
    if arguments.check:
        print(f"relative error of one U-Net call: {check(arguments.folder):.1e}")
    else:
        make(arguments.folder, arguments.family)
