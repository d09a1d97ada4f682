"""The texts that a picture carries: a PNG's chunks; EXIF's user comment and XMP in JPEG, WebP and others."""

from __future__ import annotations

import contextlib
from pathlib import Path

from PIL import Image

from ldm.errors import UserError, reason
from ldm.images.formats import CHUNK, EXIF_IFD, PARAMETERS, USER_COMMENT
from ldm.images.opening import formats
from ldm.images.parameters import split_parameters
from ldm.images.xmp import REQUEST, statements_in

_ENCODINGS = {b"ASCII\0\0\0": "utf-8", b"\0" * 8: "utf-8", b"JIS\0\0\0\0\0": "euc_jp"}  # `UNICODE\0`: UTF-16


def read_texts(path: str | Path) -> dict[str, str]:
    """Each text by its name; what other tools write into JPEG, WebP and GIF is `parameters` too.

    Raises UserError for what is not a picture.
    """
    try:
        with Image.open(path, formats=formats()) as image:
            image.load()  # a PNG may have texts after its pixels
            texts = {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
            comments = [] if PARAMETERS in texts else [_user_comment(image), _comment(image)]
            own = None if CHUNK in texts else statements_in(image.info.get("xmp", b"")).get(REQUEST)
    except Exception as error:  # broken files make decoders raise anything
        raise UserError(f"cannot read {path} as a PNG, JPEG or WebP picture: {reason(error)}") from None
    # Cameras and drawing programs write comments too: without settings they are no `parameters`.
    found = [comment for comment in comments if split_parameters(comment)[2]]
    return texts | ({PARAMETERS: found[0]} if found else {}) | ({CHUNK: own} if own else {})


def read_own(path: Path) -> str | None:
    """The request's JSON in a picture of ours, by its head alone: no pixel is decoded. None in any other.

    For many files; where a text may lie behind the pixels, `read_texts`.
    """
    with contextlib.suppress(Exception), Image.open(path, formats=formats()) as image:
        own = image.info.get(CHUNK)
        return str(own) if own else statements_in(image.info.get("xmp", b"")).get(REQUEST)
    return None


def _user_comment(image: Image.Image) -> str:
    with contextlib.suppress(Exception):  # a picture is not to be lost over its broken EXIF block
        return decode_comment(image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b""))
    return ""


def _comment(image: Image.Image) -> str:
    comment = image.info.get("comment", b"")
    return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)


def decode_comment(comment: bytes | str) -> str:
    """EXIF's UserComment, whose first 8 bytes name its encoding (CIPA DC-008, "UserComment")."""
    if isinstance(comment, str):
        return comment
    code, data = comment[:8], comment[8:]
    encoding = _utf_16(data) if code == b"UNICODE\0" else _ENCODINGS.get(code)
    if encoding is None:  # no such code: the bytes are a text as they are
        encoding, data = "utf-8", comment
    return data.decode(encoding, "replace").rstrip("\0")


def _utf_16(data: bytes) -> str:
    """Which UTF-16 it is. EXIF leaves it open; the marks of settings are ASCII, whose high bytes are 0."""
    if data[:2] in (b"\xfe\xff", b"\xff\xfe"):
        return "utf-16"
    return "utf-16-le" if data[1::2].count(0) > data[::2].count(0) else "utf-16-be"
