"""All that a model holds, whatever it was read from; and whether its parts belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.models import VAE, UNet
from ldm.models.kind import Kind
from ldm.prompts.world import World

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
NETWORKS = ("vae", "unet", *TEXT_ENCODERS)
EMBEDDED = ("postcard", "postcard-upscaler")  # models that come with the package
MODEL_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"  # of weight files: diffusers', transformers'
STEMS = {part: TEXT_STEM if part in TEXT_ENCODERS else MODEL_STEM for part in NETWORKS}
STEMS["safety_checker"] = TEXT_STEM


@dataclass(frozen=True)
class Defaults:
    """What `ldm.json` may say: how to draw with this model when the caller does not."""

    num_inference_steps: int | None = None  # None: what its kind is drawn with
    guidance_scale: float | None = None
    sampler: str | None = None  # None: that of scheduler_config.json
    spacing: str | None = None
    height: int | None = None  # None: the U-Net's sample_size
    width: int | None = None
    noise_level: int | None = None  # upscalers


@dataclass(frozen=True)
class Parts:
    """All that a model holds. Families differ in what is None, and in the configs of the networks."""

    unet: UNet
    vae: VAE
    text_encoder: Any  # a CLIPTextModel; None in the SDXL refiner, and where embeddings are given
    tokenizer: Any  # a CLIPTokenizer; None where text_encoder is
    scheduler: Mapping[str, Any]  # scheduler_config.json
    defaults: Defaults = field(default_factory=Defaults)
    words: frozenset[str] = frozenset()  # that the model has seen; empty if not known
    world: World | None = None  # the things that it can draw, by all their names; None if not known
    weights: Path | None = None  # the U-Net's file, or the single file; None for parts made in memory
    # What was asked to be other than in the model: parts with the file of their weights, prediction type.
    changes: tuple[tuple[str, Path | None], ...] = ()
    text_encoder_2: Any = None  # SDXL's second, a CLIPTextModel with pooled text
    tokenizer_2: Any = None
    low_res_scheduler: Mapping[str, Any] | None = None  # x4 upscaler: how its low-resolution input is noised
    force_zeros_for_empty_prompt: bool = False  # SDXL: no negative prompt is zeros, not the encoding of ""
    requires_aesthetics_score: bool = False  # SDXL refiner: a score in place of the target size
    max_noise_level: int = 350  # x4 upscaler

    @property
    def kind(self) -> Kind:
        """What the model draws from. Raises UserError for a U-Net that does not fit the VAE."""
        try:
            return Kind.of(self.unet.config.in_channels, self.vae.latent_channels)
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def learns_variance(self) -> bool:
        """Whether the U-Net says the variance of DDPM's steps, in as many output channels again."""
        return bool(self.scheduler.get("variance_type") == "learned_range")

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that are not in `words`; none where the model does not tell its words."""
        seen = dict.fromkeys(re.findall(r"[a-z']+", prompt.lower()))
        return [word for word in seen if self.words and word not in self.words]


Changes = tuple[tuple[str, Path | None], ...]


def changed_part(changes: Changes, part: str, file: Path) -> Changes:
    """`Parts.changes` with another file of a part, in the order in which a model of both is loaded."""
    parts = {name: place for name, place in changes if name in NETWORKS} | {part: file}
    return (*sorted(parts.items()), *(each for each in changes if each[0] not in NETWORKS))


def check_fit(parts: Parts, sources: Mapping[str, Path]) -> None:
    """Raises UserError naming the two parts that do not fit, and where they are from (`sources`, by part)."""
    unet, vae = parts.unet.config, parts.vae
    try:
        Kind.of(unet.in_channels, vae.latent_channels)
    except ValueError:
        raise UserError(
            f"{sources['unet']}: the U-Net takes {unet.in_channels} channels, "
            f"which does not go with the VAE's {vae.latent_channels} ({sources['vae']})"
        ) from None
    _check_variance(parts, sources)
    encoders = {part: getattr(parts, part) for part in ("text_encoder", "text_encoder_2")}
    encoders = {part: encoder for part, encoder in encoders.items() if encoder is not None}
    if not encoders:  # embeddings are given with each prompt
        return
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


def _check_variance(parts: Parts, sources: Mapping[str, Path]) -> None:
    """A U-Net gives the VAE's channels, and as many again where it has learned the variance."""
    gives, c = parts.unet.config.out_channels, parts.vae.latent_channels
    said = parts.scheduler.get("variance_type")
    if gives == (2 * c if parts.learns_variance else c):
        return
    place = f"{sources['unet']}: the U-Net gives {gives} channels"
    if parts.learns_variance:
        raise UserError(
            f"{place}, and scheduler_config.json has variance_type learned_range, which needs {2 * c}: twice "
            f"the VAE's {c} ({sources['vae']}); set variance_type to fixed_small if none was learned"
        )
    if gives == 2 * c:
        raise UserError(
            f"{place}, twice the VAE's {c}, as one that has learned its variance, but scheduler_config.json "
            f"has variance_type {said}: set it to learned_range"
        )
    raise UserError(f"{place}, which does not go with the VAE's {c} ({sources['vae']})")


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


def check_upscaler(parts: Parts, name: str) -> None:
    """Raise UserError for a model, of this name, that does not enlarge a small picture."""
    if parts.kind is not Kind.UPSCALE:
        raise UserError(f"{name} is no upscaler: its U-Net takes no small picture beside its latents")


def check_refiner(refiner: Parts, name: str, parts: Parts) -> None:
    """Raise UserError for a model, of this name, that cannot go on from the latents of another."""
    if refiner.kind is not Kind.TEXT:
        raise UserError(f"{name} is no refiner: it draws from an image ({refiner.kind.name.lower()})")
    for what in ("latent_channels", "downscale", "scaling_factor", "shift_factor"):
        own, other = getattr(refiner.vae, what), getattr(parts.vae, what)
        if own != other:
            raise UserError(
                f"{name} is no refiner of this model: its VAE's {what} is {own:g}, this model's {other:g}"
            )
