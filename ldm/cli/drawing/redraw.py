"""`ldm info` and `ldm redraw`: what a picture says of how it was drawn, and whether that draws it again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.drawing.draw import draw_images, tell_of_marks
from ldm.cli.drawing.image_prompt_flags import add_image_prompt_flags, found_again
from ldm.cli.drawing.output import check_file
from ldm.cli.flags import FLAGS, add_common_flags, add_input_flags, add_model_flags
from ldm.cli.models import load
from ldm.cli.provenance import add_mark_flags, marks
from ldm.errors import UserError, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from ldm.pipeline import Job, Pipeline
    from ldm.pipeline.job import Picture
    from ldm.pipeline.model import Model
    from ldm.request import Request


FILES = ("image", "mask_image", "hires_upscaler")  # fields of a request that may name one


def add_info_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="a PNG, JPEG, WebP or AVIF of this program or another; or a model, .safetensors or a folder",
    )
    add_common_flags(parser)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a picture; give its model and LoRAs as when drawn"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep the new picture here")
    add_mark_flags(parser.add_argument)
    group = add_input_flags(parser, "where the files that it was drawn from lie now, if they were moved")
    group.add_argument("--hires-upscaler", metavar="FILE", help="the network that enlarged it")
    add_image_prompt_flags(parser)
    add_model_flags(parser)
    add_common_flags(parser)


def info(args: argparse.Namespace) -> int:
    """Print all that a picture says of how it was drawn, one field per line, even if it cannot be drawn.

    Of a model, what it was merged from.
    """
    if args.file.is_dir() or args.file.suffix.lower() == ".safetensors":
        from ldm.checkpoint.merge.origin import tell

        for line in tell(args.file):
            print(printable(line))
        return 0
    from ldm.images.png import read_fields, read_request

    fault = None
    try:
        read_request(args.file)
    except UserError as error:
        fault = error
    for name, value in read_fields(args.file):
        print(printable(f"{name}: {value}" if name else value))
    if fault is not None:
        print(f"note: {printable(fault)}", file=sys.stderr)
    return 0


def redraw(args: argparse.Namespace) -> int:
    """Draw a picture again from its own metadata; say whether the pixels are equal."""
    from ldm.images.formats import CHUNK, PNG, encoding_of
    from ldm.images.opening import open_picture, to_rgba
    from ldm.images.png import read_request, save_png
    from ldm.images.texts import read_texts

    request = read_request(args.file)
    old = open_picture(args.file, convert=to_rgba if request.transparent else None)
    encoding, marked = PNG if args.output is None else encoding_of(args.output), marks(args)
    if args.output is not None:
        check_file(args.output)
    inputs = find_inputs(args, request)
    if CHUNK not in read_texts(args.file):
        tell_of_marks(args, [request])
    pipe = load(args)
    warn_of_other_models(pipe, request, args.file)
    again = {
        "upscaling": request.upscaling if pipe.upscaler else None,
        "not_kept": (),
        **inputs,
        **found_again(args, request),
    }
    if pipe.refiner is None:
        again |= {"refining": None, "refiner_switch_at": None}
    job = pipe.prepare(request.replace(model=None, model_hash=None, **again))
    new, drawn, levels = nearest(job, old, args)
    if args.output is not None:
        save_png(new, args.output, drawn.request, encoding, marked)
    several = "" if len(request.seeds) == 1 else f" (seed {drawn.seed}, the nearest of {len(request.seeds)})"
    if not levels.any():
        print(f"equal: every pixel{several}")
        return 0
    changed = (levels > 0).sum()
    print(f"different: {changed} of {levels.size} pixels, by up to {levels.max()} of 255 levels{several}")
    if args.file.suffix.lower() != ".png":
        print(f"note: only PNGs surely keep every pixel, and {printable(args.file)} is none", file=sys.stderr)
    return 1


def find_inputs(args: argparse.Namespace, request: Request) -> dict[str, str | None]:
    """The files that a picture was drawn from and with: those of flags, or those that it names itself.

    A stranger may have written those names, and to open one on another computer would tell who looks.
    Raises UserError.
    """
    from ldm.files import is_remote
    from ldm.request.named_files import check_here

    check_here(request, args.file, ("image_prompts",) if args.image_prompts else ())
    inputs = {name: getattr(args, name) or getattr(request, name) for name in FILES}
    request.check_given([name for name, path in inputs.items() if path is not None])
    for name, path in inputs.items():
        if getattr(args, name) is None and path is not None and is_remote(path):
            raise UserError(
                f"{args.file} names {path!r}, on another computer, which is not opened for a picture's word: "
                f"give the file by {FLAGS.get(name, '--hires-upscaler')}"
            )
    return inputs


def nearest(job: Job, old: Image, args: argparse.Namespace) -> tuple[Image, Picture, NDArray[np.int16]]:
    """The picture of a job that is equal to `old`, or else the nearest; and by how much it differs.

    Several seeds are of a request kept in Python, which does not say whose picture it lies in. The
    differences are levels [H, W], of the channel that differs most.
    """
    import numpy as np

    def draw(picture: Picture) -> tuple[Image, Picture, NDArray[np.int16]]:
        (new,), (drawn,) = draw_images(job, (picture,), "redraw", args.quiet)
        if new.size != old.size:
            sizes = [f"{width}x{height}" for width, height in (old.size, new.size)]
            raise UserError(f"{args.file} has {sizes[0]} pixels, but its request draws {sizes[1]}")
        levels = np.abs(np.asarray(new, dtype=np.int16) - np.asarray(old, dtype=np.int16)).max(axis=2)
        return new, drawn, levels

    best = draw(job.pictures[0])
    for picture in job.pictures[1:]:
        if not best[2].any():
            break
        best = min(best, draw(picture), key=lambda drawn: int(drawn[2].sum()))
    return best


def warn_of_other_models(pipe: Pipeline, request: Request, file: Path) -> None:
    """Whether a picture was drawn, or enlarged, by another model than it will be now; or hidden."""
    if request.nsfw_content_detected and pipe.safety_checker is None:
        line = f"note: {file} is black, as a safety checker flagged it: give it by --safety-checker"
        print(printable(line), file=sys.stderr)
    again = "give its model by --model (and the same --vae, --unet, --prediction-type, ...)"
    pairs: list[tuple[str, Request, Model | None, str]] = [("drawn", request, pipe, again)]
    if request.upscaling is not None:
        pairs.append(("enlarged", request.upscaling, pipe.upscaler, "give its upscaler by --upscaler"))
    if request.refining is not None:
        pairs.append(("refined", request.refining, pipe.refiner, "give its refiner by --refiner"))
    for done, asked, model, advice in pairs:
        if model is None or asked.model_hash not in (None, model.model_hash):
            other = "" if model is None else f", not {model.name} ({model.model_hash})"
            line = f"note: {file} was {done} by {asked.model} ({asked.model_hash}){other}; {advice}"
            print(printable(line), file=sys.stderr)
