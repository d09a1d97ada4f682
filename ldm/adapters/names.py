"""Names in adapter files: one table of spellings, made from the model's own module names.

A tensor's name is a stem, which says the layer, and an ending, which says the tensor's role there:

    unet.down_blocks.0.attentions.0...attn1.to_q . lora_A.weight        diffusers, peft
    unet.down_blocks.0...attn1.processor.to_q    _ lora.down.weight     diffusers before 0.20
    lora_unet_down_blocks_0_attentions_0_..._to_q . lora_down.weight    kohya, LyCORIS
    lora_unet_input_blocks_1_1_..._to_q          . lora_down.weight     the same, of the original U-Net (SDXL)

kohya's underscores cannot be read backwards (`to_q`), so stems are written from the modules and looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ldm.checkpoint import Parts
from ldm.checkpoint.keymap import unet_keys
from ldm.errors import UserError

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
ENCODERS = (TEXT, TEXT_2)
ADAPTABLE = (nn.Linear, nn.Conv2d)

ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    "_lora.alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "dora_scale",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
# Before a module's name with dots, and before the same with underscores.
DOTTED = {UNET: ("unet.", ""), TEXT: ("text_encoder.",), TEXT_2: ("text_encoder_2.",)}
UNDERSCORED = {UNET: ("lora_unet_",), TEXT: ("lora_te_", "lora_te1_"), TEXT_2: ("lora_te2_",)}
PEFT = "base_model.model."  # peft's own prefix: it says nothing of the part
OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Layer(NamedTuple):
    """A linear layer or convolution of a model."""

    part: str  # field of Parts
    path: str  # in the module

    def __str__(self) -> str:
        return f"{self.part}.{self.path}"


def split_name(name: str) -> tuple[str, str] | None:
    """(stem, role) of a tensor in an adapter file, None for an ending that no adapter has."""
    for ending, role in ROLES.items():
        if name.endswith(ending):
            return name.removesuffix(ending), role
    return None


def is_text(stem: str) -> bool:
    """Whether a stem speaks of a text encoder."""
    return stem.startswith(("text_encoder", "lora_te", f"{PEFT}text_model", "text_model"))


def list_layers(parts: Parts) -> dict[Layer, nn.Module]:
    """Every layer of the U-Net and the text encoders that an adapter can change."""
    modules = {name: getattr(parts, name) for name in (UNET, *ENCODERS)}
    return {
        Layer(part, path): module
        for part, whole in modules.items()
        if whole is not None
        for path, module in whole.named_modules()
        if isinstance(module, ADAPTABLE)
    }


def spell_layers(parts: Parts) -> dict[str, Layer]:
    """Every stem that a file may use for a layer of this model -> that layer."""
    spelt: dict[str, Layer] = {}
    layers = list_layers(parts)
    original = _original_names(parts, [layer.path for layer in layers if layer.part == UNET])
    for layer in layers:
        names = _text_names(layer.path)
        if layer.part == UNET:
            names = _unet_names(layer.path, original.get(layer.path))
        # peft's prefix means the one model that was trained: of two text encoders it cannot say which.
        one = layer.part == UNET or None in (parts.text_encoder, parts.text_encoder_2)
        for name in names:
            for prefix in (*DOTTED[layer.part], *(PEFT,) * one, f"{layer.part}.{PEFT}"):
                spelt.setdefault(prefix + name, layer)
            for prefix in UNDERSCORED[layer.part]:
                spelt.setdefault(prefix + name.replace(".", "_"), layer)
    return spelt


def _original_names(parts: Parts, paths: list[str]) -> dict[str, str]:
    """The U-Net's layers in the original layout; none for a U-Net that it has no names for."""
    try:
        keys = unet_keys(parts.unet.config, [f"{path}.weight" for path in paths])
    except UserError:
        return {}
    return {path: key.original.removesuffix(".weight") for path, key in zip(paths, keys, strict=True)}


def _unet_names(path: str, original: str | None) -> Iterator[str]:
    yield path
    before, _, last = path.removesuffix(".0").rpartition(".")
    if last in OLD_ATTENTION:  # to_out.0 was to_out
        yield f"{before}.processor.{last}"
    if original is not None:
        yield original
        yield f"diffusion_model.{original}"


def _text_names(path: str) -> Iterator[str]:
    """With and without `text_model.`, which transformers wrote until 5.6."""
    short = path.removeprefix("text_model.")
    names = [short]
    before, _, last = short.rpartition(".")
    names += [f"{before}.{old}" for old, new in OLD_ATTENTION.items() if new == last]
    for name in names:
        yield name
        yield f"text_model.{name}"


def width_of_text(parts: Parts) -> int:
    """Channels of the text that the U-Net's cross-attention takes: what tells the families apart."""
    width: Any = parts.unet.config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])
