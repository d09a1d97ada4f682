"""`ldm preprocess`: pictures of every kind in, control pictures out, and clear errors before any is made."""

import numpy as np
import pytest
from broken_pictures import encoded, scene
from PIL import Image

from ldm import cli
from ldm.preprocess import control_values, preprocess

pytest.importorskip("cv2", reason="no OpenCV: pip install 'ldm[control]'", exc_type=ImportError)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene(0).save("photo.png")


def run(*argv):
    return cli.main(["preprocess", *argv])


def array(path):
    return np.asarray(Image.open(path))


def test_one_picture(capsys):
    assert run("canny", "photo.png", "-o", "edges.png", "--low", "50", "--high", "90") == 0
    assert capsys.readouterr().out == "edges.png\n"
    expected = preprocess(np.asarray(scene(0)), "canny", low=50, high=90)
    assert np.array_equal(array("edges.png"), expected)
    assert expected.any()


def test_a_folder_and_more_pictures(tmp_path):
    (tmp_path / "many").mkdir()
    for i in range(2):
        scene(i).save(tmp_path / "many" / f"{i}.jpg")
    assert run("softedge", "many", "photo.png", "-o", "out", "-q") == 0
    names = ["0_softedge.png", "1_softedge.png", "photo_softedge.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_the_shorter_side_is_made_so_long():
    assert run("canny", "photo.png", "-o", "edges.png", "--resolution", "36", "-q") == 0
    assert Image.open("edges.png").size == (48, 36)


@pytest.mark.parametrize("mode", ["L", "CMYK", "I;16", "RGBA", "P", "1"])
def test_pictures_of_every_mode(mode):
    image = scene(3, mode="CMYK" if mode == "CMYK" else "RGBA" if mode == "RGBA" else "RGB")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode not in ("CMYK", "RGBA"):
        image = image.convert(mode)
    with open("given", "wb") as file:
        file.write(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    for name in ("softedge", "depth", "normal", "tile_resample"):
        assert run(name, "given", "-o", "out.png", "-q") == 0
        assert array("out.png").shape == (72, 96, 3)
        assert np.ptp(array("out.png")) > 0


def test_inpainting_keeps_what_is_missing_in_alpha():
    mask = Image.new("L", (96, 72))
    mask.paste(255, (10, 10, 40, 40))
    mask.save("mask.png")
    assert run("inpaint", "photo.png", "--mask", "mask.png", "-o", "out.png", "-q") == 0
    assert ((control_values(array("out.png")) == -1).all(0) == (np.asarray(mask) > 0)).all()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["canny", "gone.png"], "cannot read the picture gone.png"),
        (["canny", "text.png"], "it is not a picture"),
        (["canny", "photo.png", "--low", "300"], "low 300 is above high 200"),
        (["canny", "photo.png", "--low", "x"], "low x is not allowed: a number from 0 to 2040"),
        (["canny", "photo.png", "--sigma", "2"], "unknown option of canny 'sigma'"),
        (["canny", "photo.png", "--mask", "photo.png"], "takes none: leave --mask out"),
        (["canny", "photo.png", "--depth-model", "."], "--depth-model is not for canny"),
        (["inpaint", "photo.png"], "needs one"),
        (["seg", "photo.png"], "--segmentation-model FOLDER"),
        (["depth", "photo.png", "--depth-model", "."], "has no config.json"),
        (["hed", "photo.png"], "take softedge"),
        (["canny", "photo.png", "photo.png", "-o", "a.png"], "names one file, but 2 pictures"),
        (["canny", "photo.png", "photo.png", "-o", "out"], "two pictures would both be photo_canny.png"),
        (["canny", "photo.png", "-o", "a.jpg"], "control pictures are .png"),
        (["canny", "photo.png", "-o", "photo.png"], "would be written over itself"),
        (["canny", "empty"], "no pictures in empty"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(argv, said, capsys, tmp_path):
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(*argv) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_a_photo_gives_is_marked_as_nobodys_work():
    from ldm.images.provenance import marks_in

    assert run("canny", "photo.png", "-o", "edges.png", "-q") == 0
    with open("edges.png", "rb") as file:
        assert marks_in(file.read()) == {}
