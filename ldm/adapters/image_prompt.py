"""IP-Adapters: files that let cross-attention read a picture beside the text, beside a U-Net and not in it.

Ye et al. 2023, "IP-Adapter", equation 5: ``attend(q, k, v) + scale attend(q, k', v')``, where k' and v' are
an adapter's own projections of the picture's tokens, for each layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.adapters.lora import family_of
from ldm.adapters.projections import Projection, as_published, projection_for, renamed
from ldm.checkpoint.fill import check_names, fill, unfilled, widen
from ldm.checkpoint.hub import IMAGE_ENCODER, adapter_file
from ldm.checkpoint.io import PICKLES, read_bytes, read_tensors, suffix_of, write_tensors
from ldm.checkpoint.pickles import check_whole, read_pickle
from ldm.checkpoint.source import find_adapter
from ldm.errors import UserError, abbreviate
from ldm.files import sha256
from ldm.models import UNet
from ldm.models.attention import Attention, split_heads
from ldm.request.uses import BlockScales, ImagePromptUse
from ldm.runtime import Runtime

PROJECTION, LAYERS = "image_proj.", "ip_adapter."
# What else these are called: by the script that most were trained with, and within a U-Net of diffusers.
SPELLINGS = {
    "image_proj_model.": PROJECTION,
    "adapter_modules.": LAYERS,
    "encoder_hid_proj.image_projection_layers.0.": PROJECTION,
}
WITHIN = re.compile(r"(.+)\.processor\.to_(k|v)_ip\.0\.weight")
FACE_ID = (
    "reads the numbers of a face recogniser (FaceID), which is not supported: give a plain, plus, plus-face "
    "or full-face adapter"
)


class Layer(NamedTuple):
    """One that attends to the text: its number in published files, its name in the U-Net, and widths."""

    number: str
    name: str
    channels: int
    dim: int  # of the text


def cross_layers(unet: UNet) -> tuple[Layer, ...]:
    """Those of a U-Net. Their numbers count all attentions in diffusers' order: way down, way up, middle."""
    blocks = [unet.down_blocks, unet.up_blocks, *([] if unet.mid_block is None else [unet.mid_block])]
    layers = [each for block in blocks for each in block.modules() if isinstance(each, Attention)]
    return tuple(
        Layer(str(k), each.name, each.to_q.out_features, each.to_k.in_features)
        for k, each in enumerate(layers)
        if each.name.endswith("attn2")
    )


