"""The flags of networks that show the model a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.drawing.spec import first_and_pairs
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.request import Request

FIELDS = ("image", "scale", "start", "end", "mode", "preprocess", "resize", "mask", "type")
NUMBERS = ("scale", "start", "end")


def add_control_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what a control picture shows (docs/control.md)").add_argument
    add(
        "--control",
        action="append",
        type=control,
        metavar="MODEL,image=FILE,...",
        help="a ControlNet, T2I-Adapter or LLLite (folder, file or hub name) and its picture, repeatable; "
        "also scale=0.8, start=0, end=0.6, preprocess=canny, mode=prompt or control, resize=crop, mask=FILE, "
        "and type=depth of a union model",
    )


def control(text: str) -> dict[str, str | float]:
    """MODEL,name=value,... as fields of a `ControlUse`; a comma that no name follows is part of a value."""
    model, parts = first_and_pairs(text, FIELDS, "MODEL,image=FILE,scale=0.8", FIELDS)
    fields: dict[str, str | float] = {"model": model}
    for name, value in parts:
        if name in fields:
            raise argparse.ArgumentTypeError(f"{name} is given twice")
        try:
            fields[name] = float(value) if name in NUMBERS else value
        except ValueError:
            raise argparse.ArgumentTypeError(f"{name}={value} is no number") from None
    return fields


def check_local(request: Request, file: Path) -> None:
    """Raise UserError for a control of the picture `file` that does not lie here.

    A stranger may have written its name: nothing is fetched, and no other computer is asked, for it.
    """
    from ldm.images.opening import is_remote
    from ldm.request.uses import DEPTH

    for each in (request, request.hires, request.refining, request.upscaling):
        for use in (each.control or ()) if each is not None else ():
            for path in (None if use.model == DEPTH else use.model, use.image, use.mask):
                if path is not None and (is_remote(path) or not Path(path).exists()):
                    raise UserError(
                        f"{file} was drawn with the control file {path!r}, which does not lie here, and is "
                        "not fetched for a picture's word: put it there"
                    )
