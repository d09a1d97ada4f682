"""Thumbnails: small, made once, again for another picture, never more than their share of a disk."""

import os

import numpy as np
import pytest
from PIL import Image
from serve_server import running, wait

from ldm.errors import UserError
from ldm.images.provenance import MARKED, SOURCE, Marks, marks_in
from ldm.serve import pictures as module
from ldm.serve.pictures import Thumbnails


def picture(path, size=(600, 300), colour="red"):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_it_is_small_and_made_once(tmp_path, monkeypatch):
    own = Thumbnails(tmp_path / "t", MARKED)
    path = own.of(picture(tmp_path / "p" / "a.png"))
    assert path == tmp_path / "t" / "a.webp"
    image = Image.open(path)
    assert (image.size, image.format) == ((256, 128), "WEBP")
    assert path.stat().st_size < 4096
    monkeypatch.setattr(module, "open_picture", None)
    assert own.of(tmp_path / "p" / "a.png") == path


def test_of_another_picture_it_is_made_again(tmp_path):
    own = Thumbnails(tmp_path / "t", MARKED)
    path = picture(tmp_path / "p" / "a.png")
    own.of(path)
    picture(path, colour="blue")
    os.utime(path, (1e9, 1e9))  # an older file in its place, too
    assert np.asarray(Image.open(own.of(path)))[0, 0, 2] > 200
    own.remove("a")
    assert list((tmp_path / "t").iterdir()) == []


def test_the_oldest_go_beyond_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SWEEP", 1)
    probe = Thumbnails(tmp_path / "t", MARKED)
    paths = [picture(tmp_path / "p" / f"{k}.png", colour=(k, 0, 0)) for k in range(6)]
    for k, path in enumerate(paths):
        os.utime(path, (1e9 + k, 1e9 + k))
    size = probe.of(paths[5]).stat().st_size
    own = Thumbnails(tmp_path / "t", MARKED, kept=3 * size + size // 2)
    for path in paths[:5]:
        own.of(path)
    names = sorted(path.stem for path in (tmp_path / "t").iterdir())
    assert len(names) <= 4
    assert "5" in names
    assert "0" not in names


def test_what_is_no_picture_is_told(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"x\.png"):
        Thumbnails(tmp_path / "t", Marks(on=False)).of(path)
    assert not (tmp_path / "t").exists()


def test_the_server_has_them_and_they_say_where_they_come_from(tmp_path):
    with running(tmp_path) as (client, service):
        job = client.post("/api/jobs", json={"prompt": "a", "steps": 1, "W": 64, "H": 64, "seed": 1}).json()
        (name,) = wait(client, job["id"])["pictures"]
        answer = client.get(f"/api/pictures/{name}/thumbnail")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
        assert "trainedAlgorithmicMedia" in marks_in(answer.content)[SOURCE]
        assert client.get(f"/api/pictures/{name}/thumbnail").content == answer.content
        (kept,) = (service.store.folder / "thumbnails").iterdir()
        for wrong in ("nobody", "..%2f..%2fetc", f"{name}.png"):
            assert client.get(f"/api/pictures/{wrong}/thumbnail").status_code == 404
        assert client.delete(f"/api/pictures/{name}").status_code == 204
        assert not kept.exists()
        assert client.get(f"/api/pictures/{name}/thumbnail").status_code == 404
