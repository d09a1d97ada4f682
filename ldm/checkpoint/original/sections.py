"""A single file's tensors sorted by the part of the model that they belong to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ldm.checkpoint.io import read_metadata, read_tensors
from ldm.checkpoint.original.shapes import Tensors
from ldm.errors import UserError

UNET, VAE, AVERAGED = "model.diffusion_model.", "first_stage_model.", "model_ema."
# Where each family has its text encoders.
TEXT = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "x4_upscaler": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl_refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
# A tensor that each part has, by its names.
CLIP_FIRST = ("text_model.embeddings.token_embedding.weight", "token_embedding.weight")
FIRST = {
    "unet": ("input_blocks.0.0.weight",),
    "vae": ("encoder.conv_in.weight",),
    "text_encoder": CLIP_FIRST,
    "text_encoder_2": CLIP_FIRST,
}
# Files of 2022, and again those of transformers from 5.6 on, lack `text_model.` in the names of CLIP.
OLD_CLIP = re.compile(r"(?<=^cond_stage_model\.transformer\.)(?=embeddings|encoder|final_layer_norm)")
BARE_CLIP = re.compile(r"^(embeddings|encoder\.layers|final_layer_norm)(?=\.)")

# What the names of a U-Net's tensors are made of.
WORDS_OF_UNET = re.compile(
    r"(?:input|output|middle|transformer)_blocks?|(?:time_embed|label_emb)|cond_proj|(?:in|out|emb)_layers|"
    r"skip_connection|attn\d|to_out|to_[qkv]|proj_in|proj_out|norm\d?|weight|bias|proj|conv|net|out|ff|op|\d+|"
    r"[^.\d]+"
)

# What else a file may be: a tensor's name, and what to say.
OTHERS = {
    r"lora_(unet|te\d?|A|B|down|up)[_.]|\.lora[._]|hada_w1|lokr_w|\.dora_scale": "a LoRA, not a model: give "
    "it with --lora, beside a model",
    r"^(emb_params|string_to_param.*|clip_[lg]|<.*>)$": "a textual inversion, not a model: give it with "
    "--embedding, beside a model",
    r"^control_model\.|^controlnet_|^lllite_unet": "a ControlNet, not a model: give it with "
    "--control, beside a model",
    r"^noise_augmentor\.": "an unCLIP model, which is not supported",
    r"^(model\.diffusion_model\.)?joint_blocks\.": "Stable Diffusion 3, which is not supported",
    r"^(model\.diffusion_model\.)?double_blocks\.": "Flux, which is not supported",
    r"^edm_(mean|vpred)": "of the EDM formulation (Playground 2.5, CosXL), which is not supported",
}


@dataclass(frozen=True)
class Single:
    """A single file, sorted."""

    path: Path
    family: str  # a key of TEXT
    sections: Mapping[str, Tensors]  # by part, names without the part's prefix
    loose: Tensors  # in no part
    metadata: Mapping[str, str]
    notes: tuple[str, ...]  # what was chosen without being asked


def open_single(path: Path, ema: bool | None = None) -> Single:
    """Read a file and sort its tensors; with the averaged weights of the U-Net if `ema`.

    Raises:
        UserError: if the file cannot be read or is something else than a model.
    """
    stored = {OLD_CLIP.sub("text_model.", name): t for name, t in read_tensors(path).items()}
    refuse_others(stored, path)
    tensors, notes = _choose_average(stored, ema, path)
    family = family_of(tensors)
    sections: dict[str, dict[str, Tensor]] = {}
    loose = {}
    for name, tensor in tensors.items():
        for part, prefix in prefixes(family).items():
            if name.startswith(prefix):
                sections.setdefault(part, {})[name.removeprefix(prefix)] = tensor
                break
        else:
            loose[name] = tensor
    return Single(path, family, sections, loose, read_metadata(path), notes)


def prefixes(family: str) -> dict[str, str]:
    """Where a family's parts lie in its files."""
    return {"unet": UNET, "vae": VAE, **TEXT[family]}


def section_of(part: str, tensors: Tensors, path: Path) -> tuple[str, Tensors]:
    """The prefix and the tensors of one part, in a whole model's file or in one of its own.

    Raises:
        UserError: if it is not there.
    """
    inside = {"unet": [UNET], "vae": [VAE]}.get(part) or [
        places[part] for places in TEXT.values() if part in places
    ]
    if part in TEXT["sdxl"]:
        tensors = {BARE_CLIP.sub(r"text_model.\1", name): tensor for name, tensor in tensors.items()}
    for prefix in (*dict.fromkeys(inside), ""):
        if any(prefix + name in tensors for name in FIRST[part]):
            found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            return prefix, found
    refuse_adapters(tensors, path)
    few = ", ".join(itertools.islice(tensors, 2)) or "nothing"
    raise UserError(f"{path}: no {part} in it; it holds {few}")


