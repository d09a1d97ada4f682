"""Pictures in a terminal: the escape sequences of kitty, iTerm2 and sixel, and which a terminal knows."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ESC, ST = "\x1b", "\x1b\\"
CHUNK = 4096  # bytes of base64 in one of kitty's escape sequences
COLOURS = 256  # of a sixel picture
# Only what a terminal says of itself in the environment: if it was asked, it would answer as a keyboard does.
KITTY, ITERM2 = ("kitty", "ghostty"), ("iTerm.app", "WezTerm", "mintty", "WarpTerminal")
SIXEL = ("sixel", "foot", "mlterm", "yaft", "contour")


def protocol(env: Mapping[str, str]) -> str | None:
    """ "kitty", "iterm2" or "sixel", by the environment; None for a terminal of letters, and within tmux."""
    term, program = env.get("TERM", ""), env.get("TERM_PROGRAM", "")
    if env.get("TMUX") or term.startswith(("tmux", "screen", "dumb")):
        return None
    if "KITTY_WINDOW_ID" in env or any(name in (term.removeprefix("xterm-"), program) for name in KITTY):
        return "kitty"
    if program in ITERM2 or env.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return "sixel" if any(name in term for name in SIXEL) else None


def inline(image: Image.Image, way: str, number: int = 0) -> str:
    """The escape sequence that shows an RGB image where the cursor is, in its own size.

    In kitty one that is shown later with the same number, if it is not 0, takes its place.
    """
    return kitty(image, number) if way == "kitty" else {"iterm2": iterm2, "sixel": sixel}[way](image)


def kitty(image: Image.Image, number: int = 0) -> str:
    """As PNG, in chunks; the terminal answers nothing (q=2) and the cursor stays (C=1).

    https://sw.kovidgoyal.net/kitty/graphics-protocol
    """
    data = base64.standard_b64encode(_png(image)).decode()
    chunks = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    place = f"i={number},p=1," if number else ""
    keys = [f"a=T,f=100,q=2,C=1,{place}", *[""] * (len(chunks) - 1)]
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(f"{ESC}_G{key}m={m};{chunk}{ST}" for key, m, chunk in zip(keys, more, chunks, strict=True))


def iterm2(image: Image.Image) -> str:
    """As PNG, in one sequence. https://iterm2.com/documentation-images.html"""
    png = _png(image)
    size = f"width={image.width}px;height={image.height}px"
    return f"{ESC}]1337;File=inline=1;size={len(png)};{size}:{base64.standard_b64encode(png).decode()}\a"


def sixel(image: Image.Image) -> str:
    """In bands of six rows, a palette of at most 256 colours; "!5~" is a run of five (DEC STD 070, 1990)."""
    indexed = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    palette = np.array(indexed.getpalette(), dtype=int).reshape(-1, 3)
    pixels = np.asarray(indexed)
    levels = (palette * 100 + 127) // 255  # sixel counts in percent
    used = np.unique(pixels)
    registers = "".join(f"#{k};2;{';'.join(map(str, levels[k]))}" for k in used)
    bands = []
    for top in range(0, image.height, 6):
        band = pixels[top : top + 6]
        bits = 1 << np.arange(len(band))[:, None]
        bands.append("$".join(f"#{k}{_runs(((band == k) * bits).sum(0))}" for k in np.unique(band)))
    return f'{ESC}P0;1q"1;1;{image.width};{image.height}{registers}{"-".join(bands)}{ST}'


def _runs(column_bits: NDArray[np.int64]) -> str:
    """Sixels of one colour in one band, run-length encoded, without those at the end that set nothing."""
    starts = np.flatnonzero(np.diff(column_bits, prepend=-1))
    lengths = np.diff(starts, append=len(column_bits))
    runs = [(chr(63 + column_bits[start]), int(n)) for start, n in zip(starts, lengths, strict=True)]
    if runs and runs[-1][0] == "?":
        runs.pop()
    return "".join(f"!{n}{c}" if n > 3 else c * n for c, n in runs)


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG", compress_level=1)
    return data.getvalue()
