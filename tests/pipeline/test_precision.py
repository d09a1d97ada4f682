"""Half precision, and what comes of NaN."""

import copy
from dataclasses import replace

import pytest
import torch
from family_inputs import INPUTS, error, latents, picture

import ldm


@pytest.mark.parametrize("family", ["refiner", "inpaint_xl"])
def test_half_precision_gives_the_same_picture_nearly(models, family):
    """Sizes and noise levels stay exact, whatever the U-Net's dtype."""
    pipe = models(family)
    parts = pipe.parts
    runtime = replace(pipe.runtime, dtype=torch.bfloat16)
    reload = {
        name: runtime.place(copy.deepcopy(getattr(parts, name))) for name in ("unet", "vae", "text_encoder_2")
    }
    if parts.text_encoder is not None:
        reload["text_encoder"] = runtime.place(copy.deepcopy(parts.text_encoder))
    half = ldm.Pipeline.from_parts(replace(parts, **reload), runtime)
    common = {**INPUTS[family], "original_size": (1025, 1027), "seed": 1}
    assert error(latents(half, **common), latents(pipe, **common)) < 0.1


def test_nan_in_the_encoder_never_becomes_a_picture(models):
    broken = replace(models("sd1").parts, vae=copy.deepcopy(models("sd1").vae))
    with torch.no_grad():
        broken.vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the VAE's encoder gives NaN"):
        latents(ldm.Pipeline.from_parts(broken), image=picture())


@pytest.mark.parametrize("family", ["refiner", "inpaint", "lcm"])
def test_nan_in_half_precision_is_redone_in_fp32(folder_of, family):
    half = ldm.load(folder_of(family), device="cpu", dtype="fp16")
    with torch.no_grad():  # 1e6 inside: too much for fp16
        half.unet.time_embedding.linear_1.weight.mul_(1e3)
        half.unet.time_embedding.linear_2.weight.mul_(1e3)
    with pytest.warns(UserWarning, match="the U-Net gave NaN or Inf in float16: done again in float32"):
        drawn = latents(half, seed=1, **INPUTS[family])
    exact = ldm.Pipeline.from_parts(replace(half.parts, unet=copy.deepcopy(half.unet).float()))
    assert error(drawn, latents(exact, seed=1, **INPUTS[family])) < 1e-6
