"""Pictures as prompts: from what a request says of IP-Adapters to what cross-attention reads in a drawing.

An adapter's weights stay outside of the U-Net: an `Attending` adds what it makes of the picture's tokens,
which are a field of `Conditioning`, to what attention makes of the text (`ldm.adapters.image_prompt`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.adapters.image_prompt import ImageAdapter, ImagePromptFile, Layer, cross_layers, read_image_prompt
from ldm.checkpoint.beside.image_encoder import ImageEncoder
from ldm.errors import UserError, printable
from ldm.files import check_drawn_with
from ldm.images.fitting import OneInMemory, fit_mask, read_file
from ldm.images.opening import to_mask
from ldm.images.pixels import to_pil
from ldm.models import UNet
from ldm.models.attention import Attend, Site, attend
from ldm.models.conditioning import Conditioning
from ldm.pipeline.inputs import IMAGE_PROMPTS, Inputs
from ldm.pipeline.model import Model
from ldm.pipeline.networks import Attending
from ldm.request import ImagePromptUse, Request
from ldm.request.uses import BlockScales
from ldm.runtime import finite


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter of a drawing and what it is shown."""

    file: ImagePromptFile
    use: ImagePromptUse  # with the SHA-256 of all its files
    scales: Mapping[str, float]  # by the names of layers
    encoder: ImageEncoder | None  # None: embeddings are given
    images: Sequence[OneInMemory] = ()
    masks: Sequence[OneInMemory] = ()
    embeds: Tensor | None = None  # [1 or 2 (without, with), n, E] or of states [1 or 2, n, P, E]


@dataclass(frozen=True, eq=False)
class Shown:
    """Some of a drawing's image tokens, as the layers of one adapter read them."""

    network: ImageAdapter
    scales: Mapping[str, float]
    rows: slice  # of all tokens
    mask: Tensor | None  # [1, 1, H, W]: where they act


