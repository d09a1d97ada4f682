"""Areas of a picture with prompts of their own: a branch for each, mixed by masks.

At each noise level the network is asked for the whole picture under every prompt, and its answers are mixed
by how much of each place is whose: Bar-Tal et al. 2023, "MultiDiffusion: Fusing Diffusion Paths for
Controlled Image Generation", equation 5, with a mask in the place of a window. At one x and sigma x0 is
linear in raw outputs, so these are mixed, and any guidance takes the mixture for the condition's answer.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion.guidance import Predict, text_of
from ldm.errors import UserError
from ldm.images.fitting import fit_mask, read_file
from ldm.images.masks import feathered
from ldm.images.opening import to_mask
from ldm.pipeline.inputs import Inputs
from ldm.request import Region, Request

# What a request has no use for beside regions.
UNUSED = ("target_prompt", "padding_mask_crop")


def resolved(request: Request) -> tuple[Region, ...] | None:
    """The regions of a request whose size is known: boxes in shares, masks with the SHA-256 of their files.

    Raises UserError for one that goes beyond the picture, a file that is no picture, and what cannot be
    beside regions.
    """
    for name in UNUSED:
        if getattr(request, name) is not None:
            raise UserError(f"regions are not allowed beside {name}: draw the picture with them first")
    found = []
    for each in request.regions or ():
        if each.mask is not None:
            each = each.replace(mask_sha256=read_file(each.mask, each.mask_sha256, to_mask)[1])
        found.append(each.share(request.size))
    return tuple(found)


def areas_of(request: Request, inputs: Inputs, factor: int) -> Tensor | None:
    """How much of each latent is the prompt's, and each region's, of a resolved request: [K + 1, 1, h, w].

    They sum to 1. Edges are softened by one latent; where regions overlap, weights decide; what strengths
    leave, and no region covers, is the prompt's. None for a request without regions. Raises UserError.
    """
    if not request.regions:
        return None
    if inputs.prompt_embeds is not None:
        raise UserError("regions are texts: give the prompt as a text beside them, not as prompt_embeds")
    masks = []
    for each in request.regions:
        soft = feathered(_mask(each, request.size), factor)
        masks.append(fit_mask(soft, (request.size[0] // factor, request.size[1] // factor), soft=True)[0])
    covered = torch.stack([mask * each.strength for mask, each in zip(masks, request.regions, strict=True)])
    if not bool((torch.stack(masks).flatten(1) > 0).any(1).all()):
        raise UserError("a region covers nothing: give it a larger box, or a mask with white in it")
    taken = covered.sum(0).clamp(max=1)
    pulls = covered * torch.tensor([each.weight for each in request.regions])[:, None, None, None]
    total = pulls.sum(0)
    return torch.cat([1 - taken[None], torch.where(total > 0, taken * pulls / total, 0.0)])


def _mask(region: Region, size: tuple[int, int]) -> Image.Image:
    """A region of a picture of (height, width) pixels, white on black."""
    if region.mask is not None:
        mask, _ = read_file(region.mask, region.mask_sha256, to_mask)
        return mask.convert("L").resize(size[::-1], Image.Resampling.LANCZOS)
    assert region.box is not None
    x, y, width, height = region.box
    sides = size[1], size[0], size[1], size[0]
    left, top, right, bottom = (
        round(at * side) for at, side in zip((x, y, x + width, y + height), sides, strict=True)
    )
    mask = Image.new("L", size[::-1], 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def regional(predict: Predict, areas: Tensor) -> Predict:
    """`predict` with a branch "cond" that is mixed: of itself and "region_0", ..., by `areas_of`'s shares.

    So is what is answered in another way, such as "cond:pag", of "cond:pag", "region_0:pag", ...

    What has no share anywhere is not asked for, so that one region over the whole picture is a plain drawing
    of its prompt.
    """
    names = ("cond", *(f"region_{k}" for k in range(len(areas) - 1)))
    parts = {name: share for name, share in zip(names, areas, strict=True) if bool((share > 0).any())}

    def call(x: Tensor, sigma: Tensor, asked: tuple[str, ...]) -> dict[str, Tensor]:
        instead = {
            name: [f"{part}{name.removeprefix('cond')}" for part in parts]
            for name in asked
            if text_of(name) == "cond"
        }
        outputs = predict(x, sigma, tuple(each for name in asked for each in instead.get(name, [name])))
        for name, branches in instead.items():
            answers = [outputs[branch] for branch in branches]
            shared = [share * answer for share, answer in zip(parts.values(), answers, strict=True)]
            outputs[name] = answers[0] if len(answers) == 1 else torch.stack(shared).sum(0)
        return {name: outputs[name] for name in asked}

    return call
