"""What networks of pictures add to a U-Net's features: by step, by branch of guidance, by place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.adapters.seamless import seamless
from ldm.control.family import kind_of
from ldm.control.lllite import with_lllites
from ldm.control.pictures import Pictures, Size, control_mask, control_picture, depth_map, with_digests
from ldm.control.reading import ControlFile, Reader
from ldm.diffusion.deep_cache import place_of
from ldm.diffusion.guidance import text_of
from ldm.diffusion.tiles import Window
from ldm.errors import UserError
from ldm.files import check_unchanged
from ldm.memory.residence import in_use
from ldm.models import ControlNet, T2IAdapter, UNet
from ldm.models.attention import AnyText
from ldm.models.control import ControlNetUnion, LLLite
from ldm.models.control.controlnet import guess_weights
from ldm.models.encoder import NO_RESIDUALS, Residuals
from ldm.request import ControlUse, Request
from ldm.request.uses import DEPTH
from ldm.runtime import Finite, memory_format

# A1111's soft weights: of a ControlNet's outputs 0.825^(12 - i), and of a T2I-Adapter's levels.
SOFT, SOFT_LEVELS = 0.825, (0.25, 0.62, 0.825, 1.0)
# What a network is told in a call for some branches: sample, timestep, text, and what is extra by name.
Told = tuple[Tensor, Tensor, AnyText, Mapping[str, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Control:
    """A network and what it shows: one picture, or of a union model several with the same steps and mode."""

    file: ControlFile
    uses: tuple[ControlUse, ...]
    pictures: tuple[Tensor, ...]  # [1, 3, H, W] as large as what is drawn
    kinds: tuple[int, ...] = (0,)
    mask: Tensor | None = None  # [1, 1, H, W]

    @property
    def use(self) -> ControlUse:
        """The first: what all have alike."""
        return self.uses[0]

    @property
    def is_pooled(self) -> bool:
        network = self.file.network
        return isinstance(network, ControlNet) and network.config.global_pool_conditions

    def acts(self, step: int, steps: int) -> bool:
        """Whether it does in a step, from 0; as diffusers has it."""
        return not (step / steps < self.use.start or (step + 1) / steps > self.use.end)

    def sees(self, branch: str) -> bool:
        """Whether it acts in a branch of guidance: where the prompt is less, in those with a prompt alone."""
        everywhere = self.use.mode in ("balanced", "prompt") and not self.is_pooled
        return everywhere or text_of(branch) not in ("uncond", "image")

    def weights(self, skips: int) -> list[float]:
        """Of each of so many outputs, and of the middle's."""
        scale = 1.0 if len(self.uses) > 1 else self.use.scale  # which a union has for each picture
        if isinstance(self.file.network, T2IAdapter):
            soft = [1.0] * skips if self.use.mode == "balanced" else [*SOFT_LEVELS, *[1.0] * skips][:skips]
        elif self.use.mode == "balanced" or (self.use.mode == "guess" and self.is_pooled):
            soft = [1.0] * (skips + 1)
        else:
            soft = guess_weights(skips) if self.use.mode == "guess" else soft_weights(skips)
        return [scale * each for each in soft]


def soft_weights(skips: int) -> list[float]:
    """A1111's of `skips` outputs and the middle's: 0.825^(12 - i), of SDXL's 9 the first of those.

    Of other numbers spread from the same first to 1.
    """
    stretch = 1.0 if skips in (9, 12) else 12 / skips
    return [float(SOFT ** (12 - i * stretch)) for i in range(skips + 1)]


def noted(uses: Sequence[ControlUse], reader: Reader) -> tuple[ControlUse, ...]:
    """Uses that note which files they are of. Raises UserError, also where one is not what was noted."""
    found = []
    for use in uses:
        if use.scale == 0:  # as if it were not there: nothing is read
            found.append(use)
            continue
        if use.model == DEPTH and reader.takes_depth:
            found.append(with_digests(use))
            continue
        file = reader.get(use.model)
        check_unchanged(use.model, file.sha256, use.sha256, "network")
        if isinstance(file.network, ControlNet):
            kind_of(file.network, use.type, file.path)
        found.append(with_digests(use.replace(sha256=file.sha256)))
    return tuple(found)


def controls_of(request: Request, pictures: Pictures, reader: Reader) -> tuple[Control, ...]:
    """The controls of a resolved request that do anything; seamless where it is. Raises UserError."""
    uses, size = request.control or (), request.size
    made = []
    for k, use in enumerate(uses):
        if use.scale == 0 or (use.model == DEPTH and reader.takes_depth):
            continue
        file = reader.get(use.model)
        kind = kind_of(file.network, use.type, file.path) if isinstance(file.network, ControlNet) else 0
        picture = control_picture(use, k, pictures, size, isinstance(file.network, ControlNetUnion))
        if request.tiling is not None:
            file = replace(file, network=seamless(file.network, request.tiling))
        mask = control_mask(use, size)
        control = Control(file, (use,), (_taken(picture, file, size).to(reader.runtime.device),), (kind,))
        check(control, mask)
        made.append(replace(control, mask=None if mask is None else mask.to(reader.runtime.device)))
    return tuple(_joined(made))


