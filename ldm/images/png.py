"""PNG files that carry their own request. They appear complete or not at all.

A PNG gets two text chunks: `parameters`, in the form that other tools read, and `ldm`, the whole `Request`
as JSON, from which the picture can be drawn again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError, abbreviate
from ldm.files import temporary_file, write_errors
from ldm.images.parameters import format_parameters, parse_parameters, split_parameters
from ldm.images.texts import PARAMETERS, read_texts
from ldm.request import Request

CHUNK = "ldm"
FEW_FILES = 256  # in a folder: to list them for each picture costs nothing


def save_png(image: Image.Image, path: Path, request: Request | None = None) -> Path:
    """Write `path`, replacing what is there, with the request in its text chunks. Raises UserError."""
    with write_errors(path), _complete_file(image, path, request) as temporary:
        temporary.replace(path)
    return path


def save_numbered(image: Image.Image, folder: Path, name: str, request: Request | None = None) -> Path:
    """Write the first free of `name % 0`, `name % 1`, ... after the highest in `folder`, never over another.

    Several processes may write to one folder: each number goes to one of them. Raises UserError.
    """
    with write_errors(folder), _complete_file(image, folder / name, request) as temporary:
        number = _next_number(folder, name)
        while not _rename_new(temporary, folder / (name % number)):
            number += 1
        _remember(folder, name, number)
    return folder / (name % number)


def read_request(path: str | Path) -> Request:
    """The request of a picture: our own chunk, else the `parameters` text.

    Raises UserError where there is none, and for one that cannot be drawn.
    """
    texts = _read_written(path)
    try:
        if CHUNK in texts:
            return _as_drawn(Request.from_json(texts[CHUNK]))
        return _as_drawn(parse_parameters(texts[PARAMETERS]))
    except UserError as error:
        raise UserError(f"{path} does not say what can be drawn: {error}") from None


def read_fields(path: str | Path) -> list[tuple[str, object]]:
    """All that a picture says of how it was drawn, by name and as written, whether it can be drawn or not.

    Raises UserError where it says nothing.
    """
    texts = _read_written(path)
    if CHUNK in texts:
        try:
            fields = Request.from_json(texts[CHUNK]).filled_in()
        except UserError:
            fields = _any_fields(texts[CHUNK])
        if fields:
            return list(fields.items())
    if PARAMETERS not in texts:
        return [(CHUNK, texts[CHUNK])]
    prompt, negative, settings = split_parameters(texts[PARAMETERS])
    prompts = {"prompt": prompt, "negative_prompt": negative}
    return [*((name, value) for name, value in prompts.items() if value is not None), *settings]


def _read_written(path: str | Path) -> dict[str, str]:
    texts = read_texts(path)
    if CHUNK in texts or PARAMETERS in texts:
        return texts
    others = f"; of another program it has {abbreviate(sorted(texts))}" if texts else ""
    raise UserError(
        f"{path} does not say how it was drawn: it has no '{CHUNK}' or 'parameters' text chunk{others}"
    )


def _any_fields(text: str) -> dict[str, Any]:
    """The fields of a JSON object, whatever they are."""
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(text)
        return fields if isinstance(fields, dict) else {}
    return {}


def _as_drawn(request: Request) -> Request:
    """Without an eta that its sampler passed over: earlier versions took any, and kept it."""
    sampler = SAMPLERS.get(request.sampler or "")
    unused = bool(request.eta) and sampler is not None and not sampler.takes_eta
    upscaling = request.upscaling and _as_drawn(request.upscaling)
    return request.replace(eta=None if unused else request.eta, upscaling=upscaling)


@contextlib.contextmanager
def _complete_file(image: Image.Image, path: Path, request: Request | None) -> Iterator[Path]:
    """A finished PNG under a temporary name beside `path`; whatever happens, no such name stays."""
    chunks = PngInfo()
    if request is not None:
        chunks.add_text("parameters", format_parameters(request))
        chunks.add_text(CHUNK, request.to_json())
    with temporary_file(path) as temporary:
        with temporary.open("wb") as file:
            image.save(file, format="PNG", pnginfo=chunks)
        yield temporary


# (folder, name) -> the number that this process wrote there last, and the files it found when it last looked.
_written: dict[tuple[Path, str], tuple[int, int]] = {}


def _remember(folder: Path, name: str, number: int) -> None:
    key = (folder.absolute(), name)
    _written[key] = (number, _written.get(key, (0, 0))[1])


def _next_number(folder: Path, name: str) -> int:
    """After the highest; in a folder of many files, which take long to list, after our own last one."""
    last, files = _written.get((folder.absolute(), name), (0, 0))
    if files > FEW_FILES and (folder / (name % last)).exists():
        return last + 1
    names, shape = os.listdir(folder), re.sub(r"%0\d+d", r"(\\d+)", re.escape(name).replace(r"\%", "%"))
    found = [int(match[1]) for match in map(re.compile(shape).fullmatch, names) if match]
    number = max(found, default=-1) + 1
    _written[folder.absolute(), name] = (number, len(names))
    return number


def _rename_new(temporary: Path, path: Path) -> bool:
    """Give the file its name unless that is taken; True if it was free."""
    link: Callable[[Path, Path], None] = os.link  # unlike rename, it refuses an existing name
    try:
        link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.rename(temporary, path)
    return True
