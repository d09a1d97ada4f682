"""Whether models can be merged: errors that name the first config key or tensor in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ldm.checkpoint.merge.origin import Source
from ldm.checkpoint.parts import TEXT_ENCODERS, TOKENIZERS
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.models import UNet

# Keys of configs that do not change what weights mean.
HARMLESS = ("sample_size", "upcast_attention", "force_upcast")
# Of a text encoder's config, those that do and that shapes do not tell.
TEXT_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")


def check_alike(first: Source, others: Sequence[Source], merged: Sequence[str]) -> None:
    """Raises UserError naming the first config key or tensor in which they differ."""
    for other in others:
        for part in merged:
            _check_part(part, first, other, _way_out(merged, part))
        if "unet" in merged:
            _check_prediction(first, other)
    if "unet" in merged:
        _check_widths(first, others)


def _check_part(part: str, first: Source, other: Source, way_out: str) -> None:
    ours, theirs = getattr(first.parts, part), getattr(other.parts, part)
    if theirs is None:
        raise UserError(f"{other.given}: has no {part} to merge{way_out}")
    a, b = _config(part, ours), _config(part, theirs)
    for key in {**a, **b}:
        if a.get(key) != b.get(key):
            raise _different(first, other, f"{part} has {key} {a.get(key)!r}", f"{b.get(key)!r}", way_out)
    ours, theirs = ours.state_dict(), theirs.state_dict()
    for name in {**ours, **theirs}:
        x, y = ([*state[name].shape] if name in state else None for state in (ours, theirs))
        if x != y and not (part == "unet" and name == "conv_in.weight"):
            raise _different(first, other, f"{part} has {name} of shape {x}", f"{y}", way_out)
    if part in TEXT_ENCODERS:
        _check_vocabulary(first, other, part)


def _different(first: Source, other: Source, ours: str, theirs: str, way_out: str) -> UserError:
    models = f"{first.given} and {other.given} are different models"
    return UserError(f"{models}: {ours} in the first, {theirs} in the other{way_out}")


def _way_out(merged: Sequence[str], part: str) -> str:
    rest = [each for each in merged if each != part]
    return f" (to leave it out: --parts {' '.join(rest)})" if rest and part != "unet" else ""


def _config(part: str, module: Any) -> dict[str, Any]:
    """What weights mean, beside their shapes."""
    if part in TEXT_ENCODERS:
        return {key: getattr(module.config, key) for key in TEXT_KEYS}
    kept = {key: value for key, value in asdict(module.config).items() if key not in HARMLESS}
    if isinstance(module, UNet):
        del kept["in_channels"]  # A's may be more: `_check_widths`
    return {"class": type(module).__name__, **kept}


def _check_widths(first: Source, others: Sequence[Source]) -> None:
    """Raises UserError unless the U-Nets' inputs are as wide, or A's alone is wider."""
    own, *widths = (each.parts.unet.config.in_channels for each in (first, *others))
    for other, width in zip(others, widths, strict=True):
        if width > own:
            raise UserError(
                f"{other.given}: its U-Net takes {width} channels, that of {first.given} {own}: give the "
                "model with more (inpainting, instruct-pix2pix) first"
            )
        if width != widths[0]:
            raise UserError(
                f"{other.given}: its U-Net takes {width} channels, that of {others[0].given} {widths[0]}: "
                "only the first model may have more than the others"
            )


def _check_vocabulary(first: Source, other: Source, part: str) -> None:
    """Rows of token embeddings mean the same words only in the same vocabulary."""
    name = TOKENIZERS[TEXT_ENCODERS.index(part)]
    ours, theirs = (getattr(each.parts, name).get_vocab() for each in (first, other))
    if ours != theirs:
        word = next(word for word in [*ours, *theirs] if ours.get(word) != theirs.get(word))
        raise UserError(
            f"{first.given} and {other.given} have different vocabularies: {word!r} is token "
            f"{ours.get(word)} in the first, {theirs.get(word)} in the other; leave {part} out with --parts"
        )


def _check_prediction(first: Source, other: Source) -> None:
    ours, theirs = (_schedule(each).prediction.value for each in (first, other))
    if ours != theirs:
        raise UserError(
            f"{first.given} predicts {ours}, {other.given} {theirs}: what their U-Nets give cannot be mixed. "
            "If one of them does not say it rightly, give --prediction-type, which is then that of all"
        )


def _schedule(source: Source) -> Schedule:
    return Schedule.from_config(dict(source.parts.scheduler))


def differences(first: Source, others: Sequence[Source], merged: Sequence[str]) -> Iterator[str]:
    """What is no error and yet may surprise."""
    for other in others if "unet" in merged else ():
        ours, theirs = (_schedule(each).alphas_cumprod for each in (first, other))
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            yield f"{other.given}: has another noise schedule than {first.given}, whose schedule is written"
        if (own := first.parts.unet.config.in_channels) > (width := other.parts.unet.config.in_channels):
            yield f"{other.given}: its U-Net takes {width} channels; {own - width} more are {first.given}'s"
