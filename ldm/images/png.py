"""PNGs, and files of other formats, that carry their own request. They appear complete or not at all.

Each holds two texts: `parameters`, in the form that other tools read, and `ldm`, the whole `Request` as JSON,
from which the picture can be drawn again. `ldm.images.formats` says where they lie in each format, and
`ldm.images.provenance` what is said beside them: that a model drew it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image

from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError, abbreviate
from ldm.files import temporary_file, write_errors
from ldm.images.formats import CHUNK, PARAMETERS, PNG, Encoding, encode
from ldm.images.parameters import format_parameters, parse_parameters, split_parameters
from ldm.images.provenance import MARKED, Marks
from ldm.images.texts import read_texts
from ldm.request import Request

FEW_FILES = 256  # in a folder: to list them for each picture costs nothing


def save_png(
    image: Image.Image,
    path: Path,
    request: Request | None = None,
    encoding: Encoding = PNG,
    marks: Marks = MARKED,
) -> Path:
    """Write `path`, replacing what is there, with the request in its texts. Raises UserError."""
    with write_errors(path), _complete_file(image, path, request, encoding, marks) as temporary:
        temporary.replace(path)
    return path


def save_numbered(
    image: Image.Image,
    folder: Path,
    name: str,
    request: Request | None = None,
    encoding: Encoding = PNG,
    like: str | None = None,
    marks: Marks = MARKED,
) -> Path:
    """Write the first free of `name % 0`, `name % 1`, ... after the highest in `folder`, never over another.

    Several processes may write to one folder: each number goes to one of them. Raises UserError.

    Args:
        like: which names count for the highest, with * for any text; by default those of this `name`.
    """
    like = like or name
    saved = _complete_file(image, folder / name, request, encoding, marks)
    with write_errors(folder), saved as temporary:
        number = _next_number(folder, like)
        while not _rename_new(temporary, folder / (name % number)):
            number += 1
        _remember(folder, like, name, number)
    return folder / (name % number)


def save_new(
    image: Image.Image,
    path: Path,
    request: Request | None = None,
    encoding: Encoding = PNG,
    marks: Marks = MARKED,
) -> Path:
    """Write `path`, or if that is taken the first free of name-2, name-3, ... Raises UserError."""
    with write_errors(path), _complete_file(image, path, request, encoding, marks) as temporary:
        stem, number = path.stem, 1
        while not _rename_new(temporary, path):
            number += 1
            path = path.with_name(f"{stem}-{number}{path.suffix}")
    return path


def read_request(path: str | Path) -> Request:
    """The request of a picture: our own chunk, else the `parameters` text.

    Raises UserError where there is none, and for one that cannot be drawn.
    """
    texts = _read_written(path)
    try:
        return request_of(texts)
    except UserError as error:
        raise UserError(f"{path} does not say what can be drawn: {error}") from None


def request_of(texts: Mapping[str, str]) -> Request:
    """The request of a picture's texts, of which one is. Raises UserError for one that cannot be drawn."""
    if CHUNK in texts:
        return _as_drawn(Request.from_json(texts[CHUNK]))
    return _as_drawn(parse_parameters(texts[PARAMETERS]))


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


def as_bytes(
    image: Image.Image, request: Request | None = None, encoding: Encoding = PNG, marks: Marks = MARKED
) -> bytes:
    """The file of a picture in memory, as the functions above write it. Raises UserError."""
    file = io.BytesIO()
    _write(image, file, request, encoding, marks)
    return file.getvalue()


def _write(
    image: Image.Image, file: IO[bytes], request: Request | None, encoding: Encoding, marks: Marks
) -> None:
    texts = {}
    if request is not None:
        texts = {PARAMETERS: format_parameters(request), CHUNK: request.to_json()}
    encode(image, file, texts, encoding, marks.origin(image, request))


@contextlib.contextmanager
def _complete_file(
    image: Image.Image, path: Path, request: Request | None, encoding: Encoding, marks: Marks
) -> Iterator[Path]:
    """A finished file under a temporary name beside `path`; whatever happens, no such name stays."""
    with temporary_file(path) as temporary:
        with temporary.open("wb") as file:
            _write(image, file, request, encoding, marks)
        yield temporary


# (folder, like) -> the name and number that this process wrote there last, and how many files it found when
# it last looked.
_written: dict[tuple[Path, str], tuple[str, int, int]] = {}


def _remember(folder: Path, like: str, name: str, number: int) -> None:
    key = (folder.absolute(), like)
    _written[key] = (name % number, number, _written[key][2] if key in _written else 0)


def _next_number(folder: Path, like: str) -> int:
    """After the highest; in a folder of many files, which take long to list, after our own last one."""
    key = (folder.absolute(), like)
    last, number, files = _written.get(key, ("", 0, 0))
    if files > FEW_FILES and (folder / last).exists():
        return number + 1
    before, _, after = re.split(r"(%0\d+d)", like, maxsplit=1)
    shape = r"(\d+)".join(re.escape(part).replace(r"\*", ".*") for part in (before, after))
    names = os.listdir(folder)
    found = [int(match[1]) for match in map(re.compile(shape).fullmatch, names) if match]
    highest = max(found, default=-1)
    _written[key] = ("", highest, len(names))
    return highest + 1


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
