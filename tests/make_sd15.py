"""Make a random pipeline folder with the shapes of Stable Diffusion 1.5, about 2 GiB in fp16.

python tests/make_sd15.py FOLDER           make it; then `txt2img --model FOLDER --prompt "..."`
python tests/make_sd15.py FOLDER --check   compare one U-Net call with diffusers, both in fp32
"""

import argparse
import tempfile
from pathlib import Path

import torch
from hub_configs import SCHEDULERS, UNETS, VAES
from tiny_pipeline import write_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoint import Parts, load_module, save_folder
from ldm.models import build


def fill_randomly(module):
    """Weights that keep the variance of what passes through; norms at 1, biases at 0."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, meta in module.state_dict().items():
        if meta.ndim == 1:
            tensors[name] = torch.full(meta.shape, float("norm" in name and name.endswith("weight"))).half()
        else:
            noise = torch.randn(meta.shape, generator=generator)
            tensors[name] = (noise * meta[0].numel() ** -0.5).half()
    module.load_state_dict(tensors, assign=True)
    return module


def make(folder):
    with tempfile.TemporaryDirectory() as vocabulary:
        tokenizer = write_tokenizer(Path(vocabulary), window=77)
    text_config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):
        modules = build(UNETS["sd1"]), build(VAES["sd1"]), CLIPTextModel(text_config)
    unet, vae, text_encoder = map(fill_randomly, modules)
    save_folder(folder, Parts(unet, vae, text_encoder, tokenizer, SCHEDULERS["sd1"]))


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
    parser.add_argument("--check", action="store_true", help="compare one U-Net call with diffusers")
    arguments = parser.parse_args()
    if arguments.check:
        print(f"relative error of one U-Net call: {check(arguments.folder):.1e}")
    else:
        make(arguments.folder)
