"""What the tiny families draw from, and how their latents are compared."""

import numpy as np
from PIL import Image


def picture(height=16, width=16, seed=1):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def mask(height=16, width=16):
    levels = np.zeros((height, width), dtype=np.uint8)
    levels[5:, : width // 2] = 255
    return Image.fromarray(levels)


INPUTS = {
    "sd1": {"image": picture(), "strength": 0.7},
    "sdxl": {},
    "refiner": {"image": picture(), "strength": 0.7},
    "inpaint": {"image": picture(), "mask_image": mask()},
    "inpaint_xl": {"image": picture(), "mask_image": mask(), "strength": 0.7},
    "pix2pix": {"image": picture()},
    "upscaler": {"image": picture(8, 8)},
    "lcm": {},
}


def latents(pipe, prompt="the red boat", **arguments):
    return pipe(prompt, **{"num_inference_steps": 3, "output_type": "latent", **arguments}).images


def error(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())
