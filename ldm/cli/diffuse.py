"""`ldm diffuse`: a picture on its way to noise and back, as a sheet."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.flags import add_common_flags, add_model_flags
from ldm.cli.models import load
from ldm.cli.parser import count
from ldm.cli.terminal import echo
from ldm.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the picture")
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("diffuse.png"),
        metavar="FILE",
        help="(default: diffuse.png)",
    )
    add("-p", "--prompt", default="", metavar="TEXT", help="for the way back (default: none)")
    add("--columns", type=count, default=8, metavar="N", help="noise levels shown (default: 8)")
    add("-s", "--seed", type=int, default=0, help="of the noise (default: 0)")
    add_model_flags(parser)
    add_common_flags(parser)


def diffuse(args: argparse.Namespace) -> int:
    """Read, noise, denoise, write one PNG."""
    from ldm.evaluate.diffuse import diffuse_sheet
    from ldm.files import check_writable
    from ldm.images.opening import open_picture
    from ldm.images.png import save_png

    if args.output.suffix.lower() != ".png" or args.output.is_dir():
        raise UserError(f"--output {args.output} must name a .png file")
    check_writable(args.output.parent)
    image = open_picture(args.file)
    sheet = diffuse_sheet(load(args), image, args.prompt, args.columns, args.seed)
    echo(args, str(save_png(sheet, args.output)))
    return 0
