"""What a drawing may be given beside its request, because no JSON can hold it; and what it gives back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.adapters import ImagePromptFile
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.noise import torch_seed
from ldm.diffusion.solvers import Solver
from ldm.errors import UserError
from ldm.images.fitting import InMemory, OneInMemory, read_file, take
from ldm.images.opening import to_mask, to_rgb
from ldm.images.pixels import to_numpy, to_pil
from ldm.request import LoraUse, Request
from ldm.request.fields import consecutive_seeds

if TYPE_CHECKING:
    from ldm.pipeline.job import Job, Picture

IMAGE_PROMPTS = ("ip_adapter_image", "ip_adapter_image_embeds", "ip_adapter_masks")  # what is of them
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors, generators and functions of the caller. None is what is not given."""

    generators: Sequence[torch.Generator] | None = None  # one per image, instead of the seeds
    latents: Tensor | None = None  # [images, C, h, w] unit noise to start from
    prompt_embeds: Tensor | None = None  # [prompts, N, D], instead of the prompts
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None  # [prompts, P], with those (SDXL)
    negative_pooled_prompt_embeds: Tensor | None = None
    image: InMemory | None = None  # to draw from, instead of the request's file; a tuple: one for each prompt
    mask_image: InMemory | None = None
    control_images: tuple[InMemory | None, ...] | None = None  # of the request's controls, without files
    image_latents: Tensor | None = None  # [1 or prompts, C, h, w] scaled, instead of an image
    # For each image prompt its pictures, its embeddings [1 or 2, n, E] or [1 or 2, n, P, E], and its masks.
    ip_adapter_image: Sequence[Sequence[OneInMemory]] | None = None
    ip_adapter_image_embeds: Sequence[Tensor] | None = None
    ip_adapter_masks: Sequence[Sequence[OneInMemory]] | None = None
    solver: Solver | None = None  # the user's own, instead of the sampler
    guidance: Guidance | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """What is given, by the names of the call's arguments."""
        names = [each.name for each in fields(self) if getattr(self, each.name) is not None]
        return tuple(_ARGUMENTS.get(name, name) for name in names)

    @property
    def has_images(self) -> bool:
        """Whether there is a picture among them, a mask, or a picture's latents."""
        return any(each is not None for each in (self.image, self.mask_image, self.image_latents))

    @property
    def has_image_prompts(self) -> bool:
        """Whether there is anything for image prompts among them."""
        return any(getattr(self, name) is not None for name in IMAGE_PROMPTS)

    def not_kept(self, seeds: Sequence[int]) -> tuple[str, ...]:
        """What of it no request of these seeds keeps: all but generators that give what the seeds give."""
        as_seeds = self.generators is not None and all_new(self.generators, seeds)
        return tuple(name for name in self.given if not (as_seeds and name == "generator"))

    def as_kept(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """The requests as pictures keep them: they say what they lack, and nothing that was not so."""
        lacks = self.not_kept([seed for each in requests for seed in each.seeds])
        blank = {name: value for argument in lacks for name, value in _UNTRUE.get(argument, {}).items()}
        return tuple(each.replace(**blank, not_kept=lacks) for each in requests)


# An argument of the call that no request keeps -> what of a request means nothing beside it.
_UNTRUE: dict[str, dict[str, Any]] = {
    "sampler": {"sampler": None, "eta": None, "sampler_options": None},
    "guidance": {
        "guidance": None,
        "guidance_scale": None,
        "guidance_rescale": 0.0,
        "image_guidance_scale": None,
    },
}
_ARGUMENTS = {
    "generators": "generator",
    "solver": "sampler",
    "image_latents": "image",
    "control_images": "control_image",
}  # where the call names them otherwise


NOTHING = Inputs()


@dataclass(frozen=True)
class Result:
    """What was drawn: `images` in the output type asked for, and the requests that draw them again."""

    images: Any
    requests: tuple[Request, ...]
    nsfw_content_detected: list[bool] | None = None  # of each image; None: nothing looked at them

    def __getitem__(self, key: int | str) -> Any:
        """`[0]` and `["images"]` are the images, as in diffusers."""
        return (self.images,)[key] if isinstance(key, int) else getattr(self, key)

    @property
    def request(self) -> Request:
        """The request of the first prompt, with everything filled in."""
        return self.requests[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """One per image."""
        return tuple(seed for request in self.requests for seed in request.seeds)


def requests_of(job: Job, pictures: Sequence[Picture]) -> tuple[Request, ...]:
    """The requests that draw these pictures: all of the job's, unless it was stopped or something checked."""
    if len(pictures) == len(job.pictures) and job.model.safety_checker is None:
        return job.requests
    own: dict[int, list[Picture]] = {}
    for picture in pictures:
        own.setdefault(picture.prompt, []).append(picture)
    return tuple(
        job.requests[p].replace(
            seeds=tuple(each.seed for each in some),
            nsfw_content_detected=None if some[0].flagged is None else any(each.flagged for each in some),
        )
        for p, some in own.items()
    )


def found_in(pictures: Sequence[Picture]) -> list[bool] | None:
    """What a safety checker found in each; None without one. It is warned of what it flags."""
    flags = [each.flagged for each in pictures if each.flagged is not None]
    if any(flags):
        seeds = ", ".join(str(each.seed) for each in pictures if each.flagged)
        warnings.warn(
            f"the safety checker flags the pictures of the seeds {seeds}: they are black", stacklevel=4
        )
    return flags or None


def check_output_type(output_type: str) -> None:
    """Raises UserError for one that is not in `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type {output_type!r} is not allowed: give {', '.join(OUTPUT_TYPES)}")


def as_output(images: Tensor, output_type: str) -> Any:
    """[B, 3, H, W] in 0..1 (or latents) in the type asked for."""
    if output_type == "pil":
        return to_pil(images)
    return to_numpy(images) if output_type == "np" else images


def one_each(text: str | Sequence[str] | None, count: int, name: str) -> list[str | None]:
    """One text for each of `count` prompts; for "prompt" as many as there are. Raises UserError."""
    if text is None or isinstance(text, str):
        return [text] * count
    if not isinstance(text, list | tuple | np.ndarray):
        raise UserError(f"{name} {text!r:.60} is not allowed: give a text, or a list of texts")
    if len(text) == 0 or (name != "prompt" and len(text) != count):
        raise UserError(f"{name} has {len(text)} texts for {count} prompts: give one, or one for each")
    return list(text)


def all_new(generators: Sequence[torch.Generator], seeds: Sequence[int]) -> bool:
    """Whether they give what these seeds give: none was drawn from yet, and none is there twice."""
    if len({id(each) for each in generators}) < len(generators) or len(generators) != len(seeds):
        return False
    new = [torch.Generator().manual_seed(torch_seed(seed)) for seed in seeds]
    return all(torch.equal(_draws(a), _draws(b)) for a, b in zip(generators, new, strict=True))


def _draws(generator: torch.Generator) -> Tensor:
    """The first of what a generator would give; it stays where it is."""
    return torch.rand(8, generator=torch.Generator().set_state(generator.get_state()))


def own_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator] | None:
    """One per picture; one alone is drawn from by each picture in turn. Raises UserError."""
    if generator is None:
        return None
    given: list[Any] = list(generator) if isinstance(generator, list | tuple) else [generator] * count
    for each in given:
        if not isinstance(each, torch.Generator):
            raise UserError(f"generator {each!r:.60} is not a torch.Generator: give those, or a seed")
    if len(given) != count:
        raise UserError(f"{len(given)} generators for {count} pictures: give one, or one per picture")
    return given


def seeds_of(
    seed: int | Iterable[int] | None, generators: Sequence[torch.Generator] | None, count: int
) -> tuple[int, ...]:
    """One per picture."""
    if generators is not None:
        return tuple(each.initial_seed() % 2**32 for each in generators)  # all of it that they take in
    seeds = consecutive_seeds(seed, count)
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} pictures: give one, or one per picture")
    return seeds


def scaled_loras(uses: Sequence[LoraUse], attention: Mapping[str, Any] | None) -> tuple[LoraUse, ...] | None:
    """A pipeline's LoRAs with their weights times the "scale" of diffusers' cross_attention_kwargs.

    None for as they are. Raises UserError for anything else in it.
    """
    given = dict(attention or {})
    scale = given.pop("scale", 1.0)
    given.pop("ip_adapter_masks", None)  # `ldm.pipeline.image_prompts` takes them
    for name in given:
        raise UserError(
            f"cross_attention_kwargs has {name!r}: only scale, of the LoRAs' weights, and ip_adapter_masks "
            "are taken"
        )
    if scale == 1 or not uses:
        return None
    return tuple(
        use.replace(
            weight=use.weight * scale,
            text_weight=None if use.text_weight is None else use.text_weight * scale,
        )
        for use in uses
    )


# --- images, as Python has them --------------------------------------------------------------------------


def count_images(*images: InMemory | Tensor | None) -> int:
    """How many prompts they are for: 1 where there is but one."""
    several = [len(each) for each in images if isinstance(each, tuple)]
    several += [len(each) for each in images if isinstance(each, Tensor) and each.ndim == 4]
    return max(several, default=1)


def as_latents(image: Any, channels: int) -> Tensor | None:
    """Latents [B, channels, h, w] that are given in place of an image; None for what is an image."""
    if not isinstance(image, Tensor) or image.ndim not in (3, 4) or image.shape[-3] != channels:
        return None
    if channels in (1, 3):  # no telling them from pictures
        return None
    return image.detach().float().reshape(-1, *image.shape[-3:])


def as_image(image: Any, name: str) -> tuple[str | None, InMemory | None]:
    """What a request can hold of an image, its path, and what it cannot. Raises UserError.

    Args:
        image: a path, a PIL image, an array [H, W, 3] or [B, H, W, 3] of 8 bits or in 0..1, a tensor
            [3, H, W] or [B, 3, H, W] in 0..1, or several of these; of a mask one channel, or no axis for it.
    """
    if isinstance(image, str | Path):
        return str(image), None
    if image is None:
        return None, None
    images = tuple(_each(image, name))
    if not images:
        raise UserError(f"{name} has no pictures: give one, or one for each prompt")
    return None, images[0] if len(images) == 1 else images


def _each(image: Any, name: str) -> Iterator[OneInMemory]:
    match image:
        case str() | Path():
            yield read_file(str(image), convert=to_mask if name == "mask_image" else to_rgb)[0]
        case Image.Image():
            yield image
        case Tensor():
            is_batch = image.ndim == 4 or (image.ndim == 3 and name == "mask_image")
            yield from image if is_batch and len(image) > 1 else [image]
        case np.ndarray():
            is_batch = image.ndim == 4 or (image.ndim == 3 and image.shape[-1] not in (1, 3, 4))
            yield from map(_of_array, image if is_batch else [image])
        case Iterable():
            for one in image:
                yield from _each(one, name)
        case _:
            raise UserError(
                f"{name} {image!r:.60} is not an image: give a path, a PIL image, array or tensor"
            )


def _of_array(array: np.ndarray[Any, Any]) -> OneInMemory:
    """A PIL image of whole numbers, a tensor [C, H, W] of others."""
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.integer):
        if array.size and not 0 <= array.min() <= array.max() <= 255:
            raise UserError(f"an image of {array.dtype} is not allowed beyond 0..255: give 8 bits, or 0..1")
        array = array.astype(np.uint8)
        return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return tensor.movedim(-1, 0) if tensor.ndim == 3 else tensor[None]


# --- image prompts, as diffusers' call has them ------------------------------------------------------------


def as_image_prompts(
    held: Sequence[ImagePromptFile], image: Any, embeds: Any, attention: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a request and what `Inputs` have of ip_adapter_image, ip_adapter_image_embeds and the
    ip_adapter_masks of cross_attention_kwargs: for each adapter that the pipeline has one, in its order.

    Raises UserError for another number of them.
    """
    given: dict[str, Any] = {"ip_adapter_image": image, "ip_adapter_image_embeds": embeds}
    given["ip_adapter_masks"] = (attention or {}).get("ip_adapter_masks")
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        given[name] = each = value if isinstance(value, list | tuple) else [value]
        if len(each) != len(held):
            raise UserError(
                f"{name} has {len(each)} for {len(held)} IP-Adapters: give one for each that the pipeline has"
                " (with_ip_adapter); several pictures of one in a list of their own, [[a, b]]"
            )
    if not given:
        return {}, {}
    uses = [file.use for file in held]
    pictures = [
        each if isinstance(each, list | tuple) else (each,) for each in given.get("ip_adapter_image", ())
    ]
    if pictures and all(isinstance(one, str | Path) for each in pictures for one in each):
        del given["ip_adapter_image"]
        uses = [use.replace(images=[str(p) for p in own]) for use, own in zip(uses, pictures, strict=True)]
    elif pictures:
        given["ip_adapter_image"] = tuple(_in_memory(each) for each in pictures)
    if "ip_adapter_masks" in given:
        given["ip_adapter_masks"] = tuple(_masks(each) for each in given["ip_adapter_masks"])
    for each in given.get("ip_adapter_image_embeds", ()):
        if not isinstance(each, Tensor):
            raise UserError(
                f"ip_adapter_image_embeds {each!r:.60} is not allowed: give a tensor for each adapter"
            )
    return {"image_prompts": tuple(uses)}, given


def _in_memory(images: Sequence[Any]) -> tuple[OneInMemory, ...]:
    """Pictures of one adapter as PIL images and tensors [1, 3, H, W] in 0..1. Raises UserError."""
    found = list[OneInMemory]()
    for image in images:
        path, one = as_image(image, "ip_adapter_image")
        ready = read_file(path)[0] if path is not None else take(one, 3)
        found += ready if isinstance(ready, tuple) else [] if ready is None else [ready]
    return tuple(found)


def _masks(masks: Any) -> tuple[OneInMemory, ...]:
    """Masks of one adapter, as IPAdapterMaskProcessor makes them, [1, n, H, W], or pictures."""
    if isinstance(masks, Tensor) and masks.ndim == 4 and len(masks) == 1:
        masks = list(masks[0])
    _, read = as_image(masks if isinstance(masks, list | tuple | Tensor) else [masks], "mask_image")
    ready = take(read, 1)
    return ready if isinstance(ready, tuple) else () if ready is None else (ready,)
