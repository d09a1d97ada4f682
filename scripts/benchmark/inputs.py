"""What all peers are given alike: random arrays of the shapes that a folder's configs ask for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmark.case import Case

Array = npt.NDArray[np.float32]
TIMESTEP = 500


@dataclass(frozen=True)
class Inputs:
    """fp32 arrays. Drawn from one seed in one order, so that they are equal in all processes."""

    sample: Array  # [2, C, h, w] the U-Net's, unconditional and conditional
    tokens: Array  # [2, N, D]
    pooled: Array | None  # [2, P] SDXL
    time_ids: Array | None  # [2, 6] SDXL
    latents: Array  # [1, C, h, w] scaled, as the VAE decodes them
    image: Array  # [1, 3, H, W] in 0..1
    noise: Array  # [batch, C, h, w] unit noise that pictures begin with


def make_inputs(case: Case) -> Inputs:
    """The same for all peers and rounds."""
    unet, vae = config_of(case, "unet"), config_of(case, "vae")
    rng, downscale = np.random.default_rng(0), downscale_of(vae)
    c, h, w = unet["in_channels"], case.height // downscale, case.width // downscale

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    pooled, time_ids = None, None
    sample, tokens = normal(1, c, h, w), normal(2, window_of(case), unet["cross_attention_dim"])
    if unet.get("addition_embed_type") == "text_time":
        time_ids = np.array([[case.height, case.width, 0, 0, case.height, case.width]] * 2, np.float32)
        width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        pooled = normal(2, width)
    image = rng.random((1, 3, case.height, case.width), dtype=np.float32)
    latents, noise = normal(1, vae["latent_channels"], h, w), normal(case.batch, c, h, w)
    return Inputs(np.concatenate([sample] * 2), tokens, pooled, time_ids, latents, image, noise)


def config_of(case: Case, part: str) -> dict[str, Any]:
    """The config.json of a part."""
    config: dict[str, Any] = json.loads(
        (Path(case.folder) / part / "config.json").read_text(encoding="utf-8")
    )
    return config


def window_of(case: Case) -> int:
    """Tokens that the text encoders read at once: 77 but in the embedded model."""
    return int(config_of(case, "text_encoder")["max_position_embeddings"])


def downscale_of(vae: dict[str, Any]) -> int:
    """How many pixels a latent is wide."""
    levels = vae.get("num_decoder_blocks") or vae["block_out_channels"]  # AutoencoderTiny has the former
    return int(2 ** (len(levels) - 1))


def relative_error(found: Array, wanted: Array) -> float:
    """``|found - wanted| / |wanted|``, NaN where their shapes differ."""
    if found.shape != wanted.shape:
        return float("nan")
    exact = wanted.astype(np.float64).ravel()
    gap, size = np.linalg.norm(found.ravel() - exact), np.linalg.norm(exact)
    return float(gap) / max(float(size), 1e-30)
