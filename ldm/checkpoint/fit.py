"""Whether parts belong together: each may be sound and still come from another model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.checkpoint.folder import Parts


def check_fit(parts: Parts, sources: Mapping[str, Path]) -> None:
    """Raises UserError naming the two parts that do not fit, and where they are from (`sources`, by part)."""
    unet, vae = parts.unet.config, parts.vae
    own = vae.latent_channels
    # Beside the latents: nothing; a mask and latents; latents; a low-resolution picture.
    if unet.in_channels - own not in (0, own + 1, own, 3):
        raise UserError(
            f"{sources['unet']}: the U-Net takes {unet.in_channels} channels, "
            f"which does not go with the VAE's {own} ({sources['vae']})"
        )
    encoders = {part: getattr(parts, part) for part in ("text_encoder", "text_encoder_2")}
    encoders = {part: encoder for part, encoder in encoders.items() if encoder is not None}
    for part, encoder in encoders.items():
        tokens = len(getattr(parts, part.replace("text_encoder", "tokenizer")))
        if tokens > (rows := encoder.config.vocab_size):
            raise UserError(f"{sources[part]}: has rows for {rows} tokens, but the tokenizer has {tokens}")
    width = sum(encoder.config.hidden_size for encoder in encoders.values())
    if {*unet.per_level("cross_attention_dim")} != {width}:
        gives = " and ".join(
            f"{part} gives {each.config.hidden_size} ({sources[part]})" for part, each in encoders.items()
        )
        raise UserError(
            f"{sources['unet']}: the U-Net takes text of width {unet.cross_attention_dim}, but {gives}"
        )
    if unet.addition_embed_type == "text_time":
        _check_pooled(parts, sources)


def _check_pooled(parts: Parts, sources: Mapping[str, Path]) -> None:
    """SDXL embeds pooled text with six numbers: size, crop, and target size or (refiner, five) a score."""
    unet = parts.unet.config
    if parts.text_encoder_2 is None:
        raise UserError(f"{sources['unet']}: the U-Net takes pooled text, but there is no text_encoder_2")
    pooled = parts.text_encoder_2.config.projection_dim
    numbers = 5 if parts.requires_aesthetics_score else 6
    if unet.projection_class_embeddings_input_dim != pooled + numbers * (unet.addition_time_embed_dim or 0):
        raise UserError(
            f"{sources['unet']}: the U-Net does not take {numbers} sizes and pooled text of width {pooled} "
            f"({sources['text_encoder_2']})"
        )
