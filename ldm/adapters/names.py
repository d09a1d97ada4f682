"""Names in adapter files: what can stand for a tensor's role, and what for a layer.

A tensor's name is a stem, which says the layer, and an ending, which says the tensor's role there:

    unet.down_blocks.0.attentions.0...attn1.to_q . lora_A.weight          diffusers, peft
    base_model.model.down_blocks.0...attn1.to_q  . lora_A.default.weight  peft's own, with the adapter's name
    unet.down_blocks.0...attn1.processor.to_q    _ lora.down.weight       diffusers before 0.20
    lora_unet_down_blocks_0_attentions_0_..._to_q . lora_down.weight      kohya, LyCORIS
    lora_unet_input_blocks_1_1_..._to_q          . lora_down.weight       the same, of the original U-Net
    diffusion_model.input_blocks.1.1...norm1     . diff                   ComfyUI

kohya's underscores cannot be read backwards (`to_q`), so the names of layers are written from the modules and
looked up. In both tables order means nothing: no ending and no spelling can be read in two ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ldm.checkpoint import Parts
from ldm.checkpoint.keymap import unet_keys
from ldm.errors import UserError

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
ENCODERS = (TEXT, TEXT_2)
ADAPTABLE = (nn.Linear, nn.Conv2d)
SUMMED = (nn.GroupNorm, nn.LayerNorm, nn.Embedding)  # that only a difference can change

# What a tensor is called -> its role in the layer.
ROLES = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "up"),
    "lora_mid": "mid",
    **dict.fromkeys(("alpha", "lora.alpha", "lora_linear_layer.alpha"), "alpha"),
    "lora_magnitude_vector": "magnitude",
    "dora_scale": "dora_scale",
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **dict.fromkeys(("diff", "w_norm"), "diff"),
    **dict.fromkeys(("diff_b", "b_norm"), "diff_b"),
}
# The stem is as short as can be, so that the whole of `_lora.alpha` is the ending. peft puts the name of the
# adapter after its own.
_NAME = re.compile(
    rf"(?P<stem>.+?)(?:\.|_(?=lora\.))(?P<called>{'|'.join(map(re.escape, ROLES))})"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?P<end>\.weight|\.bias)?"
)
# Adapters that are not read, by what their tensors are called.
_OTHERS = {
    "GLoRA": r"a1|a2|b1|b2|bm|glora_\w+",
    "OFT or BOFT": r"oft_\w+|boft_\w+|rescale",
    "(IA)3": r"on_input|ia3_\w+",
    "AdaLoRA": r"lora_E|ranknum",
    "VeRA": r"vera_\w+",
    "a LoRA of token embeddings": r"lora_embedding_[AB]",
    "weights in place of the model's": r"set_weight|reshape_weight",
    "OneTrainer's words after the text encoder": r"clip_[lg]_out|string_to_param_out",
}
# OneTrainer and AUTOMATIC1111: a textual inversion within a LoRA's file.
_BUNDLED = re.compile(r"bundle_emb\.(.+)\.(string_to_param\.\*|clip_[lg])")

UNDERSCORED = {UNET: ("lora_unet_",), TEXT: ("lora_te_", "lora_te1_"), TEXT_2: ("lora_te2_",)}  # kohya's
# What can stand before a layer's name: diffusers' and kohya's, SimpleTuner's, ComfyUI's, that of checkpoints.
PREFIXES = {
    UNET: ("", "unet.", "lycoris_", "diffusion_model.", "model.diffusion_model.", *UNDERSCORED[UNET]),
    TEXT: (
        "text_encoder.",
        "text_encoders.clip_l.transformer.",
        "text_encoders.clip_h.transformer.",
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        *UNDERSCORED[TEXT],
    ),
    TEXT_2: ("text_encoder_2.", "text_encoders.clip_g.transformer.", *UNDERSCORED[TEXT_2]),
}
PEFT = "base_model.model."  # peft's own prefix, alone or after another: it says nothing of the part
OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Layer(NamedTuple):
    """A linear layer or convolution of a model."""

    part: str  # field of Parts
    path: str  # in the module

    def __str__(self) -> str:
        return f"{self.part}.{self.path}"


class Name(NamedTuple):
    """A tensor's name, taken apart."""

    stem: str
    role: str
    adapter: str | None = None  # what peft called it


