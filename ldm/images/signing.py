"""C2PA manifests (c2pa.org, specification 2.2) by the c2pa package: signed by the user, and read.

All of it offline: no time stamp, no manifest at an address, no list of trust is fetched. Thumbnails are left
out, which would be larger than many pictures.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import UserError, reason
from ldm.images.opening import formats
from ldm.images.provenance import COMPOSITE, VOCABULARY, Origin
from ldm.version import __version__

MIME = {name: f"image/{name}" for name in ("png", "jpeg", "webp", "avif", "tiff")}
INSTALL = "pip install 'ldm[c2pa]'"
# Where a certificate's key is of this kind, what signs with it (RFC 9053; C2PA 2.2, section 13.2).
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_PARENT = "xmp:iid:input"
_OFFLINE: dict[str, Any] = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}


@dataclass(frozen=True)
class Manifest:
    """What a file's manifest says, and whether it holds."""

    state: str  # Trusted, Valid (by a certificate that nobody here trusts), Invalid
    faults: tuple[str, ...]  # codes of the specification, such as assertion.dataHash.mismatch
    signer: str
    sources: tuple[str, ...]  # digital source types of its actions, the vocabulary left out
    inputs: int  # manifests of the pictures that it was made from

    @property
    def holds(self) -> bool:
        return self.state != "Invalid"


class Signer:
    """Signs files by a certificate's chain, leaf first, and its key, both PEM. Raises UserError."""

    def __init__(self, certificate: Path, key: Path) -> None:
        _import()
        self.certificate = certificate
        self._chain, self._key = _read(certificate, "certificate"), _read(key, "key")
        self._algorithm = _algorithm(self._chain, certificate, self._key, key)
        self.sign(_pixel(), "png", Origin(COMPOSITE, "ldm", __version__))  # what is refused is told now

    def sign(self, data: bytes, kind: str, origin: Origin) -> bytes:
        """The file with a manifest; `kind` is one of MIME. Raises UserError."""
        c2pa = _import()
        info = c2pa.C2paSignerInfo(self._algorithm, self._chain, self._key, None)
        signed = io.BytesIO()
        try:
            with (
                c2pa.Context.from_dict(_OFFLINE) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(_manifest(origin), context) as builder,
            ):
                if origin.parent is not None and (mime := _mime(origin.parent)) is not None:
                    parent = {"title": "input", "relationship": "parentOf", "instance_id": _PARENT}
                    builder.add_ingredient(parent, mime, io.BytesIO(origin.parent))
                builder.sign(signer, MIME[kind], io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise UserError(
                f"cannot sign by {self.certificate}: {' '.join(str(error).split())}; it wants a certificate "
                "for digitalSignature and emailProtection, with its chain behind it (docs/provenance.md)"
            ) from None
        return signed.getvalue()


def read_manifest(data: bytes, anchors: str | None = None) -> Manifest | None:
    """The manifest in a picture's file, verified; None where there is none.

    Args:
        anchors: certificates (PEM) whose signers are trusted.

    Raises:
        UserError: where the package is missing.
    """
    c2pa = _import()
    settings = dict(_OFFLINE)
    if anchors is not None:
        settings["trust"] = {"user_anchors": anchors}
    try:
        with c2pa.Context.from_dict(settings) as context:
            reader = c2pa.Reader.try_create(_mime(data) or "", io.BytesIO(data), context=context)
            if reader is None:
                return None
            with reader:
                return _told(json.loads(reader.json()))
    except c2pa.C2paError as error:
        if not has_manifest(data):
            return None
        return Manifest("Invalid", (reason(error),), "", (), 0)


def has_manifest(data: bytes) -> bool:
    """Whether a file holds the box that each manifest's store begins with, without reading it."""
    return b"jumb" in data and b"c2pa" in data


def _told(store: dict[str, Any]) -> Manifest:
    manifests = store.get("manifests", {})
    active = manifests.get(store.get("active_manifest"), {})
    results = store.get("validation_results", {}).get("activeManifest", {})
    actions = [
        action
        for each in active.get("assertions", [])
        if each.get("label", "").startswith("c2pa.actions")
        for action in each["data"].get("actions", [])
    ]
    sources = dict.fromkeys(filter(None, (action.get("digitalSourceType") for action in actions)))
    signature = active.get("signature_info", {})
    names = filter(None, (signature.get("common_name"), signature.get("issuer")))
    return Manifest(
        state=str(store.get("validation_state", "Invalid")),
        faults=tuple(dict.fromkeys(str(each.get("code")) for each in results.get("failure", []))),
        signer=", ".join(names),
        sources=tuple(str(each).removeprefix(VOCABULARY) for each in sources),
        inputs=len(active.get("ingredients", [])),
    )


def _manifest(origin: Origin) -> dict[str, Any]:
    """The definition of a manifest: one action, by the model, on nothing or on the picture drawn from."""
    agent = {"name": origin.system, "version": origin.version}
    done = {"digitalSourceType": VOCABULARY + origin.source, "softwareAgent": agent}
    actions: list[dict[str, Any]] = [{"action": "c2pa.created", **done}]
    if origin.parent is not None and _mime(origin.parent) is not None:
        opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": [_PARENT]}}
        actions = [opened, {"action": "c2pa.edited", **done}]
    return {
        "claim_generator_info": [{"name": "ldm", "version": __version__}],
        "title": "picture",
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }


def _mime(data: bytes) -> str | None:
    """Of a picture's file; None for a kind that carries no manifest here."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=formats()) as image:
        return MIME.get(str(image.format).lower())
    return None


def _algorithm(chain: bytes, certificate: Path, key: bytes, path: Path) -> str:
    """What signs with this key. Raises UserError for one that is not the certificate's."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise UserError(f"{certificate} is no certificate in PEM: {reason(error)}") from None
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no private key in PEM without a password: {reason(error)}") from None
    if leaf.issuer == leaf.subject:
        raise UserError(
            f"{certificate} begins with a certificate that is signed by itself, which C2PA does not take: "
            "give one that another has signed, with that behind it"
        )
    if leaf.public_key() != private.public_key():
        raise UserError(f"{path} is not the key of {certificate}, whose first certificate has another")
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in _CURVES:
        return _CURVES[private.curve.name]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    raise UserError(f"{path} holds a key of a kind that C2PA does not take: make one of the curve P-256")


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {reason(error)}") from None


def _import() -> Any:
    try:
        import c2pa
    except ImportError as error:  # its library may be missing, too
        raise UserError(f"C2PA manifests need {error.name or 'c2pa'}: {INSTALL}") from None
    return c2pa


def _pixel() -> bytes:
    """The smallest file that can be signed."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, format="PNG")
    return file.getvalue()
