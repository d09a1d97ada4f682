"""What the requests of `txt2img` begin with: another picture's, a folder's pictures, other seeds' noise."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.request import Request


def given_by(args: argparse.Namespace) -> Request:
    """The request of --from-png, or an empty one, with what other flags say in place of its own."""
    from ldm.images.png import read_request
    from ldm.request import PROMPTS, Request
    from ldm.request.named_files import check_here

    base = Request() if args.from_png is None else begun_like(read_request(args.from_png))
    if args.from_png is not None:
        others = ("control", "image_prompts", "regions", "guidance")
        check_here(base, args.from_png, tuple(name for name in others if getattr(args, name)))
    names = (Request.model_fields.keys() & vars(args).keys()) - {"model"}
    fields: dict[str, Any] = {name: getattr(args, name) for name in names} | {
        "num_inference_steps": args.steps,
        "guidance_scale": args.scale,
        "spacing": args.scheduler,
        "image": args.invert or args.image,
        "hires": hires_of(args),
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    if not fields.keys().isdisjoint(PROMPTS):  # and what is drawn for another's words need not fit it
        fields.setdefault("drawn_as", None)
    if "sampler" in fields:  # the name may say the spacing too, and another's spacing need not fit it
        fields.setdefault("spacing", None)
    return base.replace(**fields)


def hires_of(args: argparse.Namespace) -> Request | None:
    """What flags say of a second pass; None if nothing. Its scale and upscaler are fields of their own."""
    from ldm.request import Request

    flags = {"num_inference_steps": "steps", "strength": "strength", "prompt": "prompt", "sampler": "sampler"}
    given = {name: getattr(args, f"hires_{flag}") for name, flag in flags.items()}
    given = {name: value for name, value in given.items() if value is not None}
    return Request(**given) if given else None


def begun_like(request: Request) -> Request:
    """A picture's request for another one: of any model, and with other files in its files' place."""
    named = (
        *("model", "model_hash", "image_sha256", "mask_image_sha256", "classifier_sha256", "upscaling"),
        *("safety_checker_sha256", "nsfw_content_detected"),
    )
    noted: dict[str, None] = dict.fromkeys(("sha256", "image_sha256", "mask_sha256"))
    controls = tuple(use.replace(**noted) for use in request.control or ())
    regions = tuple(each.replace(mask_sha256=None) for each in request.regions or ()) or None
    request = request.replace(**dict.fromkeys(named), control=controls, regions=regions)
    request.check_given(())
    return request


def over_folders(requests: Sequence[Request]) -> list[Request]:
    """For an image that is a folder a request for each of its pictures, with the mask of its name.

    Raises UserError for a folder without pictures, and for a mask that is missing.
    """
    return [one for request in requests for one in _over_folder(request)]


def _over_folder(request: Request) -> list[Request]:
    if request.image is None or not Path(request.image).is_dir():
        return [request]
    pictures = pictures_in(Path(request.image))
    masks = request.mask_image
    if masks is None or not Path(masks).is_dir():
        return [request.replace(image=str(path)) for path in pictures]
    by_stem = {path.stem: path for path in pictures_in(Path(masks))}
    for path in pictures:
        if path.stem not in by_stem:
            raise UserError(f"{masks} has no mask for {path.name}: give each picture one of its name")
    return [request.replace(image=str(path), mask_image=str(by_stem[path.stem])) for path in pictures]


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name. Raises UserError if it has none."""
    from ldm.dataset.picture import SUFFIX

    found = sorted(path for path in folder.iterdir() if SUFFIX.fullmatch(path.suffix) and path.is_file())
    if not found:
        raise UserError(f"no pictures in {folder}: give one, or a folder that has some")
    return found


def chosen(requests: Sequence[Request], wildcards: str | None) -> list[Request]:
    """For prompts that are templates a request for each seed, with what it chooses. Raises UserError."""
    from ldm.prompts.wildcards import expand
    from ldm.request import PROMPTS

    if wildcards is None:
        return list(requests)
    return [
        request.replace(
            seeds=(seed,),
            **{
                name: expand(text, seed, wildcards or None)
                for name in PROMPTS
                if (text := getattr(request, name)) is not None
            },
        )
        for request in requests
        for seed in request.seeds
    ]


def varied(request: Request) -> list[Request]:
    """With a variation a request for each picture: the first seed, and consecutive variation seeds."""
    if not request.variation_strength or request.variation_seed is None:
        return [request]
    one, first = request.replace(seeds=request.seeds[:1]), request.variation_seed
    return [one.replace(variation_seed=first + k) for k in range(len(request.seeds))]
