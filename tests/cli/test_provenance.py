"""Flags that mark pictures, and `ldm provenance`, which reads and verifies the marks."""

import numpy as np
import pytest
from certificates import write_certificates
from fake_pipeline import files
from PIL import Image

from ldm import cli
from ldm.images.png import save_png
from ldm.images.provenance import AIGC, COMPOSITE, SOURCE, TRAINED, VOCABULARY, marks_in
from ldm.request import Request


@pytest.fixture
def certificates(tmp_path):
    pytest.importorskip("c2pa", reason="no c2pa: pip install 'ldm[c2pa]'", exc_type=ImportError)
    return write_certificates(tmp_path)


def said(path):
    with open(path, "rb") as file:
        return marks_in(file.read())


def test_every_file_of_a_run_is_marked(fake):
    argv = ["-p", "a", "-b", "2", "--outdir", "o", "-q"]
    assert cli.txt2img(argv) == 0
    for name in ("o/samples/00000.png", "o/grid-0000.png"):
        assert said(name)[SOURCE] == VOCABULARY + TRAINED, name
    Image.new("RGB", (24, 16)).save("in.png")
    assert cli.txt2img([*argv, "-i", "in.png", "--outdir", "p"]) == 0
    for name in ("p/samples/00000.png", "p/grid-0000.png"):
        assert said(name)[SOURCE] == VOCABULARY + COMPOSITE, name


def test_one_flag_switches_it_off(fake, tmp_path):
    assert cli.txt2img(["-p", "a", "-b", "2", "--outdir", "o", "-q", "--no-provenance"]) == 0
    for name in files("o"):
        assert said(tmp_path / "o" / name) == {}, name


def test_redraw_marks_what_it_keeps(fake):
    assert cli.txt2img(["-p", "a", "-o", "a.png", "-q"]) == 0
    assert cli.main(["redraw", "a.png", "-o", "b.jpg", "-q", "--label", "aigc:me"]) == 0
    assert said("b.jpg")[SOURCE] == VOCABULARY + TRAINED
    assert '"ContentProducer":"me"' in said("b.jpg")[AIGC]
    assert cli.main(["redraw", "a.png", "-o", "c.png", "-q", "--no-provenance"]) == 0
    assert said("c.png") == {}