def refuse_others(tensors: Tensors, path: Path) -> None:
    """Raises UserError for a file that is something else than a model, saying what to do with it."""
    refuse_adapters(tensors, path)
    if any(name.startswith((UNET, AVERAGED, VAE, "cond_stage_model.", "conditioner.")) for name in tensors):
        return
    if any(name.startswith(("down_blocks.", "encoder.", "text_model.", "input_blocks.")) for name in tensors):
        raise UserError(
            f"{path}: one part of a model, not a whole one: give it with --unet, --vae or --text-encoder "
            "beside a model, or give the pipeline folder that it belongs to"
        )
    few = ", ".join(itertools.islice(tensors, 2)) or "nothing"
    raise UserError(f"{path}: not a Stable Diffusion checkpoint; it holds {few}")


def refuse_adapters(tensors: Tensors, path: Path) -> None:
    """Raises UserError for a file of a kind in OTHERS."""
    for name, (pattern, what) in itertools.product(tensors, OTHERS.items()):
        if re.search(pattern, name):
            raise UserError(f"{path}: this is {what}")


def family_of(tensors: Tensors) -> str:
    """The family, from the text encoders in the file, or else from the U-Net."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    if has(TEXT["sdxl"]["text_encoder"]) or has(TEXT["sdxl"]["text_encoder_2"]):
        return "sdxl"
    if has(TEXT["sdxl_refiner"]["text_encoder_2"]):
        return "sdxl_refiner"
    if f"{UNET}label_emb.weight" in tensors:
        return "x4_upscaler"
    if f"{UNET}label_emb.0.0.weight" in tensors:
        widths = (t.shape[-1] for name, t in tensors.items() if name.endswith("attn2.to_k.weight"))
        return "sdxl_refiner" if next(widths, None) == 1280 else "sdxl"
    for family in ("sd1", "sd2"):
        if has(TEXT[family]["text_encoder"]):
            return family
    # Only SD 2 has linear layers there, SD 1 convolutions.
    enters = re.compile(rf"{re.escape(UNET)}.*\.proj_in\.weight")
    ranks = (tensor.ndim for name, tensor in tensors.items() if enters.fullmatch(name))
    return "sd2" if next(ranks, None) == 2 else "sd1"


def _choose_average(tensors: Tensors, ema: bool | None, path: Path) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors, with the U-Net's averages under the plain names if they are wanted; and what to say."""
    plain = [name for name in tensors if name.startswith(UNET)]
    only = not plain and any(name.startswith(AVERAGED + "diffusion_model") for name in tensors)
    if only and ema is False:
        raise UserError(f"{path}: holds averaged weights (EMA) only; leave --no-ema out")
    if only:
        found = {_plain_name(name): name for name in tensors if name.startswith(AVERAGED + "diffusion_model")}
        line = "holds averaged (EMA) weights only: they are taken"
        return _in_place_of_plain(tensors, found), (line,)
    # CompVis's LitEma keeps them under the plain names without dots.
    averaged = {name: AVERAGED + name.removeprefix("model.").replace(".", "") for name in plain}
    missing = [average for average in averaged.values() if average not in tensors]
    if len(missing) == len(averaged):
        if ema:
            raise UserError(f"{path}: holds no averaged weights (EMA); leave --ema out")
        return tensors, ()
    if not ema:
        line = (
            "holds plain and averaged (EMA) weights: the plain ones are taken, as in other programs "
            "(--ema takes the averaged ones; --no-ema silences this)"
        )
        return tensors, () if ema is False else (line,)
    if missing:
        raise UserError(f"{path}: {len(missing)} averaged weights are missing: use --no-ema")
    line = f"{len(averaged)} averaged (EMA) weights are taken in place of the plain ones"
    return _in_place_of_plain(tensors, averaged), (line,)


def _in_place_of_plain(tensors: Tensors, averaged: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors, those named by `averaged` under their plain names: plain name -> name in the file."""
    used = {*averaged.values()}
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    return {**rest, **{name: tensors[average] for name, average in averaged.items()}}


def _plain_name(average: str) -> str:
    """input_blocks41proj_inweight, after a prefix, to model.diffusion_model.input_blocks.4.1.proj_in.weight.

    LitEma leaves the dots out. A name that is not a U-Net's comes out as no tensor's of one, and is refused.
    """
    text = average.removeprefix(AVERAGED + "diffusion_model")
    text = re.sub(r"^(input_blocks|output_blocks)(\d+)(\d)", r"\1.\2.\3.", text)
    text = re.sub(r"^label_emb(\d)(\d)", r"label_emb.\1.\2.", text)
    return UNET + ".".join(WORDS_OF_UNET.findall(text))
