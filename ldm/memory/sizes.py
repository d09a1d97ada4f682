"""Sizes of memory as people write them: 6GiB, 6000MiB, 6G."""

from __future__ import annotations

import re

from ldm.errors import UserError

# As in most tools G alone is GiB; GB counts in thousands.
UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
THOUSANDS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes. Raises UserError for what is not a size above 0."""
    found = WRITTEN.fullmatch(str(text).strip())
    unit, end = ("", "") if found is None else (found[2].lower(), (found[3] or "").lower())
    if found is None or (end == "ib" and not unit) or float(found[1]) == 0:
        raise UserError(f"{text!r} is not a size of memory: give 6GiB, 6000MiB or 6G")
    return int(float(found[1]) * (THOUSANDS if end == "b" and unit else UNITS)[unit])


def as_text(size: float) -> str:
    """In GiB with two digits, below one in MiB."""
    return f"{size / 2**30:.2f} GiB" if abs(size) >= 2**30 else f"{size / 2**20:.0f} MiB"
