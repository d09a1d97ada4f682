"""What a request may ask of this server: bounds that its owner sets, checked before anything is drawn."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass

from ldm.errors import UserError
from ldm.images.enlarging import LABELS, enlarger_name
from ldm.request import PROMPTS, Request
from ldm.request.fields import short
from ldm.request.named_files import passes_of
from ldm.request.passes import HIRES_SCALE
from ldm.request.uses import DEPTH

# Fields that the server notes of its own files, or that name files of its machine.
NOT_ASKED = (
    "classifier_sha256",
    "hires_upscaler_sha256",
    "image_sha256",
    "mask_image_sha256",
    "not_kept",
)
SIZES = ("height", "width")
FEWEST_TILE = 64  # pixels of a window's side: smaller ones would be thousands


@dataclass(frozen=True)
class Limits:
    """Bounds of one request. All are the owner's to change, by flags of `ldm serve`."""

    side: int = 2048  # pixels, of what is drawn and of what is drawn from
    steps: int = 150  # all passes together
    pictures: int = 16
    text: int = 20_000  # characters of a prompt
    parts: int = 8  # of a prompt, between AND
    body: int = 32 * 2**20  # bytes
    pixels: int = 2**24  # of an uploaded picture, before it is decoded

    def count(self, asked: object, name: str = "n") -> int:
        """A number of pictures. Raises UserError."""
        if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= self.pictures:
            raise UserError(f"{name} {short(asked)} is not allowed: it must be from 1 to {self.pictures}")
        return asked

    def check(self, request: Request, loras: Container[str], networks: Collection[str] = ()) -> None:
        """Raise UserError, naming the field, for more than is allowed.

        `loras` are those that are there, `networks` the ControlNets and IP-Adapters.
        """
        self.check_bounds(request)
        self._check_texts(request)
        nested = passes_of(request)
        self._check_networks(request, networks)
        for name in NOT_ASKED:
            if getattr(request, name):
                raise UserError(f"{name} is not allowed here: the server notes it of its own files")
        for use in request.loras or ():
            if use.name not in loras:
                raise UserError(
                    f"loras {short(use.name)} is not allowed: the server has no LoRA of that name"
                )
        upscaler = request.hires_upscaler
        if upscaler is not None and enlarger_name(upscaler) is None:
            raise UserError(
                f"hires_upscaler {short(upscaler)} is not allowed: it must be one of {', '.join(LABELS)}"
            )
        from ldm.diffusion.guidances.catalogue import models_in  # which needs torch

        for each in nested:
            if each.guidance is not None and models_in(each.guidance):
                raise UserError("guidance autoguidance is not allowed here with another model: give thinned")
        if request.tile_size is not None and request.tile_size < FEWEST_TILE:
            raise UserError(f"tile_size {request.tile_size} is not allowed: here at least {FEWEST_TILE}")
        if request.tile_size and (request.tile_overlap or 0) > request.tile_size * 3 // 4:
            raise UserError(
                f"tile_overlap {request.tile_overlap} is not allowed: here at most 3/4 of tile_size"
            )

    def _check_networks(self, request: Request, networks: Collection[str]) -> None:
        """Pictures of these are the server's own by now: `Service.read` has placed them."""
        for each in passes_of(request):
            controls, prompts = each.control or (), each.image_prompts or ()
            named = {"control": [use.model for use in controls]}
            named["image_prompts"] = [use.adapter for use in prompts]
            for field, names in named.items():
                if len(names) > self.parts:
                    raise UserError(f"{field} has too many: this server takes at most {self.parts}")
                for name in names:
                    if name not in networks and not (field == "control" and name == DEPTH):
                        raise UserError(f"{field} {short(name)} is not allowed: {_those(networks)}")
                if names and each is not request:
                    raise UserError(f"{field} is not allowed in a second pass here: it has the first one's")
            if sum(len(use.images) for use in prompts) > self.pictures:
                raise UserError(f"image_prompts has too many pictures: here at most {self.pictures}")
            if any(use.image_encoder or use.weight_name for use in prompts):
                raise UserError("image_prompts is not allowed a file of the server's: give adapter alone")

    def check_bounds(self, request: Request) -> None:
        """Raise UserError for too much of anything; of a resolved request also by a model's own defaults."""
        for field, value, most in self._bounded(request):
            if value is not None and value > most:
                raise UserError(f"{field} {short(value)} is not allowed: this server takes at most {most:g}")

    def _bounded(self, request: Request) -> Iterator[tuple[str, float | None, float]]:
        """(field, its value, the most)."""
        yield "seeds", request.num_images, self.pictures
        yield "num_inference_steps", self._steps(request), self.steps
        for name in SIZES:
            yield name, getattr(request, name), self.side
        if request.hires or request.hires_scale:
            second = request.hires or Request()
            for name in SIZES:
                yield f"hires {name}", getattr(second, name), self.side
                grown = (getattr(request, name) or 0) * (request.hires_scale or HIRES_SCALE)
                yield "hires_scale", grown if getattr(second, name) is None else None, self.side
        for name in ("extend", "seed_resize"):
            for side in getattr(request, name) or ():
                yield name, side, self.side

    def _steps(self, request: Request) -> int:
        """Of all passes, by what is asked; a second pass that says nothing has the first's."""
        own = request.num_grid_steps or 0
        second = request.hires.num_grid_steps or own if request.hires else 0
        return own + second + (request.refining.num_grid_steps or 0 if request.refining else 0)

    def _check_texts(self, request: Request) -> None:
        for each in passes_of(request):
            for name in PROMPTS:
                text = getattr(each, name) or ""
                if len(text) > self.text:
                    raise UserError(f"{name} is too long: this server takes at most {self.text} characters")
                if len(re.findall(r"\bAND\b", text)) >= self.parts:
                    raise UserError(f"{name} has too many parts: this server takes at most {self.parts}")
            for region in each.regions or ():
                if region.mask is not None:
                    raise UserError("regions are not allowed a mask here: give each a box")
                if len(region.prompt) > self.text or len(each.regions or ()) > self.parts:
                    most = f"{self.parts} of {self.text} characters each"
                    raise UserError(f"regions are too many or too long: this server takes at most {most}")
            if each is not request and (each.hires or each.refining or each.upscaling):
                raise UserError("hires is not allowed to hold another request within")


def _those(networks: Collection[str]) -> str:
    if not networks:
        return "this server has no IP-Adapters and no ControlNets (ldm serve --controlnet-dir)"
    return f"the server has {', '.join(networks)}"
