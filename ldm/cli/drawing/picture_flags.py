"""The flags of what a drawing begins with: pictures, masks and noise."""

from __future__ import annotations

import argparse

from ldm.cli.flags import add_input_flags

OUTDIR = "outputs/txt2img-samples"
SIZES = tuple(
    negative + size
    for negative in ("", "negative-")
    for size in ("original-size", "crops-coords-top-left", "target-size")
)


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    add = add_input_flags(parser, "drawing from a picture").add_argument
    add(
        "--resize-mode",
        choices=("resize", "crop", "fill", "latent"),
        help="how an image of another shape becomes the picture's, as in AUTOMATIC1111 (default: resize)",
    )
    add(
        "--strength",
        type=float,
        metavar="SHARE",
        help="0 to 1: how much of the picture is drawn anew (default: 0.8; of SDXL 0.3; with a mask 1)",
    )
    add(
        "--invert",
        metavar="FILE",
        help="edit this picture: it is inverted to the noise that draws it (-p says what it shows) and drawn "
        "again as --to says; --mask covers what may change (default: where the two texts differ)",
    )
    add("--to", dest="target_prompt", metavar="TEXT", help="what -p's picture, or --invert's, becomes")
    add(
        "--image-guidance-scale",
        type=float,
        metavar="SCALE",
        help="instruct-pix2pix: how closely to keep to the picture (default: 1.5)",
    )
    add(
        "--noise-level",
        type=int,
        metavar="N",
        help="upscalers: noise on the picture (default: the model's)",
    )


def add_noise_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the noise that it begins with").add_argument
    add("--noise", choices=("cpu", "gpu"), help="gpu: as CUDA draws it (default: cpu)")
    add("--variation-seed", type=int, metavar="N", help="turn the noise towards that of this seed")
    add("--variation-strength", type=float, metavar="SHARE", help="0 to 1: how far")
    add(
        "--seed-resize",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="the noise of a picture of this size, in the middle",
    )
    add(
        "--noise-seed-delta",
        "--ensd",
        type=int,
        metavar="N",
        help="added to the seed for the noise of the steps",
    )


def add_mask_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the mask").add_argument
    add("--extend", type=sides, metavar="L,T,R,B", help="draw beyond the picture: pixels at each side")
    add("--mask-invert", action="store_true", default=None, help="draw anew what is black")
    add("--mask-grow", type=int, metavar="PIXELS", help="to each side; below 0 it shrinks")
    add("--mask-blur", type=float, metavar="PIXELS", help="mix both pictures at the edge (default: 0, a cut)")
    add("--soft-mask", action="store_true", default=None, help="greys are strengths: how much is drawn anew")
    add(
        "--mask-fill",
        choices=("original", "blur", "noise", "nothing"),
        help="what lies beneath it at the beginning; it shows at a --strength below 1 (default: original)",
    )
    add(
        "--padding-mask-crop",
        "--only-masked",
        type=int,
        nargs="?",
        const=32,
        metavar="PIXELS",
        help="draw the mask and so much around it (default: 32) at the model's size, and put it back",
    )


def sides(text: str) -> tuple[int, ...]:
    """Four numbers: left, top, right, bottom."""
    parts = text.replace(",", " ").split()
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not four numbers: left,top,right,bottom in pixels")
    return tuple(map(int, parts))