@dataclass(frozen=True, eq=False)
class ImagePrompts:
    """The image prompts of a job: read and checked; pictures are encoded when they are first asked for."""

    model: Model
    parts: tuple[Part, ...]
    guided: bool  # whether what no picture says matters

    @property
    def uses(self) -> tuple[ImagePromptUse, ...]:
        """As a request notes them."""
        return tuple(part.use for part in self.parts)

    @cached_property
    def _made(self) -> list[tuple[Tensor, Tensor]]:
        """For each part the tokens with its pictures, and those without any: [n, N, D] each, fp32."""
        return [self._tokens(part) for part in self.parts]

    def tell(self, cond: Conditioning, uncond: Conditioning) -> tuple[Conditioning, Conditioning]:
        """What texts say, with the tokens of all pictures, [.., K, D] in one row below the other."""
        both = [
            torch.cat([tokens.flatten(0, 1) for tokens in each]) for each in zip(*self._made, strict=True)
        ]
        first, second = (
            tokens.expand(len(to), -1, -1) for tokens, to in zip(both, (cond, uncond), strict=True)
        )
        return replace(cond, image_tokens=first), replace(uncond, image_tokens=second)

    def _tokens(self, part: Part) -> tuple[Tensor, Tensor]:
        """With the pictures of a part, and without; zeros of the encoder, or of the picture, as diffusers."""
        seen, unseen = self._given(part) if part.encoder is None else self._encoded(part, part.encoder)
        project = part.file.network.image_proj
        weight = next(project.parameters())
        rows = torch.cat([seen, unseen]).to(weight.device, weight.dtype)
        what = f"the image projection of {part.file.path.name}"
        try:
            (tokens,) = finite(project, lambda project: (project(rows),), what)
        except FloatingPointError as error:
            raise UserError(str(error)) from None
        return tokens[: len(seen)], tokens[len(seen) :]

    def _encoded(self, part: Part, encoder: ImageEncoder) -> tuple[Tensor, Tensor]:
        """[n, E] embeddings or [n, P, E] states of pictures, and what stands for none: as many rows."""
        runtime, states = self.model.runtime, part.file.network.image_proj.reads_states
        pixels = encoder.prepared([_as_pil(image) for image in part.images])
        network = encoder.network(runtime.device, runtime.dtype, keep=not self.model.sleeps)
        if states:
            pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])])

        def call(network: Any) -> tuple[Tensor, ...]:
            weight = next(network.parameters())
            given = pixels.to(weight.device, weight.dtype)
            if states:
                return (network(pixel_values=given, output_hidden_states=True).hidden_states[-2],)
            return (network(pixel_values=given).image_embeds,)

        try:
            (seen,) = finite(network, call, f"the image encoder in {encoder.folder}")
        except FloatingPointError as error:
            raise UserError(str(error)) from None
        if states:
            return seen[:-1], seen[-1:].expand_as(seen[:-1])
        return seen, torch.zeros_like(seen)

    def _given(self, part: Part) -> tuple[Tensor, Tensor]:
        """The embeddings of the call; where they have no row without a picture, zeros."""
        assert part.embeds is not None
        embeds = part.embeds.float()
        if len(embeds) == 2:
            return embeds[1], embeds[0]
        if self.guided and part.file.network.image_proj.reads_states:
            raise UserError(
                "ip_adapter_image_embeds has one row, and guidance needs two: first the states of a picture "
                "of zeros, then those of yours"
            )
        return embeds[0], torch.zeros_like(embeds[0])

    def attending(self, size: tuple[int, int], tiled: bool) -> tuple[Attending, ...]:
        """What is done in attention's place in pictures of (height, width); nothing where all scales are 0.

        Raises UserError for masks of pictures that are drawn in windows.
        """
        if tiled and any(part.masks for part in self.parts):
            raise UserError("image_prompts with masks is not allowed beside tile_size: leave either out")
        if not any(any(part.scales.values()) for part in self.parts):
            return ()
        masks = [[_fitted(mask, size, self.model.device) for mask in part.masks] for part in self.parts]

        def around(names: tuple[str, ...], cond: Conditioning, base: Attend) -> Attend:
            return base if cond.image_tokens is None else reading(self._shown(masks), cond.image_tokens, base)

        return (around,)

    def _shown(self, masks: Sequence[Sequence[Tensor]]) -> Iterator[Shown]:
        """Which of all tokens are read together: those of a part, or of each picture with its mask."""
        begin = 0
        for part, own, (tokens, _) in zip(self.parts, masks, self._made, strict=True):
            for k, mask in enumerate(own or (None,)):
                rows = tokens[k : k + 1] if len(own) > 1 else tokens
                end = begin + rows.shape[0] * rows.shape[1]
                yield Shown(part.file.network, part.scales, slice(begin, end), mask)
                begin = end


