"""The flags of networks that show the model a picture."""

from __future__ import annotations

import argparse

from ldm.cli.drawing.spec import first_and_pairs

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
