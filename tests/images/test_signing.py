"""C2PA manifests: signed, verified, kept from a picture's input, and broken by a flipped byte."""

import numpy as np
import pytest
from certificates import write_certificates
from PIL import Image

from ldm.errors import UserError
from ldm.images import signing
from ldm.images.formats import Encoding
from ldm.images.png import read_request, save_png
from ldm.images.provenance import COMPOSITE, SOURCE, TRAINED, VOCABULARY, Marks, marks_in
from ldm.request import Request

REQUEST = Request(prompt="a red boat", height=48, width=64, model="a model", model_hash="0123456789")
FORMATS = ("png", "jpeg", "webp", "avif")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    pytest.importorskip("c2pa", reason="no c2pa: pip install 'ldm[c2pa]'", exc_type=ImportError)
    return write_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def signer(certificates):
    _, chain, key, _ = certificates
    return signing.Signer(chain, key)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_a_signed_picture_is_verified_and_all_else_is_kept(tmp_path, certificates, signer, name):
    plain = save_png(picture(), tmp_path / "plain", REQUEST, Encoding(name))
    path = save_png(picture(), tmp_path / "a", REQUEST, Encoding(name), Marks(signer=signer))
    data = path.read_bytes()
    manifest = signing.read_manifest(data)
    assert (manifest.state, manifest.faults) == ("Valid", ("signingCredential.untrusted",))
    assert (manifest.signer, manifest.sources, manifest.inputs) == ("a leaf, Testers", (TRAINED,), 0)
    trusted = signing.read_manifest(data, certificates[0].read_text())
    assert (trusted.state, trusted.faults) == ("Trusted", ())
    assert read_request(path) == REQUEST
    assert marks_in(data)[SOURCE] == VOCABULARY + TRAINED
    with Image.open(path) as a, Image.open(plain) as b:
        assert np.array_equal(a, b)
    assert len(data) - plain.stat().st_size < 6000  # no thumbnail


@pytest.mark.parametrize("name", FORMATS)
def test_a_flipped_byte_is_found(tmp_path, signer, name):
    path = save_png(picture(), tmp_path / "a", REQUEST, Encoding(name), Marks(signer=signer))
    data = path.read_bytes()
    for place in (len(data) // 2, data.index(b"a model via") + 2):
        flipped = bytearray(data)
        flipped[place] ^= 1
        manifest = signing.read_manifest(bytes(flipped))
        assert not manifest.holds
        assert any("mismatch" in fault for fault in manifest.faults)


def test_the_manifest_of_the_input_is_kept(tmp_path, certificates, signer):
    first = save_png(picture(), tmp_path / "a.jpg", REQUEST, Encoding("jpeg"), Marks(signer=signer))
    request = REQUEST.replace(image=str(first))
    made = save_png(picture(1), tmp_path / "b.png", request, marks=Marks(signer=signer))
    manifest = signing.read_manifest(made.read_bytes(), certificates[0].read_text())
    assert (manifest.state, manifest.inputs, manifest.sources) == ("Trusted", 1, (TRAINED,))
    picture().save(tmp_path / "photograph.png")
    edited = REQUEST.replace(image=str(tmp_path / "photograph.png"))
    made = save_png(picture(1), tmp_path / "c.png", edited, marks=Marks(signer=signer))
    manifest = signing.read_manifest(made.read_bytes())
    assert (manifest.inputs, manifest.sources) == (1, (COMPOSITE,))


def test_certificates_that_cannot_sign(tmp_path, certificates):
    root, chain, key, alone = certificates
    with pytest.raises(UserError, match="signed by itself"):
        signing.Signer(alone, key)
    with pytest.raises(UserError, match="signed by itself"):
        signing.Signer(root, key)
    (tmp_path / "other").mkdir()
    _, _, other_key, _ = write_certificates(tmp_path / "other")
    with pytest.raises(UserError, match="is not the key of"):
        signing.Signer(chain, other_key)
    with pytest.raises(UserError, match="is no private key in PEM"):
        signing.Signer(chain, chain)
    with pytest.raises(UserError, match="is no certificate in PEM"):
        signing.Signer(key, key)
    with pytest.raises(UserError, match="cannot read the certificate"):
        signing.Signer(tmp_path / "none.pem", key)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"words" * 100])
def test_what_has_no_manifest(certificates, data):
    assert signing.read_manifest(data) is None


def test_without_the_package_one_line_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    with pytest.raises(UserError, match=r"pip install 'ldm\[c2pa\]'"):
        signing.read_manifest(b"")
