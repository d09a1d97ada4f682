"""How pictures are marked, as flags; and `ldm provenance`: what they say of it, and whether it holds."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, printable, reason

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.images.provenance import Marks

VARIABLES = {"c2pa_certificate": "LDM_C2PA_CERTIFICATE", "c2pa_key": "LDM_C2PA_KEY"}
UNMARKED = 3  # exit code


def add_mark_flags(add: Callable[..., Any]) -> None:
    add(
        "--provenance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="say in the file that a model drew it: IPTC's digital source type, in XMP",
    )
    add(
        "--label",
        type=label,
        metavar="aigc[:PRODUCER]",
        help="and the label of GB 45438, in the producer's name (default: ldm)",
    )
    add(
        "--c2pa-certificate",
        type=Path,
        metavar="FILE",
        help="sign a C2PA manifest: the chain in PEM, leaf first (default: $LDM_C2PA_CERTIFICATE)",
    )
    add("--c2pa-key", type=Path, metavar="FILE", help="with this key, in PEM (default: $LDM_C2PA_KEY)")


def label(text: str) -> str:
    """ "aigc:a name" -> the name."""
    kind, _, producer = text.partition(":")
    if kind.lower() != "aigc":
        raise argparse.ArgumentTypeError(f"{text} is no label that is known: give aigc, or aigc:PRODUCER")
    return producer or "ldm"


def marks(args: argparse.Namespace) -> Marks:
    """How the pictures of this command are marked. Raises UserError, before anything is loaded."""
    from ldm.images.provenance import Marks

    given = {name: getattr(args, name) for name in VARIABLES}
    if not args.provenance:
        if args.label is not None or any(given.values()):
            raise UserError("--no-provenance leaves a picture unmarked: leave --label and --c2pa out")
        return Marks(on=False)
    certificate, key = (
        path or (Path(os.environ[VARIABLES[name]]) if os.environ.get(VARIABLES[name]) else None)
        for name, path in given.items()
    )
    if certificate is None and key is None:
        return Marks(producer=args.label)
    if certificate is None or key is None:
        raise UserError("a C2PA manifest needs both: give --c2pa-certificate and --c2pa-key")
    from ldm.images.signing import Signer

    return Marks(producer=args.label, signer=Signer(certificate, key))


# --- ldm provenance ---------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    from ldm.cli.flags import add_common_flags

    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="pictures")
    parser.add_argument(
        "--trust",
        type=Path,
        metavar="FILE",
        help="certificates in PEM: a manifest that one of them stands behind is trusted",
    )
    add_common_flags(parser)


def provenance(args: argparse.Namespace) -> int:
    """Print what each picture says of its origin.

    0: each says that a model had part in it, and all that can be verified holds; 1: something does not hold;
    3: one says nothing.
    """
    anchors = None
    if args.trust is not None:
        try:
            anchors = args.trust.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read certificates from {args.trust}: {reason(error)}") from None
    codes = []
    for path in args.files:
        code, lines = examine(path, anchors)
        codes.append(code)
        if not args.quiet:
            print(*(printable(f"{path}: {line}") for line in lines), sep="\n", flush=True)
    return 1 if 1 in codes else max(codes)


def examine(path: Path, anchors: str | None) -> tuple[int, list[str]]:
    """Its exit code, and what there is to say of one picture. Raises UserError for what is no picture."""
    from ldm.images.opening import open_picture, read_bytes
    from ldm.images.provenance import marks_in

    data = read_bytes(path)
    found = [*_of_text(marks_in(data)), *_of_manifest(data, anchors)]
    try:
        found += _of_pixels(open_picture(path, io.BytesIO(data)))
    except UserError as error:
        if not found:
            raise
        found.append((str(error), False))  # a damaged file, whose manifest says so
    lines = [line for line, _ in found]
    if all(holds is None for _, holds in found):
        return UNMARKED, [*lines, "nothing says that a model drew it"]
    return int(any(holds is False for _, holds in found)), lines


Found = Iterator[tuple[str, bool | None]]  # a line; whether the mark holds, None for what is none


def _of_text(said: dict[str, str]) -> Found:
    """What XMP and the AIGC label say, which anybody could have written."""
    from ldm.images.provenance import AIGC, GENERATED, SOURCE, SYSTEM, SYSTEM_VERSION, VOCABULARY, read_label
    from ldm.images.xmp import CREATOR_TOOL

    for name in (SOURCE, SYSTEM, SYSTEM_VERSION, CREATOR_TOOL):
        if name in said:
            value = said[name].removeprefix(VOCABULARY)
            by_model = (name == SOURCE and value in GENERATED) or name == SYSTEM
            yield f"{name}: {value}", True if by_model else None
    if AIGC not in said:
        return
    try:
        fields = read_label(said[AIGC])
    except UserError as error:
        yield f"{AIGC}: {error}", False
    else:
        yield f"{AIGC}: label {fields['Label']}, producer {fields['ContentProducer']}", True


def _of_manifest(data: bytes, anchors: str | None) -> Found:
    """What a C2PA manifest says, and whether it holds: with `anchors`, that of one they trust."""
    from ldm.images.provenance import GENERATED
    from ldm.images.signing import has_manifest, read_manifest

    if not has_manifest(data):
        return
    manifest = read_manifest(data, anchors)
    if manifest is None:
        return
    inputs = f", of {manifest.inputs} inputs" if manifest.inputs else ""
    sources = ", ".join(manifest.sources) or "it does not say how it was made"
    yield (
        f"C2PA: {sources}{inputs}; signed by {manifest.signer or 'nobody'}",
        True if manifest.holds and ({*manifest.sources} & {*GENERATED}) else None,
    )
    holds = manifest.state == "Trusted" if anchors is not None else manifest.holds
    faults = f" ({', '.join(manifest.faults)})" if manifest.faults else ""
    yield f"C2PA: {manifest.state.lower()}{faults}", None if holds else False


def _of_pixels(image: Image) -> Found:
    """Whether a watermark is in the pixels, by everybody's key or one's own."""
    import numpy as np

    from ldm.images.watermark import FALSE_POSITIVES, detect, key_named
    from ldm.request.fields import PUBLIC_MARK, mark_named, own_key

    names = [PUBLIC_MARK] if (own := own_key()) is None else [PUBLIC_MARK, mark_named(own)]
    for name in names:
        found = detect(np.asarray(image), key_named(name))
        if found.found:
            yield f"watermark: {name}, z {found.z:.1f} (by chance: at most {found.chance:.0e})", True
        elif name != PUBLIC_MARK:
            yield f"watermark: none by {name} (z {found.z:.1f}; {FALSE_POSITIVES:.0e} is asked for)", None
