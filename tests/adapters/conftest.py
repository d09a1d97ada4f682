"""Pipelines of tiny families, each with a LoRA of all its parts."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_adapters import save_diffusers

import ldm

UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "time_emb_proj"]
DRAW = {"prompt": "the red boat", "num_inference_steps": 2, "output_type": "latent", "seed": 3}
SMALL = {"height": 16, "width": 16}


class Family:
    """A pipeline of ours and diffusers', and a LoRA in diffusers' spelling, as tensors and as drawn."""

    def __init__(self, name, model, peer, folder):
        self.peer, self.pipe = peer, ldm.load(model, dtype="fp32", device="cpu")
        file = save_diffusers(peer, folder / f"{name}.safetensors", unet=UNET, metadata=False)
        self.tensors = load_file(file)
        if name == "refiner":  # diffusers calls the only text encoder there the second
            self.draw = {**DRAW, "image": torch.full((1, 3, 16, 16), 0.5), "strength": 1.0}
        else:
            self.draw = DRAW | SMALL
        self.plain = self(file)
        assert not torch.equal(self.plain, self.pipe(**self.draw).images)

    def __call__(self, file, weight=0.8, fused=False, **changes):
        adapted = self.pipe.with_lora(file, weight)
        return (adapted.fuse() if fused else adapted)(**self.draw | changes).images


@pytest.fixture(scope="session")
def family(families, tmp_path_factory):
    """`Family` by name, not to be changed."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}

    def get(name):
        if name not in made:
            made[name] = Family(name, *families(name), folder)
        return made[name]

    return get
