"""Styles: texts that are put around prompts, kept in a styles.csv as AUTOMATIC1111 writes it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError, reason
from ldm.spelling import unknown

PLACE = "{prompt}"


@dataclass(frozen=True)
class Style:
    """What a style adds to a prompt and to a negative prompt; {prompt} says where they stand in it."""

    prompt: str = ""
    negative_prompt: str = ""


def read_styles(path: str | Path) -> dict[str, Style]:
    """The styles of a file with the columns name, prompt, negative_prompt, by name. Raises UserError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read styles from {path}: {reason(error)}") from None
    if not rows or "name" not in rows[0]:
        raise UserError(f"{path} holds no styles: its first line must be name,prompt,negative_prompt")
    # "text" is what the column was called before 2023.
    return {
        row["name"].strip(): Style(row.get("prompt", row.get("text", "")), row.get("negative_prompt", ""))
        for row in rows
        if row["name"].strip()
    }


def chosen(styles: Mapping[str, Style], names: Sequence[str], path: str | Path) -> list[Style]:
    """Those of these names. Raises UserError for one that is not there."""
    for name in names:
        if name not in styles:
            raise unknown(f"style in {path}:", name, styles)
    return [styles[name] for name in names]


def with_styles(prompt: str, negative: str | None, styles: Sequence[Style]) -> tuple[str, str | None]:
    """Both prompts in their styles, one after another: the last is the outermost."""
    for style in styles:
        prompt = _merged(style.prompt, prompt)
        negative = _merged(style.negative_prompt, negative or "") or negative
    return prompt, negative


def _merged(style: str, prompt: str) -> str:
    if PLACE in style:
        return style.replace(PLACE, prompt)
    return ", ".join(filter(None, (prompt.strip(), style.strip())))
