"""The formats that pictures are written in, and how each carries the texts of its request.

PNG has text chunks: `parameters`, in the form that other tools read, and `ldm`, the whole request as JSON. In
JPEG, WebP and AVIF the first is EXIF's UserComment, as AUTOMATIC1111 writes it, and both are in XMP.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import UserError
from ldm.version import __version__

CHUNK, PARAMETERS = "ldm", "parameters"
EXIF_IFD, USER_COMMENT, SOFTWARE = 0x8769, 0x9286, 0x0131
SEGMENT = 2**16 - 64  # bytes that a JPEG holds of EXIF, and of XMP
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".avif": "avif"}
QUALITY = {"jpeg": 95, "webp": 90, "avif": 80}  # where none is asked for
MAX_SIDE = {"jpeg": 65_535, "webp": 16_383, "avif": 65_535}  # pixels
LDM, DC, RDF, XMP = (
    "urn:ldm:1.0:",
    "http://purl.org/dc/elements/1.1/",
    "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "http://ns.adobe.com/xap/1.0/",
)


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


def encode(image: Image.Image, file: IO[bytes], texts: Mapping[str, str], encoding: Encoding = PNG) -> None:
    """Write a picture with its texts. Raises OSError, and ValueError for one that the format cannot hold."""
    if encoding.format == "png":
        chunks = PngInfo()
        for name, text in texts.items():
            chunks.add_text(name, text)
        image.save(file, format="PNG", pnginfo=chunks)
        return
    if max(image.size) > MAX_SIDE[encoding.format]:
        width, height = image.size
        raise UserError(f"{encoding.format} cannot hold {width}x{height} pixels: give --format png")
    carried: dict[str, Any] = {}
    if texts:
        carried = {"exif": _exif(texts), "xmp": _xmp(texts)}
        if encoding.format == "jpeg":
            if len(carried["xmp"]) >= SEGMENT:
                carried["xmp"] = _xmp({name: text for name, text in texts.items() if name != PARAMETERS})
            carried = {name: data for name, data in carried.items() if len(data) < SEGMENT}
            if "xmp" not in carried:
                lost = "how it was drawn" if not carried else "all of how it was drawn"
                warnings.warn(f"a JPEG cannot hold a text this long: it does not say {lost}", stacklevel=2)
    # To memory first: Pillow's encoders do not all say that a disk is full.
    data = io.BytesIO()
    image.save(data, format=encoding.format.upper(), **encoding.options, **carried)
    file.write(data.getbuffer())


def _exif(texts: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    exif[SOFTWARE] = f"ldm {__version__}"
    # "UNICODE" and big-endian UTF-16 is what piexif, and so AUTOMATIC1111, writes.
    comment = texts.get(PARAMETERS, "").encode("utf-16-be", "replace")
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + comment
    return exif.tobytes()


def _xmp(texts: Mapping[str, str]) -> bytes:
    """An XMP packet (ISO 16684-1): what viewers show as the description, and the request for us."""
    own = f"<ldm:request>{escape(_allowed(texts[CHUNK]))}</ldm:request>" if CHUNK in texts else ""
    described = escape("".join(c if _in_xml(c) else "\ufffd" for c in texts.get(PARAMETERS, "")))
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about="" xmlns:dc="{DC}" xmlns:xmp="{XMP}" '
        f'xmlns:ldm="{LDM}"><xmp:CreatorTool>ldm {escape(__version__)}</xmp:CreatorTool>'
        f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{described}</rdf:li></rdf:Alt>'
        f'</dc:description>{own}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def request_in_xmp(packet: bytes | str) -> str | None:
    """The request's JSON in an XMP packet, whoever wrote it last; None where there is none to be read."""
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    if "<!" in text or LDM not in text:  # XMP declares no types and no entities
        return None
    try:
        tree = ElementTree.fromstring(text.strip("\0 \n\r\t\ufeff"))
    except ElementTree.ParseError:
        return None
    name = f"{{{LDM}}}request"
    found = [each.text for each in tree.iter(name)] + [each.get(name) for each in tree.iter()]
    return next(filter(None, found), None)


def _allowed(text: str) -> str:
    """The same JSON with escapes for the few characters that XML cannot hold."""
    return "".join(c if _in_xml(c) else f"\\u{ord(c):04x}" for c in text)


def _in_xml(c: str) -> bool:
    return c in "\t\n\r" or "\x20" <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c >= "\U00010000"