def reading(shown: Iterable[Shown], tokens: Tensor, base: Attend) -> Attend:
    """`base`, and where it is of the text what image tokens [B, K, D] add to it: each with scale and mask.

    Keys and values are made once for all calls that read these tokens.
    """
    every = tuple(shown)
    kept: dict[tuple[int, str, torch.dtype], tuple[Tensor, Tensor]] = {}
    masks: dict[tuple[int, tuple[int, int], torch.dtype], Tensor] = {}

    def both(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = base(site, q, k, v)
        for number, each in enumerate(every if site.cross else ()):
            scale = each.scales.get(site.layer.name, 0.0)
            if scale == 0:
                continue
            own, at = (number, site.layer.name, q.dtype), (number, site.size, q.dtype)
            if own not in kept:
                kept[own] = each.network.keys_and_values(site.layer, tokens[:, each.rows].to(q.dtype))
            seen = attend(q, *kept[own])
            if each.mask is not None:
                if at not in masks:
                    small = F.interpolate(each.mask, site.size, mode="bicubic")
                    masks[at] = small.to(q.dtype).flatten(2).mT
                seen = seen * masks[at]
            out = out + scale * seen
        return out

    return both


# --- what is asked ---------------------------------------------------------------------------------------


def read_image_prompts(model: Model, requests: Sequence[Request], inputs: Inputs) -> ImagePrompts | None:
    """The image prompts of requests, with adapters and pictures read; None where there are none.

    Raises:
        UserError: for a picture that is missing, or not the file that was drawn with; for an adapter, image
            encoder or scale that does not fit the model; and for what else cannot be.
    """
    first = requests[0]
    uses = first.image_prompts
    if uses is None:
        uses = tuple(file.use for file in model.adapted.image_prompts)
    given = [name for name in IMAGE_PROMPTS if getattr(inputs, name) is not None]
    if given and not uses:
        raise UserError(f"{given[0]} is for an IP-Adapter: give one (with_ip_adapter, --image-prompt)")
    if not uses:
        return None
    if first.target_prompt is not None:
        raise UserError("image_prompts is not allowed for an edit, which keeps to its own picture")
    parts = tuple(_part(model, use, inputs, k) for k, use in enumerate(uses))
    if first.padding_mask_crop is not None and any(part.masks for part in parts):
        raise UserError("masks of image_prompts are not allowed with padding_mask_crop: leave either out")
    guided = inputs.guidance is not None or first.guidance_scale is None or first.guidance_scale > 1
    return ImagePrompts(model, parts, guided)


def _part(model: Model, use: ImagePromptUse, inputs: Inputs, k: int) -> Part:
    """The k-th of a drawing's image prompts, read."""
    file = _file(model, use)
    images, embeds = _pick(inputs.ip_adapter_image, k), _pick(inputs.ip_adapter_image_embeds, k)
    masks, noted = _pick(inputs.ip_adapter_masks, k) or (), dict[str, Any](sha256=file.sha256)
    if use.images and images is None and embeds is None:
        read = [read_file(path, digest) for path, digest in _with(use.images, use.images_sha256)]
        images, noted["images_sha256"] = [image for image, _ in read], tuple(d for _, d in read)
    if use.masks:
        read = [read_file(path, digest, to_mask) for path, digest in _with(use.masks, use.masks_sha256)]
        masks, noted["masks_sha256"] = [mask for mask, _ in read], tuple(d for _, d in read)
    if not images and embeds is None:
        raise UserError(
            f"the IP-Adapter {printable(use.adapter)} has no picture: give one (ip_adapter_image, "
            "--image-prompt ADAPTER,image=FILE), or draw without it (pipe.base)"
        )
    scales, encoder = layer_scales(model.unet, use.scale), None
    if embeds is None:
        encoder = _encoder(file, use)
        noted["image_encoder_sha256"] = encoder.sha256
    else:
        _check_embeds(embeds, file)
    count = len(images) if embeds is None else embeds.shape[1]
    if len(masks) not in (0, 1, count):
        raise UserError(
            f"{len(masks)} masks for {count} pictures of {printable(use.adapter)}: give one, or one for each"
        )
    return Part(file, use.replace(**noted), scales, encoder, images or (), masks, embeds)


def _pick(several: Sequence[Any] | None, k: int) -> Any:
    """The k-th of what is given for each adapter. Raises UserError where there are fewer."""
    if several is None:
        return None
    if k >= len(several):
        raise UserError(f"{len(several)} ip_adapter inputs for more IP-Adapters: give one for each")
    return several[k]


def _with(paths: Sequence[str], digests: Sequence[str]) -> list[tuple[str, str | None]]:
    """Paths, each with the SHA-256 that it must have, if that is known."""
    return [(path, digests[k] if k < len(digests) else None) for k, path in enumerate(paths)]


def _file(model: Model, use: ImagePromptUse) -> ImagePromptFile:
    """The adapter that a request names: one of the model's, or read from where it says. Raises UserError."""
    held = (f for f in model.adapted.image_prompts if use.adapter in (f.name, f.path.stem))
    file = next(held, None)
    if file is None:
        file = read_image_prompt(use.adapter, model.unet, model.runtime, use.weight_name)
    check_drawn_with(file.path, "IP-Adapter", file.sha256, use.sha256, "--image-prompt")
    return file


def _encoder(file: ImagePromptFile, use: ImagePromptUse) -> ImageEncoder:
    """What encodes pictures for an adapter. Raises UserError where it is missing, or another one."""
    if use.image_encoder is not None:
        file = replace(file, encoder=Path(use.image_encoder).expanduser())
    project = file.network.image_proj
    places = [place for place in file.encoders if file.encoder or (place / "config.json").exists()]
    if not places:
        raise UserError(
            f"{file.path}: its image encoder is not there: give the folder of a CLIPVisionModelWithProjection"
            " (image_encoder=, --image-prompt ADAPTER,encoder=FOLDER,...)"
        )
    found = [ImageEncoder.find(place) for place in places]
    widths = [each.width if project.reads_states else each.projected for each in found]
    fitting = [each for each, width in zip(found, widths, strict=True) if width == project.width]
    if not fitting:
        what = "states" if project.reads_states else "embeddings"
        raise UserError(
            f"{places[0]} is not the image encoder of {file.path.name}, which reads {what} of "
            f"{project.width} channels: it has {widths[0]}; give the one that it was trained with "
            "(image_encoder=, encoder=)"
        )
    encoder = fitting[0]
    check_drawn_with(encoder.folder, "image encoder", encoder.sha256, use.image_encoder_sha256)
    return encoder


def _check_embeds(embeds: Tensor, file: ImagePromptFile) -> None:
    """Raise UserError for embeddings that an adapter cannot read."""
    project = file.network.image_proj
    axes = 4 if project.reads_states else 3
    if embeds.ndim != axes or len(embeds) not in (1, 2) or embeds.shape[-1] != project.width:
        shape = f"[2, pictures, {'patches, ' if project.reads_states else ''}{project.width}]"
        raise UserError(f"ip_adapter_image_embeds {list(embeds.shape)} is not allowed: give {shape}")
    if not bool(embeds.isfinite().all()):
        raise UserError("ip_adapter_image_embeds holds NaN or Inf")


def layer_scales(unet: UNet, scale: float | BlockScales) -> dict[str, float]:
    """How strongly an adapter acts in each layer of a U-Net, by its name. Raises UserError for no block."""
    layers = cross_layers(unet)
    if not isinstance(scale, tuple):
        return {layer.name: float(scale) for layer in layers}
    blocks: dict[str, set[int]] = {}  # by diffusers' short names: which transformers each has
    for layer in layers:
        block, k = _place(layer)
        blocks.setdefault(block, set()).add(k)
    asked = dict(scale)
    for name, values in scale:
        meant = [block for block in blocks if block == name or block.startswith(f"{name}.")]
        if not meant:
            raise UserError(f"scale of {printable(name)} is not allowed: this model has {', '.join(blocks)}")
        if any(len(values) not in (1, len(blocks[block])) for block in meant):
            raise UserError(
                f"scale of {name} has {len(values)} numbers for {len(blocks[meant[0]])} transformers: give "
                "one, or one for each"
            )
    found = {}
    for layer in layers:
        block, k = _place(layer)
        values = asked.get(block, asked.get(block.partition(".")[0], (0.0,)))
        found[layer.name] = values[k] if len(values) > 1 else values[0]
    return found


def _place(layer: Layer) -> tuple[str, int]:
    """The block of a layer as diffusers calls it for short, and the number of its transformer there."""
    parts = layer.name.split(".")
    if parts[0] == "mid_block":
        return "mid", int(parts[2])
    return f"{parts[0].removesuffix('_blocks')}.block_{parts[1]}", int(parts[3])


def _fitted(mask: OneInMemory, size: tuple[int, int], device: torch.device) -> Tensor:
    """[1, 1, H, W]: 1 where a picture acts. One that is given as a tensor keeps its greys."""
    return fit_mask(mask, size, soft=isinstance(mask, Tensor)).to(device)


def _as_pil(image: OneInMemory) -> Image.Image:
    return image if isinstance(image, Image.Image) else to_pil(image)[0]
