"""`ldm info` and `ldm redraw`: what a PNG says of how it was drawn, and whether that draws it again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.draw import check_output, draw_images
from ldm.cli.flags import add_common_flags, add_input_flags, add_model_flags
from ldm.cli.models import load
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.pipeline import Pipeline
    from ldm.pipeline.model import Model
    from ldm.request import Request


def add_info_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a PNG that was drawn by this program")
    add_common_flags(parser)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a PNG; give its model and LoRAs as when drawn"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep the new picture here")
    add_input_flags(parser, "where the pictures that it was drawn from lie now, if they were moved")
    add_model_flags(parser)
    add_common_flags(parser)


def info(args: argparse.Namespace) -> int:
    """Print the request in a PNG, one field per line."""
    from ldm.images.png import read_request

    for name, value in read_request(args.file).model_dump(exclude_none=True).items():
        print(f"{name}: {value}")
    return 0


def redraw(args: argparse.Namespace) -> int:
    """Draw a PNG again from its own metadata; say whether the pixels are equal."""
    import numpy as np

    from ldm.images.opening import open_picture
    from ldm.images.png import read_request, save_png

    request, old = read_request(args.file), open_picture(args.file)
    if args.output is not None:
        check_output(args, 1)
    pipe = load(args)
    warn_of_other_models(pipe, request, args.file)
    inputs = {"image": args.image or request.image, "mask_image": args.mask_image or request.mask_image}
    upscaling = request.upscaling if pipe.upscaler else None
    job = pipe.prepare(request.replace(model=None, model_hash=None, upscaling=upscaling, **inputs))
    (new,) = draw_images(job, job.pictures, "redraw", args.quiet)
    if args.output is not None:
        save_png(new, args.output, job.request)
    if new.size != old.size:
        raise UserError(f"{args.file} has {old.size} pixels, but its request draws {new.size}")
    levels = np.abs(np.asarray(new, dtype=np.int16) - np.asarray(old, dtype=np.int16)).max(axis=2)
    if not levels.any():
        print("equal: every pixel")
        return 0
    changed = np.count_nonzero(levels)
    print(f"different: {changed} of {levels.size} pixels, by up to {levels.max()} of 255 levels")
    return 1


def warn_of_other_models(pipe: Pipeline, request: Request, file: Path) -> None:
    """Whether a picture was drawn, or enlarged, by another model than it will be drawn by again."""
    again = "give its model by --model (and the same --vae, --unet, --prediction-type, ...)"
    pairs: list[tuple[str, Request, Model | None, str]] = [("drawn", request, pipe, again)]
    if request.upscaling is not None:
        pairs.append(("enlarged", request.upscaling, pipe.upscaler, "give its upscaler by --upscaler"))
    for done, asked, model, advice in pairs:
        if model is None or asked.model_hash not in (None, model.model_hash):
            other = "" if model is None else f", not {model.name} ({model.model_hash})"
            line = f"note: {file} was {done} by {asked.model} ({asked.model_hash}){other}; {advice}"
            print(line, file=sys.stderr)
