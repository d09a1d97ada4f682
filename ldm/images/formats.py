"""The formats that pictures are written in, and how each carries the texts of its request.

PNG has text chunks: `parameters`, in the form that other tools read, and `ldm`, the whole request as JSON. In
JPEG, WebP and AVIF the first is EXIF's UserComment, as AUTOMATIC1111 writes it, and both are in XMP. What is
said of a picture's origin (`ldm.images.provenance`) is XMP in all of them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.images.provenance import AIGC, AIGC_CHUNK, Origin
from ldm.images.xmp import CREATOR_TOOL, DESCRIPTION, REQUEST, packet
from ldm.version import __version__

CHUNK, PARAMETERS, XMP_CHUNK = "ldm", "parameters", "XML:com.adobe.xmp"
EXIF_IFD, USER_COMMENT, SOFTWARE = 0x8769, 0x9286, 0x0131
SEGMENT = 2**16 - 64  # bytes that a JPEG holds of EXIF, and of XMP
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".avif": "avif"}
QUALITY = {"jpeg": 95, "webp": 90, "avif": 80}  # where none is asked for
MAX_SIDE = {"jpeg": 65_535, "webp": 16_383, "avif": 65_535}  # pixels


@dataclass(frozen=True)
class Encoding:
    """How a picture becomes bytes. Raises UserError for what does not go together, or is not there."""

    format: str = "png"
    quality: int | None = None  # 1 to 100; None: QUALITY
    lossless: bool = False  # of WebP; PNG always is

    def __post_init__(self) -> None:
        if self.format not in SUFFIXES.values():
            raise UserError(f"format {self.format!r} is not allowed: give {', '.join(['png', *QUALITY])}")
        if self.lossless and self.format in ("jpeg", "avif"):
            raise UserError(f"{self.format} is never lossless: give --format png or webp")
        if self.quality is not None:
            if self.format == "png" or self.lossless:
                raise UserError(
                    "a lossless picture has no quality: leave --quality out, or give --format jpeg"
                )
            if not 1 <= self.quality <= 100:
                raise UserError(f"quality {self.quality} is not allowed: it must be from 1 to 100")
        Image.preinit()  # PNG and JPEG; all that Pillow knows takes ten times as long
        if self.format.upper() not in Image.SAVE:
            Image.init()
        if self.format.upper() not in Image.SAVE:
            raise UserError(
                f"this Pillow writes no {self.format}: pip install 'pillow>=11.3', or --format png"
            )

    @property
    def suffix(self) -> str:
        return next(suffix for suffix, name in SUFFIXES.items() if name == self.format)

    @property
    def options(self) -> dict[str, Any]:
        """Pillow's, apart from texts."""
        if self.format == "png":
            return {}
        if self.lossless:
            return {"lossless": True, "quality": 80}  # here, how hard it tries
        # Pictures are small and looked at closely: colours are kept as fine as brightness where it can be.
        finer: dict[str, Any] = {"jpeg": {"subsampling": 0}, "webp": {"method": 5}}
        return {
            "quality": self.quality or QUALITY[self.format],
            **finer.get(self.format, {"subsampling": "4:4:4"}),
        }


PNG = Encoding()


def encoding_of(
    path: Path | None, asked: str | None = None, quality: int | None = None, lossless: bool = False
) -> Encoding:
    """The encoding by the name of a format, or by a file's suffix. Raises UserError."""
    name = None if path is None else SUFFIXES.get(path.suffix.lower())
    if path is not None and name is None:
        raise UserError(f"{path} must name a {', '.join([*SUFFIXES][:-1])} or {[*SUFFIXES][-1]} file")
    if None not in (name, asked) and name != asked:
        raise UserError(f"{path} is no file of {asked}: leave --format out, or name a .{asked} file")
    return Encoding(asked or name or ("webp" if lossless else "png"), quality, lossless)


def encode(
    image: Image.Image,
    file: IO[bytes],
    texts: Mapping[str, str],
    encoding: Encoding = PNG,
    origin: Origin | None = None,
) -> None:
    """Write a picture with its texts, and what is said of its origin, signed where that has a signer.

    Raises OSError, and UserError for what the format cannot hold.
    """
    if origin is not None and origin.signer is not None:
        data = io.BytesIO()
        encode(image, data, texts, encoding, replace(origin, signer=None))
        file.write(origin.signer.sign(data.getvalue(), encoding.format, origin))
        return
    said = {} if origin is None else origin.statements
    if encoding.format == "png":
        chunks = PngInfo()
        for name, text in texts.items():
            chunks.add_text(name, text)
        if said:
            chunks.add_itxt(XMP_CHUNK, packet(said).decode())
        if AIGC in said:  # where many look for it
            chunks.add_text(AIGC_CHUNK, said[AIGC])
        image.save(file, format="PNG", pnginfo=chunks)
        return
    if max(image.size) > MAX_SIDE[encoding.format]:
        width, height = image.size
        raise UserError(f"{encoding.format} cannot hold {width}x{height} pixels: give --format png")
    if encoding.format == "jpeg" and image.has_transparency_data:
        raise UserError("a JPEG cannot be transparent: give --format png or webp")
    carried = _carried(texts, said, SEGMENT if encoding.format == "jpeg" else None)
    # To memory first: Pillow's encoders do not all say that a disk is full.
    data = io.BytesIO()
    image.save(data, format=encoding.format.upper(), **encoding.options, **carried)
    file.write(data.getbuffer())


def _carried(texts: Mapping[str, str], said: dict[str, str], room: int | None) -> dict[str, bytes]:
    """EXIF and XMP of a picture, each in less than `room` bytes; of what is too long, the origin at least."""
    exif = {"exif": _exif(texts)} if texts else {}
    whole = {CREATOR_TOOL: f"ldm {__version__}"} if texts else {}
    whole |= {name: texts[key] for name, key in ((DESCRIPTION, PARAMETERS), (REQUEST, CHUNK)) if key in texts}
    shorter = ({}, *(dict.fromkeys(names) for names in ((DESCRIPTION,), (DESCRIPTION, REQUEST))))
    packets = ({n: t for n, t in whole.items() if n not in left_out} | said for left_out in shorter)
    xmp: dict[str, str] = next((each for each in packets if room is None or len(packet(each)) < room), {})
    carried = exif | ({"xmp": packet(xmp)} if xmp else {})
    if room is not None:
        carried = {name: data for name, data in carried.items() if len(data) < room}
    if CHUNK in texts and REQUEST not in xmp:
        lost = "all of how it was drawn" if "exif" in carried else "how it was drawn"
        warnings.warn(f"a JPEG cannot hold a text this long: it does not say {lost}", stacklevel=4)
    return carried


def _exif(texts: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    exif[SOFTWARE] = f"ldm {__version__}"
    # "UNICODE" and big-endian UTF-16 is what piexif, and so AUTOMATIC1111, writes.
    comment = texts.get(PARAMETERS, "").encode("utf-16-be", "replace")
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + comment
    return exif.tobytes()
