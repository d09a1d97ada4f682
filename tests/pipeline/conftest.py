"""The tiny families, as folders and as our pipelines; nothing changes them."""

import diffusers
import numpy as np
import pytest
import torch
from family_inputs import picture
from tiny_adapters import save_diffusers
from tiny_pipeline import make_folder

import ldm


@pytest.fixture(scope="session")
def folder_of(families):
    """The folder of a family, made when first asked for."""
    return lambda name: families(name)[0]


@pytest.fixture(scope="session")
def models(folder_of):
    """Our pipelines by family."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = ldm.load(folder_of(name), device="cpu", dtype="fp32")
        return made[name]

    return get


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """What the lines of code may name."""
    root = tmp_path_factory.mktemp("snippets")
    theirs = make_folder(root / "model")
    pipe = ldm.load(root / "model", device="cpu", dtype="fp32")
    with torch.no_grad():
        embeds = pipe.text.encode(["sea"]).tokens
    return {
        "ldm": ldm,
        "Pipeline": ldm.Pipeline,
        "torch": torch,
        "np": np,
        "diffusers": diffusers,
        "theirs": theirs,
        "path": str(root / "model"),
        "out": str(root / "saved"),
        "lora": str(save_diffusers(theirs, root / "lora.safetensors")),
        "pipe": pipe,
        "few": {"num_inference_steps": 2, "output_type": "latent"},
        "img": picture(),
        "img2": picture(seed=2),
        "embeds": embeds,
        "cpu": {"device": "cpu"},
    }