def test_what_was_found_is_told_and_the_exit_code_tells(fake, capsys):
    assert cli.txt2img(["-p", "a", "-o", "a.png", "-q", "--label", "aigc:me"]) == 0
    capsys.readouterr()
    assert cli.main(["provenance", "a.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"a.png: {SOURCE}: {TRAINED}"
    assert f"a.png: {AIGC}: label 1, producer me" in lines
    Image.new("RGB", (8, 8)).save("plain.png")
    assert cli.main(["provenance", "plain.png", "a.png"]) == 3
    assert "plain.png: nothing says that a model drew it" in capsys.readouterr().out
    assert cli.main(["provenance", "words.txt"]) == 2
    with open("words.txt", "w", encoding="utf-8") as file:
        file.write("words")
    assert cli.main(["provenance", "words.txt"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_a_camera_took_is_not_marked(tmp_path, capsys):
    packet = (
        '<rdf:Description xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'e:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"/>'
    ).replace("<rdf:Description", '<rdf:Description xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"')
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", xmp=packet.encode())
    assert cli.main(["provenance", str(tmp_path / "a.jpg")]) == 3
    assert "digitalCapture" in capsys.readouterr().out


def test_hostile_marks_write_nothing_to_the_terminal(tmp_path, capsys):
    request = Request(prompt="a", model="\x1b]0;owned\x07\r\u202e", height=8, width=8)
    path = save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", request)
    assert cli.main(["provenance", str(path)]) == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\u202e"} & {*out}


def test_a_broken_label_does_not_hold(tmp_path, capsys):
    xmp = b'<a xmlns:t="http://www.tc260.org.cn/ns/AIGC/1.0/"><t:AIGC>{}</t:AIGC></a>'
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", xmp=xmp)
    assert cli.main(["provenance", str(tmp_path / "a.webp")]) == 1
    assert "the AIGC label has no Label" in capsys.readouterr().out


def test_a_watermark_is_drawn_again_and_found(tiny, tiny_folder, loaded_once, monkeypatch, capsys):
    model = ["-m", str(tiny_folder), "--dtype", "fp32", "-q"]
    size = ["-W", "128", "-H", "128", "--steps", "1", "-q"]
    assert cli.txt2img([*tiny, *size, "-o", "plain.png"]) == 0
    assert cli.txt2img([*tiny, *size, "-o", "a.png", "--watermark"]) == 0
    assert cli.main(["provenance", "plain.png"]) == 0
    assert "watermark" not in capsys.readouterr().out
    assert cli.main(["provenance", "a.png"]) == 0
    assert "watermark: ldm, z " in capsys.readouterr().out
    assert cli.main(["redraw", "a.png", *model]) == 0
    assert cli.main(["redraw", "plain.png", *model]) == 0
    assert capsys.readouterr().out.count("equal: every pixel") == 2
    with Image.open("a.png") as image, Image.open("plain.png") as plain:
        change = np.abs(np.asarray(image, int) - np.asarray(plain))
        assert 0 < change.mean() < 10
        image.convert("RGB").resize((64, 64)).save("small.jpg", quality=90)
    assert cli.main(["provenance", "small.jpg"]) == 0
    assert "watermark: ldm, z " in capsys.readouterr().out
    assert cli.txt2img([*tiny, *size, "-o", "b.png", "--from-png", "a.png", "--no-watermark"][2:]) == 0
    assert cli.main(["provenance", "b.png"]) == 0
    assert "watermark" not in capsys.readouterr().out
    # By a secret key.
    monkeypatch.setenv("LDM_WATERMARK_KEY", "a secret")
    assert cli.txt2img([*tiny, *size, "-o", "c.png", "--watermark"]) == 0
    assert cli.main(["redraw", "c.png", *model]) == 0
    assert cli.main(["redraw", "a.png", *model]) == 0
    capsys.readouterr()
    assert cli.main(["provenance", "c.png", "a.png"]) == 0
    out = capsys.readouterr().out
    assert "c.png: watermark: key:" in out
    assert "a.png: watermark: none by key:" in out
    with open("c.png", "rb") as file:
        assert b"a secret" not in file.read()
    monkeypatch.delenv("LDM_WATERMARK_KEY")
    assert cli.main(["redraw", "c.png", *model]) == 2
    assert "set LDM_WATERMARK_KEY" in capsys.readouterr().err
    assert cli.txt2img([*tiny, "-W", "32", "-H", "64", "-q", "-o", "d.png", "--watermark"]) == 2
    assert "at least 64 a side" in capsys.readouterr().err


# --- C2PA ------------------------------------------------------------------------------------------------


def test_a_run_is_signed_and_a_flipped_byte_is_found(fake, certificates, monkeypatch, capsys):
    root, chain, key, _ = certificates
    argv = ["-p", "a", "-q", "--c2pa-certificate", str(chain), "--c2pa-key", str(key)]
    assert cli.txt2img([*argv, "-o", "a.jpg"]) == 0
    assert cli.main(["provenance", "a.jpg"]) == 0
    out = capsys.readouterr().out
    assert "C2PA: trainedAlgorithmicMedia; signed by a leaf, Testers" in out
    assert "C2PA: valid (signingCredential.untrusted)" in out
    assert cli.main(["provenance", "a.jpg", "--trust", str(root)]) == 0
    assert "C2PA: trusted" in capsys.readouterr().out
    other = root.parent / "other"
    other.mkdir()
    assert cli.main(["provenance", "a.jpg", "--trust", str(write_certificates(other)[0])]) == 1
    assert "C2PA: valid (signingCredential.untrusted)" in capsys.readouterr().out
    with open("a.jpg", "rb") as file:
        data = bytearray(file.read())
    data[-20] ^= 1
    with open("b.jpg", "wb") as file:
        file.write(data)
    assert cli.main(["provenance", "b.jpg"]) == 1
    assert "assertion.dataHash.mismatch" in capsys.readouterr().out
    monkeypatch.setenv("LDM_C2PA_CERTIFICATE", str(chain))
    monkeypatch.setenv("LDM_C2PA_KEY", str(key))
    assert cli.txt2img(["-p", "a", "-q", "--outdir", "o", "-b", "2"]) == 0
    assert cli.main(["provenance", "--trust", str(root), "o/samples/00000.png", "o/grid-0000.png"]) == 0
    assert capsys.readouterr().out.count("C2PA: trusted") == 2


def test_a_flipped_pixel_of_a_png_is_told_as_broken(fake, certificates, capsys):
    _, chain, key, _ = certificates
    argv = ["-p", "a", "-q", "-o", "a.png", "--c2pa-certificate", str(chain), "--c2pa-key", str(key)]
    assert cli.txt2img(argv) == 0
    with open("a.png", "rb") as file:
        data = bytearray(file.read())
    data[data.rindex(b"IDAT") + 40] ^= 1
    with open("a.png", "wb") as file:
        file.write(data)
    assert cli.main(["provenance", "a.png"]) == 1
    assert "C2PA: invalid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--no-provenance", "--label", "aigc"], "leaves a picture unmarked"),
        (["--c2pa-key", "key.pem"], "needs both"),
        (["--c2pa-certificate", "none.pem", "--c2pa-key", "key.pem"], "cannot read the certificate"),
        (["--c2pa-certificate", "alone.pem", "--c2pa-key", "key.pem"], "signed by itself"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(
    certificates, monkeypatch, tmp_path, capsys, argv, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.cli.drawing.draw.load", lambda args: pytest.fail("the model was loaded"))
    assert cli.txt2img(["-p", "a", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_label_that_is_unknown(capsys):
    with pytest.raises(SystemExit):
        cli.txt2img(["-p", "a", "--label", "eu"])
    assert "give aigc" in capsys.readouterr().err