class KeysAndValues(nn.Module):
    """A layer's own: [B, K, D] image tokens -> keys and values [B, K, C]."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(dim, channels, bias=False)
        self.to_v_ip = nn.Linear(dim, channels, bias=False)


class ImageAdapter(nn.Module):
    """The weights of an IP-Adapter for one U-Net's shape; those of its layers have the names of the files."""

    def __init__(self, projection: Projection, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.image_proj = projection
        self.numbers = {layer.name: layer.number for layer in layers}
        self.ip_adapter = nn.ModuleDict(
            {layer.number: KeysAndValues(layer.dim, layer.channels) for layer in layers}
        )

    def keys_and_values(self, layer: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, D] -> [B, heads, K, d] each, in the dtype of the tokens."""
        own: Any = self.ip_adapter[self.numbers[layer.name]]
        k, v = (F.linear(tokens, to.weight.to(tokens.dtype)) for to in (own.to_k_ip, own.to_v_ip))
        return split_heads(k, layer.heads), split_heads(v, layer.heads)

    def begin_as(self, unet: UNet) -> None:
        """Have each layer the keys and values that the U-Net makes of the text."""
        for layer in unet.modules():
            if isinstance(layer, Attention) and layer.name in self.numbers:
                own: Any = self.ip_adapter[self.numbers[layer.name]]
                own.to_k_ip.weight.data.copy_(layer.to_k.weight)
                own.to_v_ip.weight.data.copy_(layer.to_v.weight)

    def save(self, path: Path, dtype: torch.dtype | None = None) -> None:
        """A .safetensors file that diffusers reads, of a plain adapter."""
        projection = as_published(self.image_proj.state_dict())
        tensors = {PROJECTION + name: tensor for name, tensor in projection.items()}
        tensors |= {LAYERS + name: tensor for name, tensor in self.ip_adapter.state_dict().items()}
        write_tensors(path, tensors, dtype)


@dataclass(frozen=True, eq=False)
class ImagePromptFile:
    """An IP-Adapter ready for a model: which file it was, how strongly it acts, and what encodes pictures."""

    name: str  # as it was given: a path or a hub name
    path: Path
    sha256: str
    network: ImageAdapter
    scale: float | BlockScales = 1.0
    encoder: Path | None = None  # a folder, if one was given
    weight_name: str | None = None

    @property
    def use(self) -> ImagePromptUse:
        """As requests name it."""
        folder = None if self.encoder is None else str(self.encoder)
        return ImagePromptUse(
            adapter=self.name, scale=self.scale, weight_name=self.weight_name, image_encoder=folder
        )

    @property
    def encoders(self) -> list[Path]:
        """Where its image encoder may lie: that which was given, or beside the file, as it is published."""
        if self.encoder is not None:
            return [self.encoder]
        folder = self.path.parent
        return [folder / IMAGE_ENCODER, folder.parent / "models" / IMAGE_ENCODER]


# --- reading ---------------------------------------------------------------------------------------------


def read_image_prompt(
    what: str | Path,
    unet: UNet,
    runtime: Runtime,
    weight_name: str | None = None,
    scale: float | BlockScales = 1.0,
    encoder: str | Path | None = None,
) -> ImagePromptFile:
    """An IP-Adapter, from a file, a folder or the hub, for that U-Net.

    Args:
        weight_name: of several files of a folder or hub name, the one that is meant.
        encoder: the folder of its image encoder, where it is not beside the file.

    Raises:
        UserError: if it is missing, damaged, no IP-Adapter, or made for another family: says which and why.
    """
    path = find_adapter(what, weight_name, encoder=encoder is None)
    if path.is_dir():
        files = [each.relative_to(path).as_posix() for each in sorted(path.rglob("*")) if each.is_file()]
        path = path / adapter_file(files, str(path))
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of an IP-Adapter, or its hub name")
    state = path.stat()
    network = _built(
        path, state.st_mtime_ns, state.st_size, cross_layers(unet), runtime.device, runtime.dtype
    )
    folder = None if encoder is None else Path(encoder).expanduser()
    return ImagePromptFile(str(what), path, sha256(path), network, scale, folder, weight_name)


@lru_cache(maxsize=2)
def _built(
    path: Path, _mtime_ns: int, _size: int, layers: Sequence[Layer], device: torch.device, dtype: torch.dtype
) -> ImageAdapter:
    """The adapter in a file. Read again only if it has changed."""
    tensors = _numbered(_read(path), layers, path)
    network = _shaped(tensors, layers, path)
    check_names(network.state_dict(), tensors, path, has_config=False)
    return fill(network, tensors, path, dtype).to(device).requires_grad_(False).eval()


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of the file by the names of safetensors: those of pickles lie in dicts by part."""
    start = read_bytes(path, limit=9)
    if suffix_of(path) not in PICKLES or not start or start[8:9] == b"{":
        return {name: widen(tensor) for name, tensor in read_tensors(path).items()}
    found = dict(_named(read_pickle(path)))
    for name, tensor in found.items():
        check_whole(name, tensor, path)
    return {name: widen(tensor.detach()) for name, tensor in found.items()}


def _named(content: object, before: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            yield f"{before}{name}", value
        elif before.count(".") < 2:  # no deeper than files are
            yield from _named(value, f"{before}{name}.")


def _numbered(tensors: Mapping[str, Tensor], own: Sequence[Layer], path: Path) -> dict[str, Tensor]:
    """The tensors in our names: the projection's as diffusers has them, the layers' by number.

    Raises UserError for a file that is no IP-Adapter, or one of a kind that is not read.
    """
    numbers = {layer.name: layer.number for layer in own}
    projection, layers = dict[str, Tensor](), dict[str, Tensor]()
    strange = list[str]()
    for given, tensor in tensors.items():
        before = next((each for each in SPELLINGS if given.startswith(each)), "")
        name = SPELLINGS.get(before, "") + given.removeprefix(before)
        if (match := WITHIN.fullmatch(name)) and match[1] in numbers:
            name = f"{LAYERS}{numbers[match[1]]}.to_{match[2]}_ip.weight"
        if name.startswith(PROJECTION):
            projection[name.removeprefix(PROJECTION)] = tensor
        elif name.startswith(LAYERS):
            layers[name] = tensor
        else:
            strange.append(given)
    if strange or not layers:
        found = abbreviate(strange or [*tensors]) or "nothing"
        raise UserError(
            f"{path}: no IP-Adapter, whose tensors are image_proj.* and ip_adapter.*: it has {found}"
        )
    if not projection:
        raise UserError(
            f"{path}: has no image projection (image_proj.*), without which no picture can be read: "
            "fetch the whole file again"
        )
    if any("lora" in name for name in layers) or any("perceiver" in name for name in projection):
        raise UserError(f"{path}: {FACE_ID}")
    if "norm.weight" in projection and "proj.0.weight" in projection and "proj.3.weight" not in projection:
        raise UserError(f"{path}: {FACE_ID}")
    return layers | {PROJECTION + name: tensor for name, tensor in renamed(projection).items()}


def _shaped(tensors: Mapping[str, Tensor], layers: Sequence[Layer], path: Path) -> ImageAdapter:
    """An adapter for a U-Net of these layers, without numbers. Raises UserError for another family's."""
    if not layers:
        raise UserError(f"{path}: this model's U-Net attends to no text, so no IP-Adapter is for it")
    dim = layers[0].dim
    width = next(each.shape[-1] for name, each in tensors.items() if name.endswith("_ip.weight"))
    if width != dim:
        raise UserError(
            f"{path}: made for {family_of(width)}; this model is {family_of(dim)}.\n"
            "An IP-Adapter works only with the family that it was trained on."
        )
    own = {name.removeprefix(PROJECTION): t for name, t in tensors.items() if name.startswith(PROJECTION)}
    with unfilled():
        projection = projection_for(own, dim)
        if projection is None:
            raise UserError(f"{path}: an image projection of no kind that is known: {abbreviate([*own])}")
        return ImageAdapter(projection, layers)
