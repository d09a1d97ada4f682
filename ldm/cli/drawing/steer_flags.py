"""Flags of what steers a drawing from inside: areas with their own prompts, and attention."""

from __future__ import annotations

import argparse
from pathlib import Path


def factors(text: str) -> tuple[float, ...]:
    """Four numbers: b1, b2, s1, s2."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not four numbers: b1,b2,s1,s2, such as 1.3,1.4,0.9,0.2")
    return numbers


def word_weight(text: str) -> tuple[str, float]:
    """A word and a number."""
    word, _, number = text.rpartition("=")
    try:
        return word, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not WORD=NUMBER, such as snow=2") from None


def add_steering_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is drawn where, from inside (docs/attention.md)").add_argument
    add(
        "--region",
        dest="regions",
        action="append",
        metavar="AREA:TEXT",
        help='an area with its own prompt, repeatable: "x,y,width,height: text" in pixels, or in shares of '
        'the picture; or "mask.png: text"; weight=2 and strength=0.5 may follow the area after commas',
    )
    add(
        "--freeu",
        type=factors,
        metavar="B1,B2,S1,S2",
        help="FreeU: stronger deep features, weaker low frequencies beside them; SD 1 1.5,1.6,0.9,0.2; SD 2 "
        "1.4,1.6,0.9,0.2; SDXL 1.3,1.4,0.9,0.2",
    )
    add(
        "--cross-replace-steps",
        type=float,
        metavar="SHARE",
        help="of --to without a picture: 0 to 1, the share of the steps in which words lie where they lay in "
        "-p's picture (default: 0.8)",
    )
    add(
        "--self-replace-steps",
        type=float,
        metavar="SHARE",
        help="and in which its coarse shapes are kept (default: 0.4)",
    )
    add(
        "--word-weight",
        dest="word_weights",
        action="append",
        type=word_weight,
        metavar="WORD=NUMBER",
        help="and how much a word of --to shows, repeatable: snow=2; -2 to 2 are sensible",
    )
    add(
        "--attention-maps",
        type=Path,
        metavar="FOLDER",
        help="write there, for each picture, a sheet of which places each word of the prompt drew",
    )
