"""Building the atlas: emoji sets from npm to one sheet of sprites for each style, and what is on it.

`things.tsv`, kept by hand, says which things there are; a set draws them all, found by their code points.
Needs npm, resvg-py (skia's SVG loses parts of some drawings) and the network; what it writes needs neither.
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.files import whole_file
from ldm.postcards.sprites.atlas import CELL, INDEX, STYLES
from ldm.postcards.sprites.colour import HUES, dominant

PACKAGES = {
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
_FINE = 256  # pixels that a drawing is rendered at before it is cropped
_QUALITY = {"flat": 62, "3d": 62, "noto": 50, "twemoji": 50}
# A thing can be painted if one hue has most of what is coloured and much of all.
_OF_COLOURED, _OF_DRAWN = 0.8, 0.4
_UNPAINTED = ("portrait", "icon", "food")  # no blue skin, no green meat

Draw = Callable[[str], Image.Image | None]  # by code points, as in "1f436"


def build(things: Path, out: Path, packages: Path) -> None:
    """Write `out`/<style>.webp and index.json from a table of things.

    Packages are downloaded into the folder `packages` where they are not there yet.

    Raises:
        UserError: if a package cannot be had, or a set lacks a thing.
    """
    rows = read_things(things)
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = [dict(row) for row in rows]
    for style in STYLES:
        draw = _set(style, packages)
        sprites = []
        for row, entry in zip(rows, entries, strict=True):
            drawn = draw(row["code"])
            if drawn is None:
                raise UserError(
                    f"{PACKAGES[style]} lacks {row['noun']} ({row['code']}): take it from {things}"
                )
            sprite = fit(drawn)
            sprites.append(sprite)
            entry[style] = _measure(sprite, row)
        with whole_file(out / f"{style}.webp") as aside:
            sheet(sprites).save(aside, "WEBP", quality=_QUALITY[style], alpha_quality=80, method=6)
    with whole_file(out / INDEX) as aside:
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        aside.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_things(path: Path) -> list[dict[str, Any]]:
    """The table of things: code, noun, plural (or None), article, realm, size, also (other names)."""
    with path.open(encoding="utf-8", newline="") as opened:
        rows: list[dict[str, Any]] = [
            {key: "" if value == "-" else value for key, value in row.items()}
            for row in csv.DictReader(opened, delimiter="\t")
        ]
    for row in rows:
        row["plural"] = row["plural"] or None
        row["also"] = row["also"].split("|") if row["also"] else []
    return rows


def fit(drawn: Image.Image) -> Image.Image:
    """The sprite without its empty border, its longer side CELL pixels."""
    alpha = drawn.getchannel("A").point(lambda a: 255 * (a > 12))
    cropped = drawn.crop(alpha.getbbox())
    scale = CELL / max(cropped.size)
    size = [max(1, round(side * scale)) for side in cropped.size]
    return cropped.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def sheet(sprites: list[Image.Image]) -> Image.Image:
    """All sprites row by row, each in the upper left corner of its cell."""
    columns = columns_of(len(sprites))
    whole = Image.new("RGBA", (columns * CELL, -(-len(sprites) // columns) * CELL))
    for i, sprite in enumerate(sprites):
        whole.paste(sprite, (i % columns * CELL, i // columns * CELL))
    return whole


def columns_of(count: int) -> int:
    """Cells in a row of a sheet of `count` sprites."""
    return math.ceil(math.sqrt(count))


def _measure(sprite: Image.Image, row: dict[str, Any]) -> dict[str, Any]:
    """Width and height in pixels, mean colour, dominant hue, and whether that can be painted over."""
    pixels = np.asarray(sprite)
    hue, of_coloured, of_drawn = dominant(pixels)
    named = any(word in HUES for word in row["noun"].split())
    paintable = of_coloured > _OF_COLOURED and of_drawn > _OF_DRAWN and row["realm"] not in _UNPAINTED
    return {
        "width": sprite.width,
        "height": sprite.height,
        "mean": pixels[pixels[..., 3] > 128][:, :3].mean(0).round().astype(int).tolist(),
        "hue": round(hue, 3),
        "paintable": paintable and not named,
    }


# --- the sets ----------------------------------------------------------------------------------------------


def _set(style: str, packages: Path) -> Draw:
    package = archive(PACKAGES[style], packages)
    if style == "3d":
        files = dict(members(package, "package/assets/"))
        pictures = {_code(Path(name).stem): data for name, data in files.items()}
        return lambda code: Image.open(BytesIO(pictures[code])).convert("RGBA") if code in pictures else None
    icons = json.loads(dict(members(package, "package/icons.json"))["package/icons.json"])
    names = json.loads(dict(members(package, "package/chars.json"))["package/chars.json"])
    by_code = {_code(key): name for key, name in names.items()}
    return lambda code: _svg(icons, by_code[code]) if code in by_code else None


def archive(package: str, folder: Path) -> Path:
    """The package's file in `folder`, downloaded if it is not there. Raises UserError."""
    name, _, version = package.removeprefix("@").rpartition("@")
    file = folder / f"{name.replace('/', '-')}-{version}.tgz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"npm pack {package} failed: {error}; give --packages a folder with {file.name}"
            ) from error
    return file


def members(file: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a package's files whose names begin so."""
    with tarfile.open(file) as opened:
        for member in opened:
            data = opened.extractfile(member) if member.name.startswith(prefix) else None
            if data is not None:
                yield member.name, data.read()


def _code(text: str) -> str:
    """Code points without the mark that asks for a picture, as sets differ in it."""
    return text.lower().replace("-fe0f", "")


def _svg(icons: dict[str, Any], name: str) -> Image.Image:
    import resvg_py

    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=text, width=_FINE, height=_FINE))
    return Image.open(BytesIO(png)).convert("RGBA")
