"""What a picture says of its origin: IPTC's digital source type in XMP, the AIGC label of GB 45438.

`Marks` is how a run marks its pictures, `Origin` what one of them says. Marks of a picture that another was
drawn from are kept: what says that it is a model's work stays so.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ldm.errors import UserError
from ldm.files import is_remote
from ldm.images.opening import formats, read_bytes
from ldm.images.xmp import CREATOR_TOOL, statements_in
from ldm.request import IMAGES
from ldm.version import __version__

if TYPE_CHECKING:
    from ldm.images.signing import Signer
    from ldm.request import Request

# https://cv.iptc.org/newscodes/digitalsourcetype: all a model's, and a model's in part.
VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TRAINED, COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
GENERATED = (TRAINED, COMPOSITE)
# IPTC Photo Metadata Standard 2025.1.
SOURCE, SYSTEM, SYSTEM_VERSION = (
    f"Iptc4xmpExt:{name}" for name in ("DigitalSourceType", "AISystemUsed", "AISystemVersionUsed")
)
AIGC, AIGC_CHUNK = "TC260:AIGC", "AIGC"
# GB 45438-2025, annex E: 1 is for what is generated, 2 for what may be, 3 for what is thought to be.
LABEL_FIELDS = (
    "Label",
    "ContentProducer",
    "ProduceID",
    "ReservedCode1",
    "ContentPropagator",
    "PropagateID",
    "ReservedCode2",
)


@dataclass(frozen=True)
class Origin:
    """What one picture says of where it comes from."""

    source: str  # one of GENERATED
    system: str
    version: str
    label: str | None = None  # the JSON of GB 45438
    signer: Signer | None = None
    parent: bytes | None = None  # the file of the picture that it was drawn from, where that is known

    @property
    def statements(self) -> dict[str, str]:
        """By their names in XMP."""
        said = {
            CREATOR_TOOL: f"ldm {__version__}",
            SOURCE: VOCABULARY + self.source,
            SYSTEM: self.system,
            SYSTEM_VERSION: self.version,
        }
        return said if self.label is None else {**said, AIGC: self.label}


@dataclass(frozen=True)
class Marks:
    """How the pictures of a run are marked.

    Attributes:
        on: False: nothing is said.
        source: of pictures without a request, such as sheets; None: nothing is said of those.
        producer: who is named by an AIGC label; None: pictures carry that of their input, if it has one.
        signer: signs each file, last of all.
        parent: the file of the picture that all are drawn from, where it came from memory.
    """

    on: bool = True
    source: str | None = None
    producer: str | None = None
    signer: Signer | None = None
    parent: bytes | None = None

    def origin(self, image: Image.Image, request: Request | None) -> Origin | None:
        """What `image` is to say; `request` draws it. None: nothing."""
        if not self.on or (request is None and self.source is None):
            return None
        name, version, source, parent = "ldm", __version__, self.source or TRAINED, None
        if request is not None:
            model = f", model {request.model_hash}" if request.model_hash else ""
            name, version = f"{request.model} via ldm" if request.model else "ldm", f"{__version__}{model}"
            if request.has_images or {*IMAGES} & {*request.not_kept}:
                source, parent = COMPOSITE, _input_of(request) or self.parent
        said = {} if parent is None else _marks_of_file(parent)
        if said.get(SOURCE) == VOCABULARY + TRAINED:
            source = TRAINED
        systems = dict.fromkeys([name, *filter(None, said.get(SYSTEM, "").split("; "))])
        label = said.get(AIGC) if self.producer is None else label_of(image, self.producer)
        return Origin(source, "; ".join(systems), version, label, self.signer, parent)


MARKED = Marks()


def label_of(image: Image.Image, producer: str) -> str:
    """The AIGC label of what is generated: JSON in ASCII. Who produces a picture is its first propagator.

    Its number is the SHA-256 of the pixels, so that the same picture has the same.
    """
    number = hashlib.sha256(image.tobytes()).hexdigest()[:32]
    values = ("1", producer, number, "", producer, number, "")
    return json.dumps(dict(zip(LABEL_FIELDS, values, strict=True)), separators=(",", ":"))


def read_label(text: str) -> dict[str, str]:
    """The fields of an AIGC label, alone or within {"AIGC": ...}. Raises UserError for what is none."""
    label: object = None
    with contextlib.suppress(ValueError, RecursionError):
        label = json.loads(text)
    if isinstance(label, dict):
        label = label.get("AIGC", label)
    if not isinstance(label, dict):
        raise UserError("the AIGC label is no JSON object")
    missing = [name for name in LABEL_FIELDS if not isinstance(label.get(name), str)]
    if missing:
        raise UserError(f"the AIGC label has no {', '.join(missing)}")
    if label["Label"] not in ("1", "2", "3"):
        raise UserError(f"the AIGC label says {label['Label']!r}, which GB 45438 does not know")
    return {name: label[name] for name in LABEL_FIELDS}


def marks_in(data: bytes) -> dict[str, str]:
    """What a picture's file says of its origin, by the names in XMP; {} for what cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            image.load()  # a PNG may have texts after its pixels
            return marks_of(image)
    except Exception:  # broken files make decoders raise anything
        return {}


def marks_of(image: Image.Image) -> dict[str, str]:
    """Of a picture that is open and loaded."""
    said = statements_in(image.info.get("xmp", b""))
    names = (CREATOR_TOOL, SOURCE, SYSTEM, SYSTEM_VERSION, AIGC)
    found = {name: said[name] for name in names if name in said}
    label = getattr(image, "text", {}).get(AIGC_CHUNK)
    return found if label is None else {AIGC: str(label), **found}


def _input_of(request: Request) -> bytes | None:
    """The file that a picture was drawn from, if it is still there and still that file."""
    path = request.image
    if path is None or is_remote(path):
        return None
    with contextlib.suppress(UserError, OSError):
        told = Path(path).stat()
        data, digest = _read_once(Path(path), told.st_mtime_ns, told.st_size)
        if request.image_sha256 in (None, digest):
            return data
    return None


@lru_cache(maxsize=1)
def _read_once(path: Path, _mtime: int, _size: int) -> tuple[bytes, str]:
    """A file and its SHA-256: many pictures may be drawn from one."""
    data = read_bytes(path)
    return data, hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=1)
def _marks_of_file(data: bytes) -> dict[str, str]:
    return marks_in(data)