def depth_of(request: Request, pictures: Pictures, reader: Reader, factor: int) -> Tensor:
    """The depth map [1, 1, H / factor, W / factor] that a depth model takes beside its latents.

    -1 at its least and 1 at its most, as diffusers makes it. Raises UserError.
    """
    size = (request.size[0] // factor, request.size[1] // factor)
    k, use = next((k, use) for k, use in enumerate(request.control or ()) if use.model == DEPTH)
    small = F.interpolate(depth_map(use, k, pictures), size, mode="bicubic", align_corners=False)
    low, high = small.aminmax()
    scaled = 2 * (small - low) / (high - low) - 1 if high > low else torch.zeros_like(small)
    return scaled.to(reader.runtime.device)


def check(control: Control, mask: Tensor | None) -> None:
    """Raise UserError for what a network cannot do."""
    name, network = control.file.path.name, control.file.network
    if mask is not None and (control.is_pooled or isinstance(network, LLLite)):
        raise UserError(f"control {name} takes no mask: what it adds is not of places")
    if isinstance(network, LLLite) and control.use.mode != "balanced":
        raise UserError(f"control {name} is an LLLite, which acts in all branches alike: leave mode out")


def _taken(picture: Tensor, file: ControlFile, size: Size) -> Tensor:
    """A picture with the channels of the network. Raises UserError for a size that it cannot take."""
    network, unit = file.network, 8
    if isinstance(network, T2IAdapter):
        unit = network.config.downscale_factor
        if network.config.in_channels == 1:  # luminance, as PIL has it
            picture = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    elif isinstance(network, ControlNet):
        if network.config.conditioning_channels == 1:
            picture = picture.mean(1, keepdim=True)
    else:
        unit = network.stride
    if any(side % unit for side in size):
        raise UserError(f"{file.path.name} draws multiples of {unit} pixels, and {size[1]}x{size[0]} is none")
    return picture


def _joined(controls: Sequence[Control]) -> list[Control]:
    """Neighbours of one union model that share steps, mode and masks are shown to it in one call."""

    def alike(control: Control) -> tuple[Any, ...]:
        use, is_union = control.use, isinstance(control.file.network, ControlNetUnion)
        own = () if is_union and control.mask is None else (id(control),)
        return (control.file.sha256, use.start, use.end, use.mode, own)

    made = []
    for _, group in groupby(controls, alike):
        every = list(group)
        uses, pictures, kinds = (
            tuple(chain.from_iterable(getattr(each, name) for each in every))
            for name in ("uses", "pictures", "kinds")
        )
        made.append(replace(every[0], uses=uses, pictures=pictures, kinds=kinds))
    return made


class Controls:
    """The controls of one drawing, as it goes on: each network, and what is made of its pictures once."""

    def __init__(
        self,
        controls: Sequence[Control],
        unet: UNet,
        sigmas: Tensor,
        gradients: bool = False,
        unread: list[Tensor] | None = None,
    ) -> None:
        """`sigmas` are those of the grid; the others are as `Finite` has them."""
        self._levels: list[float] = sigmas[:-1].tolist()
        self._beside = [each for each in controls if not isinstance(each.file.network, LLLite)]
        self._inside = [each for each in controls if isinstance(each.file.network, LLLite)]
        self._networks = {
            id(each): Finite(each.file.network, f"control {Path(each.file.path).name}", gradients, unread)
            for each in controls
        }
        self._unet, self._gradients, self._unread = unet, gradients, unread
        self._unets = dict[tuple[int, ...], Finite[UNet]]()
        self._made = dict[tuple[int, Window | None], tuple[Tensor, ...]]()

    def active(self, sigma: Tensor) -> tuple[int, ...]:
        """Which controls act at a noise level."""
        return tuple(map(id, self._acting((*self._beside, *self._inside), sigma)))

    def _acting(self, controls: Sequence[Control], sigma: Tensor) -> list[Control]:
        step, steps = place_of(self._levels, sigma), len(self._levels)
        return [each for each in controls if each.acts(step, steps)]

    def unet(self, sigma: Tensor) -> Finite[UNet] | None:
        """The U-Net with what changes its layers at a noise level; None where nothing does."""
        acting = self._acting(self._inside, sigma)
        key = tuple(map(id, acting))
        if not acting:
            return None
        if key not in self._unets:
            changed = with_lllites(self._unet, [(each, self._once(each, None)) for each in acting])
            self._unets[key] = Finite(changed, "the U-Net", self._gradients, self._unread)
        return self._unets[key]

    def residuals(
        self,
        sigma: Tensor,
        names: tuple[str, ...],
        rows: int,
        window: Window | None,
        outputs: int | None,
        told: Callable[[tuple[str, ...], torch.dtype], Told],
    ) -> Residuals:
        """What is added to the U-Net's features, fp32, in a call for the branches `names`, of `rows` each.

        `outputs`: of the shallowest only, so many. `told`: what a network is told for branches, in a dtype.
        """
        total = NO_RESIDUALS
        for control in self._acting(self._beside, sigma):
            own = tuple(name for name in names if control.sees(name))
            if own:
                made = self._added(control, own, window, outputs, told)
                total = _sum(total, _spread(made, names, own, rows))
        return total

    def _added(
        self,
        control: Control,
        names: tuple[str, ...],
        window: Window | None,
        outputs: int | None,
        told: Callable[[tuple[str, ...], torch.dtype], Told],
    ) -> Residuals:
        once, mask = self._once(control, window), _cut(control.mask, window)
        if isinstance(control.file.network, T2IAdapter):
            weights = control.weights(len(once))
            return Residuals(
                within=tuple(_weighted(each, w, mask) for each, w in zip(once, weights, strict=True))
            )

        def call(network: Any) -> tuple[Tensor, ...]:
            dtype = next(network.parameters()).dtype
            sample, timestep, text, extra = told(names, dtype)
            extra = {name: extra[name] for name in network.config.conditioning}
            given = (sample[:, : network.config.in_channels], timestep, text)
            hints = [each.to(dtype) for each in once]
            if isinstance(network, ControlNetUnion):
                scales = [use.scale for use in control.uses]
                made = network(
                    *given, kinds=control.kinds, hints=hints, scales=scales, outputs=outputs, **extra
                )
            else:
                made = network(*given, hint=hints[0], outputs=outputs, **extra)
            return made.skips if made.middle is None else (*made.skips, made.middle)

        made = self._networks[id(control)](call)
        network = control.file.network
        assert isinstance(network, ControlNet)
        weights = control.weights(len(network.config.skip_channels))
        made = tuple(_weighted(each, w, mask) for each, w in zip(made, weights, strict=False))
        return Residuals(made) if outputs is not None else Residuals(made[:-1], made[-1])

    def _once(self, control: Control, window: Window | None) -> tuple[Tensor, ...]:
        """What a network makes of its pictures alone: a ControlNet's hints, an adapter's features."""
        key = (id(control), window)
        if key in self._made:
            return self._made[key]

        def call(network: Any) -> tuple[Tensor, ...]:
            weight = next(network.parameters())
            pictures = [_cut(each, window) for each in control.pictures]
            ready = [
                each.to(weight.dtype, memory_format=memory_format(weight.device))
                for each in pictures
                if each is not None
            ]
            return (
                tuple(map(network.hint, ready))
                if isinstance(network, ControlNet)
                else tuple(network(ready[0]))
            )

        network = control.file.network
        with in_use(network) if hasattr(network, "home") else nullcontext():  # loaded asleep
            self._made[key] = self._networks[id(control)](call)
        return self._made[key]


def _cut(picture: Tensor | None, window: Window | None) -> Tensor | None:
    """What lies in a window of latents, of a picture [1, C, H, W] in pixels."""
    if picture is None or window is None:
        return picture
    unit = picture.shape[-1] // window.full_width
    rows, columns = (
        slice(unit * a, unit * (a + n)) for a, n in ((window.top, window.height), (window.left, window.width))
    )
    return picture[..., rows, columns]


def _weighted(made: Tensor, weight: float, mask: Tensor | None) -> Tensor:
    made = made if weight == 1 else weight * made
    return made if mask is None else made * F.interpolate(mask, made.shape[-2:], mode="area")


def _spread(made: Residuals, names: tuple[str, ...], own: tuple[str, ...], rows: int) -> Residuals:
    """Those of the branches `own` as those of `names`, with zeros for the others."""
    if own == names:
        return made

    def spread(each: Tensor) -> Tensor:
        parts = dict(zip(own, each.expand(len(own) * rows, -1, -1, -1).chunk(len(own)), strict=True))
        zeros = torch.zeros_like(parts[own[0]])
        return torch.cat([parts.get(name, zeros) for name in names])

    return _mapped(spread, made)


def _mapped(change: Callable[[Tensor], Tensor], made: Residuals) -> Residuals:
    middle = None if made.middle is None else change(made.middle)
    return Residuals(tuple(map(change, made.skips)), middle, tuple(map(change, made.within)))


def _sum(a: Residuals, b: Residuals) -> Residuals:
    def both(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(p + q for p, q in zip(x, y, strict=True)) if x and y else x or y

    middles = tuple(each for each in (a.middle, b.middle) if each is not None)
    middle = middles[0] + middles[1] if len(middles) == 2 else next(iter(middles), None)
    return Residuals(both(a.skips, b.skips), middle, both(a.within, b.within))


def cast(made: Residuals, dtype: torch.dtype) -> Residuals:
    """In the dtype of a network."""
    return _mapped(lambda each: each.to(dtype), made)
