"""What is on disk: the PNGs are the truth, the index follows them, jobs are never silently lost."""

import json
import os
import shutil
import sqlite3

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.images.png import read_request
from ldm.request import Request
from ldm.serve.store import Store
from ldm.serve.ticket import State, Ticket


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "s")
    yield made
    made.close()


def ticket(prompt="a boat", state=State.QUEUED):
    made = Ticket(Request(prompt=prompt, seeds=(3,)), "model")
    made.state = state
    return made


def keep(store, prompt, colour=0):
    """A picture of a job of its own."""
    own = ticket(prompt)
    name = store.keep(own, Image.new("RGB", (16, 8), (colour, 0, 0)), own.request)
    own.pictures.append(name)
    return name


def restarted(store):
    store.close()
    return Store(store.folder)


def test_a_kept_picture_is_a_png_that_says_how_it_was_drawn(store):
    name = keep(store, "a boat", 200)
    kept = store.get(name)
    assert read_request(kept.path) == Request(prompt="a boat", seeds=(3,))
    assert np.asarray(Image.open(kept.path))[0, 0].tolist() == [200, 0, 0]
    assert (kept.width, kept.height, kept.request["prompt"]) == (16, 8, "a boat")


def test_the_index_is_rebuilt_from_the_folder(store):
    names = [keep(store, f"boat {k}") for k in range(3)]
    gone, changed, kept = (store.get(name).path for name in names)
    store.close()
    gone.unlink()
    shutil.copy(kept, kept.with_name("from-elsewhere.png"))
    Image.new("RGB", (24, 24)).save(changed)
    (store.pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    (store.folder / "index.sqlite").unlink()
    store = Store(store.folder)
    found, _ = store.page(10)
    assert {each.id for each in found} == {names[1], names[2], "from-elsewhere"}
    by_id = {each.id: each for each in found}
    assert by_id["from-elsewhere"].request["prompt"] == "boat 2"
    assert (by_id[names[1]].width, by_id[names[1]].request) == (24, None)
    store.close()


def test_a_damaged_index_is_kept_aside_and_made_anew(store):
    name = keep(store, "a boat")
    store.close()
    (store.folder / "index.sqlite").write_bytes(b"no database at all" * 100)
    store = Store(store.folder)
    assert [each.id for each in store.page(10)[0]] == [name]
    assert (store.folder / "index.sqlite.damaged").exists()
    store.close()


@pytest.mark.parametrize("removes", [False, True])
def test_pages_have_each_picture_once_even_while_new_ones_come(store, removes):
    names = [keep(store, f"boat {k}") for k in range(7)]
    assert [each.id for each in store.page(10, search="BOAT 3")[0]] == [names[3]]
    seen, before = [], None
    while True:
        found, before = store.page(3, before)
        seen += [each.id for each in found]
        keep(store, "a new one")
        if removes:
            store.remove(found[-1].id)  # the place where the page ended need not stay
        if before is None:
            break
    assert seen == names[::-1]
    with pytest.raises(UserError, match="before 'x' is not allowed"):
        store.page(3, "x")


def test_jobs_that_waited_are_told_of_after_a_restart(store):
    waiting, drawing, done = ticket("w"), ticket("d", State.GENERATING), ticket("ok", State.COMPLETED)
    drawing.pictures.append(store.keep(drawing, Image.new("RGB", (8, 8)), drawing.request))
    for each in (waiting, drawing, done):
        store.note(each)
    store = restarted(store)
    assert store.interrupted == 2
    for each in (waiting, drawing):
        told = store.job(each.id)
        assert told["status"] == "interrupted"
        assert "ask for it again" in told["error"]
        assert told["pictures"] == each.pictures  # what was finished is there
    assert store.job(done.id)["status"] == "completed"
    store.close()


def test_two_servers_do_not_share_a_folder(store):
    with pytest.raises(UserError, match="is another server at it"):
        Store(store.folder)


@pytest.mark.parametrize("name", ["../secret", "..", ".hidden", "a/b", "/etc/passwd", "a\0b", "", "x" * 200])
def test_no_name_leads_out_of_the_folder(store, name):
    (store.folder / "secret.png").write_bytes(b"secret")
    assert store.get(name) is None
    assert not store.remove(name)


def test_links_are_not_followed(store, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", store.pictures / "link.png")
    os.symlink(tmp_path, store.pictures / "folder")
    store.rebuild()
    assert store.page(10)[0] == []
    name = keep(store, "a boat")  # one that becomes a link later
    path = store.get(name).path
    path.unlink()
    os.symlink(tmp_path / "outside.png", path)
    assert store.get(name) is None


def test_the_index_holds_what_the_api_tells(store):
    own = ticket("a boat", State.FAILED)
    store.note(own)
    store.close()
    with sqlite3.connect(store.folder / "index.sqlite") as db:
        (told,) = db.execute("SELECT told FROM jobs").fetchone()
    assert json.loads(told)["request"]["prompt"] == "a boat"
