"""Whether a network of pictures is for a model, told by name."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import UserError
from ldm.models import ControlNet, T2IAdapter, UNet
from ldm.models.config import UNetConfig
from ldm.models.control import ControlNetUnion
from ldm.models.control.controlnet import skip_channels
from ldm.models.control.union import ALIASES, TYPES
from ldm.spelling import squash, unknown

# By the width of the text.
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "SDXL's refiner"}


def family_of(config: UNetConfig) -> str:
    """What people call the models of that config."""
    return family_named(max(config.per_level("cross_attention_dim")))


def family_named(width: int) -> str:
    """What people call the models that read text of that width."""
    return FAMILIES.get(width, f"models with text of width {width}")


def refuse(path: Path, what: str, own: str, unet: UNet) -> UserError:
    """The error for a network of another family."""
    here = family_of(unet.config)
    if own == here:
        own = "another shape than this model's"
        return UserError(f"{path}: {what} of {own} ({here}): give one that was made for this model")
    return UserError(f"{path}: {what} for {own}, and this model is of {here}: give one for {here}")


def check_fit(network: ControlNet | T2IAdapter, unet: UNet, path: Path) -> None:
    """Raise UserError for a network whose outputs do not fit a U-Net's features, by the families' names."""
    config = unet.config
    if isinstance(network, T2IAdapter):
        if not adapter_fits(network, config):
            raise refuse(path, "a T2I-Adapter", _family_of_adapter(network), unet)
        return
    own = network.config
    what = "a union ControlNet" if isinstance(network, ControlNetUnion) else "a ControlNet"
    attends = any("CrossAttn" in kind for kind in (*own.down_block_types, own.mid_block_type or ""))
    same_text = not attends or {*own.per_level("cross_attention_dim")} == {
        *config.per_level("cross_attention_dim")
    }
    told = own.conditioning <= config.conditioning
    channels = own.in_channels in (config.in_channels, config.out_channels, 4)
    if not (same_text and told and channels and own.skip_channels == skip_channels(config)):
        raise refuse(path, what, family_of(own), unet)


def adapter_fits(network: T2IAdapter, config: UNetConfig) -> bool:
    """Whether each feature of an adapter has the channels and the size of its level's, or of the middle's."""
    wide, given = config.block_out_channels, network.config.features
    places = list(wide) + [wide[-1]] * (len(given) - len(wide))
    is_xl = config.down_block_types[0] == "DownBlock2D"
    return list(given) == places[: len(given)] and is_xl == (network.config.adapter_type == "full_adapter_xl")


def _family_of_adapter(network: T2IAdapter) -> str:
    return "SDXL" if network.config.adapter_type == "full_adapter_xl" else "Stable Diffusion 1"


def kind_of(network: ControlNet, name: str | None, path: Path) -> int:
    """The number of a union model's kind of picture; of others 0. Raises UserError for a name it has not."""
    if not isinstance(network, ControlNetUnion):
        if name is not None:
            raise UserError(f"control type {name} is of union models, and {path} is none: leave it out")
        return 0
    known = TYPES[: network.config.num_control_type]
    if name is None:
        raise UserError(
            f"{path} is a union model: say what the picture is by type, one of {', '.join(known)}"
        )
    if name.isdecimal() and int(name) < network.config.num_control_type:
        return int(name)
    names = {squash(each): k for k, each in enumerate(known)}
    names |= {squash(alias): names[each] for alias, each in ALIASES.items() if each in names}
    if squash(name) not in names:
        raise unknown(f"control type of {path}:", name, known)
    return names[squash(name)]
