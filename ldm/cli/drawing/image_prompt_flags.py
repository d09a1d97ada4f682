"""--image-prompt: an IP-Adapter with its pictures, for drawing and for drawing again."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from ldm.cli.drawing.spec import first_and_pairs
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.request import Request

FORM = "ADAPTER,image=FILE[,image=FILE ...][,scale=0.6][,mask=FILE][,encoder=FOLDER][,weight_name=FILE]"
FIELDS = {"image": "images", "mask": "masks", "encoder": "image_encoder", "weight_name": "weight_name"}
BLOCK = re.compile(r"(down|up)(\.block_\d+)?|mid")


class _Keys:
    """What may be said: `KEYS`, and blocks: `mid`, `up`, `up.block_0`, ..."""

    def __contains__(self, key: object) -> bool:
        return key in KEYS or (isinstance(key, str) and BLOCK.fullmatch(key) is not None)


KEYS = ("image", "scale", "mask", "encoder", "weight_name")


def add_image_prompt_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("pictures as prompts (docs/image_prompts.md)").add_argument(
        "--image-prompt",
        dest="image_prompts",
        action="append",
        type=image_prompt,
        metavar="ADAPTER,image=FILE",
        help="draw as a picture says, by an IP-Adapter; repeatable, as image= is. ADAPTER is a file, a folder"
        " or a hub name (with weight_name=); scale=0.6 is how strongly, or up.block_0=0/1/0 in which blocks; "
        "mask=FILE where; encoder=FOLDER the image encoder (default: beside the adapter)",
    )


def image_prompt(text: str) -> dict[str, Any]:
    """The fields of an `ImagePromptUse` of a flag's text."""
    adapter, pairs = first_and_pairs(text, _Keys(), FORM, (*KEYS, "up.block_0", "mid"))
    fields: dict[str, Any] = {"adapter": adapter, "images": [], "masks": []}
    blocks: dict[str, list[float]] = {}
    for key, value in pairs:
        if key in ("image", "mask"):
            fields[FIELDS[key]].append(value)
        elif key == "scale":
            fields["scale"] = _numbers(key, value, 1)[0]
        elif key in FIELDS:
            fields[FIELDS[key]] = value
        else:
            blocks[key] = _numbers(key, value)
    if blocks and "scale" in fields:
        raise argparse.ArgumentTypeError(f"{text!r} has scale= and blocks: give one of them")
    if not fields["images"]:
        raise argparse.ArgumentTypeError(f"{text!r} has no picture: {FORM}")
    return fields | ({"scale": blocks} if blocks else {})


def _numbers(key: str, value: str, most: int = 100) -> list[float]:
    """Numbers between slashes."""
    try:
        numbers = [float(each) for each in value.split("/")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= most:
        what = "a number" if most == 1 else "numbers such as 0/1/0"
        raise argparse.ArgumentTypeError(f"{key}={value} is not allowed: give {what}")
    return numbers


def found_again(args: argparse.Namespace, request: Request) -> dict[str, Any]:
    """The image prompts that a picture is drawn again with: those of flags, or those that it names itself.

    Flags say where its files lie now, in its order. Raises UserError for another number of them.
    """
    uses = request.image_prompts or ()
    if args.image_prompts:
        if len(args.image_prompts) != len(uses):
            raise UserError(
                f"{len(args.image_prompts)} --image-prompt for a picture that was drawn with {len(uses)}: "
                "give as many, in its order"
            )
        digests = ("sha256", "images_sha256", "masks_sha256", "image_encoder_sha256")
        noted = [{name: getattr(use, name) for name in digests} | {"scale": use.scale} for use in uses]
        return {"image_prompts": [own | given for own, given in zip(noted, args.image_prompts, strict=True)]}
    return {}