def split_name(name: str) -> Name | None:
    """A tensor's name in an adapter file, None for one that no adapter has which is read here."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    role = ROLES[match["called"]]
    if match["end"] == ".bias":
        if role != "up":
            return None
        role = "up_bias"
    return Name(match["stem"], role, match["adapter"])


def split_word(name: str) -> tuple[str, str] | None:
    """(word, key in the file of a textual inversion) of a tensor that is bundled with a LoRA."""
    match = _BUNDLED.fullmatch(name)
    return None if match is None else (match[1], match[2])


def other_kind(names: Iterable[str]) -> str | None:
    """What an adapter is called that is known by these names, but not read."""
    for kind, called in _OTHERS.items():
        if any(re.search(rf"\.(?:{called})(?:\.[^.]+)*$", name) for name in names):
            return kind
    return None


def is_text(stem: str) -> bool:
    """Whether a stem speaks of a text encoder."""
    return stem.removeprefix(PEFT).startswith(("text_model", *PREFIXES[TEXT], *PREFIXES[TEXT_2]))


def list_layers(parts: Parts) -> dict[Layer, nn.Module]:
    """Every layer of the U-Net and the text encoders that an adapter can change."""
    modules = {name: getattr(parts, name) for name in (UNET, *ENCODERS)}
    return {
        Layer(part, path): module
        for part, whole in modules.items()
        if whole is not None
        for path, module in whole.named_modules()
        if isinstance(module, (*ADAPTABLE, *SUMMED)) and module.weight is not None
    }


def find_layers(parts: Parts, stems: Iterable[str]) -> dict[str, Layer]:
    """The layer that each stem means; those that mean none of this model are left out."""
    names = name_layers(parts)
    prefixes = [(part, prefix) for part in names for prefix in _prefixes(part, parts)]
    found = {}
    for stem in stems:
        for part, prefix in prefixes:
            if stem.startswith(prefix):
                layer = names[part].get(stem.removeprefix(prefix).removeprefix(PEFT))
                if layer is not None:
                    found[stem] = layer
    return found


def name_layers(parts: Parts) -> dict[str, dict[str, Layer]]:
    """By part, every name that a layer of this model can have, with dots and with underscores."""
    layers = list_layers(parts)
    named: dict[str, dict[str, Layer]] = {layer.part: {} for layer in layers}
    original = _original_names(parts, [layer.path for layer in layers if layer.part == UNET])
    for layer in layers:
        unet = layer.part == UNET
        for name in _unet_names(layer.path, original.get(layer.path)) if unet else _text_names(layer.path):
            named[layer.part] |= {name: layer, name.replace(".", "_"): layer}
    return named


def _prefixes(part: str, parts: Parts) -> Iterator[str]:
    yield from PREFIXES[part]
    if part != UNET and None in (parts.text_encoder, parts.text_encoder_2):
        yield PEFT  # of two text encoders it cannot say which
        if part == TEXT_2:  # the refiner's only one is the first to those who count
            yield from PREFIXES[TEXT]


def _original_names(parts: Parts, paths: list[str]) -> dict[str, str]:
    """The U-Net's layers in the original layout; none for a U-Net that it has no names for."""
    try:
        keys = unet_keys(parts.unet.config, [f"{path}.weight" for path in paths])
    except UserError:
        return {}
    return {path: key.original.removesuffix(".weight") for path, key in zip(paths, keys, strict=True)}


def _unet_names(path: str, original: str | None) -> Iterator[str]:
    short = path.removesuffix(".0") if path.endswith("to_out.0") else path
    before, _, last = short.rpartition(".")
    yield path
    if last in OLD_ATTENTION:  # to_out.0 was to_out
        yield short
        yield f"{before}.processor.{last}"
    if original is not None:
        yield original


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
