"""Flags that say several things at once: `FIRST,key=value,key=value`, where a key may come again."""

from __future__ import annotations

import argparse
import re
from collections.abc import Container, Iterable


def first_and_pairs(
    text: str, keys: Container[str], form: str, told: Iterable[str] = ()
) -> tuple[str, list[tuple[str, str]]]:
    """What stands before the first `,key=`, and the pairs after it; a comma that no key follows stays.

    Args:
        keys: those that there are; `told` of them in messages, by default all.
        form: how it is written, for messages.

    Raises:
        ArgumentTypeError: for another key, and where the first or a value is missing.
    """
    first, *rest = re.split(r",\s*(?=[\w.]+\s*=)", text.strip())
    if not first or first.partition("=")[0].strip() in keys:
        raise argparse.ArgumentTypeError(f"{text!r} begins with no name or file: {form}")
    pairs = list[tuple[str, str]]()
    for each in rest:
        key, _, value = (part.strip() for part in each.partition("="))
        if key not in keys:
            raise argparse.ArgumentTypeError(f"{key} in {text!r} is none of {', '.join(told)}")
        if not value:
            raise argparse.ArgumentTypeError(f"{key}= in {text!r} has no value")
        pairs.append((key, value))
    return first, pairs
