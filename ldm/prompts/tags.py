"""How adapters are written: `<lora:name:0.8>` in a prompt and `file:0.8` on the command line. No torch here.

One number is the weight of the whole adapter; two are the text encoders' and the U-Net's, in the order of
AUTOMATIC1111's web interface, where the tag is from. `<lyco:...>` is its older name for LoHa and LoKr.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ldm.errors import UserError

_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>", re.IGNORECASE)
# What was meant as a tag. `<lora>` and `<lora-style>` can be words of textual inversions.
_BROKEN = re.compile(
    r"<\s*(?P<kind>lora|lyco|locon|loha|hypernet)(?=\s*[:;=,|]|\s+\S)[^<>\n]*>?", re.IGNORECASE
)
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
# The file is as short as can be, so that the colon of C:\x.safetensors stays in it.
_SPEC = re.compile(rf"(?P<file>.+?)(?P<weights>(?::{_NUMBER}){{0,2}})", re.DOTALL)


def take_tags(prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """A prompt without its tags, and what they say: `name`, `weight` and, where given, `text_weight`.

    Raises UserError for a tag that is not <lora:name>, <lora:name:0.8> or <lora:name:0.5:0.8>, or not whole.
    """
    uses = [_use(tag) for tag in _TAG.finditer(prompt)]
    rest = _TAG.sub("", prompt)
    if broken := _BROKEN.search(rest):
        if broken["kind"].lower() == "hypernet":
            raise UserError(f"{_short(broken[0])} in the prompt is a hypernetwork, which is not supported")
        raise _no_tag(broken[0])
    return (rest.strip(), uses) if uses else (prompt, [])


def write_tag(name: str, weight: float, text_weight: float | None) -> str:
    """The inverse of `take_tags` for one tag."""
    text = "" if text_weight in (None, weight) else f"{text_weight:g}:"
    return f"<lora:{name}:{text}{weight:g}>"


def parse_lora(spec: str) -> tuple[Path, float, float | None]:
    r"""`file`, `file:0.8` or `file:0.5:0.8` (`C:\file` too) -> file, weight, the text's own weight."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise UserError("--lora needs a file: --lora FILE, FILE:WEIGHT or FILE:TEXT_WEIGHT:UNET_WEIGHT")
    given = _weights([float(weight) for weight in match["weights"].split(":")[1:]])
    return Path(match["file"]), given.get("weight", 1.0), given.get("text_weight")


def parse_embedding(spec: str) -> tuple[str | None, Path]:
    """`file` or `name=file` -> (name or None, file)."""
    name, equals, file = spec.partition("=")
    # A path may hold "=" too: a name holds no separator.
    if equals and name and file and not re.search(r"[/\\]", name):
        return name, Path(file)
    return None, Path(spec)


def _use(tag: re.Match[str]) -> dict[str, Any]:
    name, *weights = (part.strip() for part in tag[1].split(":"))
    if not name or len(weights) > 2 or not all(re.fullmatch(_NUMBER, weight) for weight in weights):
        raise _no_tag(tag[0])
    return {"name": name, **_weights([float(weight) for weight in weights])}


def _no_tag(written: str) -> UserError:
    return UserError(f"{_short(written)} in the prompt is not a LoRA tag: write <lora:name:0.8>")


def _short(written: str) -> str:
    return written if len(written) <= 40 else f"{written[:40]}..."


def _weights(numbers: list[float]) -> dict[str, float]:
    return dict(zip(("weight", "text_weight"), reversed(numbers), strict=False))
