"""What disturbed branches do in attention's place (`ldm.diffusion.guidances.perturbed`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ldm.diffusion.guidance import Predict
from ldm.diffusion.guidances.part import Part
from ldm.diffusion.guidances.perturbed import (
    Disturbed,
    PerturbedAttention,
    SelfAttention,
    SkipLayer,
    SmoothedEnergy,
    blurred,
)
from ldm.errors import UserError
from ldm.models.attention import Attend, Site
from ldm.models.conditioning import Conditioning
from ldm.pipeline.model import Model
from ldm.pipeline.networks import Attending, is_compiled
from ldm.pipeline.steering.layers import attention_layers, probabilities
from ldm.request import Request

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"  # whose maps self-attention guidance reads


def check(parts: Sequence[Part], request: Request, model: Model) -> None:
    """Raise UserError for parts that cannot act in the drawing of a resolved request."""
    for part in parts:
        if not isinstance(part, Disturbed | SelfAttention):
            continue
        said = f"guidance {part.name} is not allowed"
        if is_compiled(model.unet):
            raise UserError(f"{said} with pipe.compiled(), which has no place for it: load anew")
        if isinstance(part, SelfAttention):
            attention_layers(model.unet, [MIDDLE], cross=False)
            for name in ("tile_size", "cache_interval", "regions"):
                if getattr(request, name) not in (None, 1):
                    raise UserError(f"{said} beside {name}: it reads the middle's attention in every step")
            continue
        layers = attention_layers(model.unet, part.names, cross=False)
        if not part.start < part.stop:
            raise UserError(f"{said} so: start {part.start:g} must be less than stop {part.stop:g}")
        finest = next((k for k, block in enumerate(model.unet.down_blocks) if block.attentions), 0)
        ups = len(model.unet.up_blocks) - 1 - finest
        merging = (f"down_blocks.{finest}.", f"up_blocks.{ups}.")
        if request.token_merging_ratio and any(name.startswith(merging) for name in layers):
            raise UserError(
                f"{said} at layers whose tokens token_merging_ratio merges: leave one of them out"
            )


def attending(part: Disturbed, model: Model) -> tuple[Attending, ...]:
    """For the branches with the part's ending."""
    layers = attention_layers(model.unet, part.names, cross=False)
    match part:
        case PerturbedAttention():
            return (Perturb(part.name, layers),)
        case SmoothedEnergy():
            return (Smooth(part.name, layers, part.sigma),)
        case SkipLayer():
            return (LeaveOut(part.name, layers),)
    raise TypeError(part)


def rows_of(names: tuple[str, ...], ending: str, count: int) -> list[slice]:
    """The rows, of `count`, of the branches with an ending."""
    each = count // len(names)
    return [slice(k * each, k * each + each) for k, name in enumerate(names) if name.endswith(f":{ending}")]


class Perturb:
    """Values alone are what self-attention of some layers gives."""

    def __init__(self, ending: str, layers: frozenset[str]) -> None:
        self.ending, self.layers = ending, layers

    def __call__(self, names: tuple[str, ...], cond: Conditioning, base: Attend) -> Attend:
        if not (rows := rows_of(names, self.ending, len(cond))):
            return base

        def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = base(site, q, k, v)
            if site.layer.name in self.layers:
                out = out.clone()
                for own in rows:
                    out[own] = v[own]
            return out

        return attend


class Smooth:
    """Queries of some layers are blurred, as a picture."""

    def __init__(self, ending: str, layers: frozenset[str], sigma: float) -> None:
        self.ending, self.layers, self.sigma = ending, layers, sigma

    def __call__(self, names: tuple[str, ...], cond: Conditioning, base: Attend) -> Attend:
        if not (rows := rows_of(names, self.ending, len(cond))):
            return base

        def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if site.layer.name in self.layers:
                q = q.clone()
                for own in rows:
                    picture = q[own].transpose(2, 3).flatten(1, 2)
                    smooth = blurred(picture.reshape(*picture.shape[:2], *site.size).float(), self.sigma)
                    q[own] = smooth.reshape_as(q[own].transpose(2, 3)).transpose(2, 3).to(q.dtype)
            return base(site, q, k, v)

        return attend


class LeaveOut:
    """Transformer blocks are left out: what comes in goes on."""

    def __init__(self, ending: str, layers: frozenset[str]) -> None:
        self.ending, self.blocks = ending, {name.rpartition(".")[0] for name in layers}

    def __call__(self, names: tuple[str, ...], cond: Conditioning, base: Attend) -> Attend:
        rows = rows_of(names, self.ending, len(cond))
        return (lambda site, q, k, v: base(site, q, k, v)) if rows else base  # rows are not alike: no slices

    def left_out(self, names: tuple[str, ...], count: int) -> Mapping[str, list[slice]]:
        """Of each block the rows, of `count`, that go on as they come (`ldm.models.attention.Context`)."""
        rows = rows_of(names, self.ending, count)
        return {block: rows for block in self.blocks if rows}


class Middle:
    """What each pixel of the middle was given by the attention of all, of each branch of one drawing.

    `around` has a Predict give it too: [B, h, w], under the branch's name with ":middle" behind it.
    """

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}  # of the last call

    def attending(self, names: tuple[str, ...], cond: Conditioning, base: Attend) -> Attend:
        def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if site.layer.name == MIDDLE:
                given = probabilities(q, k).mean(1).sum(1)
                maps = given.reshape(len(given), *site.size).chunk(len(names))
                self.maps |= zip(names, maps, strict=True)
            return base(site, q, k, v)

        return attend

    def around(self, predict: Predict) -> Predict:
        def call(x: Tensor, sigma: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
            outputs = predict(x, sigma, names)
            return outputs | {f"{name}:middle": self.maps[name] for name in names if name in self.maps}

        return call
