"""Tickets drawn by a real tiny model: alone or together the same picture, and each fails alone."""

import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.errors import UserError
from ldm.images.png import read_request
from ldm.request import Request
from ldm.serve import drawing as module
from ldm.serve.drawing import Drawing, Saver
from ldm.serve.limits import Limits
from ldm.serve.models import Shelf
from ldm.serve.store import Store
from ldm.serve.ticket import State, Ticket


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, dtype="fp32")


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "s")
    yield made
    made.close()


@pytest.fixture
def draw(pipe, store):
    return Drawing(Shelf(pipe, ldm.load), store.folder, store.keep, Limits(), 4)


def tickets(pipe, *requests):
    return [Ticket(Request(num_inference_steps=3, **fields), pipe.name) for fields in requests]


def begun(made):
    for each in made:
        assert each.begin()
    return made


def pixels(store, name):
    return np.asarray(Image.open(store.get(name).path))


BOATS = [
    {"prompt": "the red boat", "seeds": (1, 2)},
    {"prompt": "sea", "seeds": (2,)},
    {"prompt": "", "seeds": (5,)},
]


def test_pictures_drawn_together_are_those_drawn_alone(pipe, store, draw, monkeypatch):
    sizes = []
    real = module.draw_batch
    monkeypatch.setattr(
        module, "draw_batch", lambda job, batch, *a: sizes.append(len(batch)) or real(job, batch, *a)
    )
    made = begun(tickets(pipe, *BOATS))
    assert len({repr(each.request.settings) for each in made}) == 1
    draw(made)
    assert sizes == [4]
    for ticket in made:
        assert ticket.state is State.COMPLETED
        for name, seed in zip(ticket.pictures, ticket.request.seeds, strict=True):
            alone = pipe(ticket.request.prompt, seed=seed, num_inference_steps=3).images[0]
            levels = pixels(store, name).astype(int) - np.asarray(alone, int)
            assert abs(levels).max() <= 1  # a batch rounds otherwise than a picture alone
            request = read_request(store.get(name).path)
            assert (request.prompt, request.seeds) == (ticket.request.prompt, (seed,))


def test_what_cannot_be_drawn_fails_alone(pipe, store, draw):
    good, bad = begun(tickets(pipe, BOATS[1], {"prompt": "a", "prompt_2": "b", "seeds": (1,)}))
    draw([good, bad])
    assert good.state is State.COMPLETED
    assert (bad.state, bad.is_users_fault) == (State.FAILED, True)
    assert bad.error.startswith("prompt_2 is not allowed here")


def test_a_batch_that_memory_does_not_hold_is_drawn_one_by_one(pipe, store, draw, monkeypatch):
    sizes, real = [], module.draw_batch

    def scarce(job, batch, *others):
        sizes.append(len(batch))
        if len(batch) > 1 or batch[0].seed == 5:
            raise MemoryError
        return real(job, batch, *others)

    monkeypatch.setattr(module, "draw_batch", scarce)
    made = begun(tickets(pipe, *BOATS))
    draw(made)
    assert sizes == [4, 1, 1, 1, 1]
    assert [each.state for each in made] == [State.COMPLETED, State.COMPLETED, State.FAILED]
    assert "not enough memory" in made[2].error
    assert len(made[0].pictures) == 2


def test_our_own_mistake_with_one_picture_fails_its_ticket_only(pipe, store, draw, monkeypatch):
    real = module.draw_batch

    def faulty(job, batch, *others):
        if any(picture.seed == 5 for picture in batch):
            raise IndexError("a secret prompt")
        return real(job, batch, *others)

    monkeypatch.setattr(module, "draw_batch", faulty)
    made = begun(tickets(pipe, *BOATS))
    draw(made)
    assert [each.state for each in made] == [State.COMPLETED, State.COMPLETED, State.FAILED]
    assert (made[2].error, made[2].is_users_fault) == ("internal error: IndexError", False)


def test_a_batch_stops_at_the_step_after_which_nobody_waits(pipe, store, draw):
    made, steps = begun(tickets(pipe, *BOATS)), []

    def cancel():
        steps.append(made[1].step)
        if made[1].step == 1:
            for each in made:
                each.end(State.CANCELLED)

    made[1].watch(cancel)
    draw(made)
    assert max(steps) == 1
    assert store.page(10)[0] == []


def test_one_of_a_batch_can_be_cancelled(pipe, store, draw):
    made = begun(tickets(pipe, *BOATS))
    made[0].watch(lambda: made[1].end(State.CANCELLED) if made[0].step == 2 else None)
    draw(made)
    assert [each.state for each in made] == [State.COMPLETED, State.CANCELLED, State.COMPLETED]
    assert made[1].pictures == []
    assert len(store.page(10)[0]) == 3


def test_previews_show_where_each_picture_goes(pipe, store, draw):
    (made,), seen = begun(tickets(pipe, BOATS[1])), []
    made.watch(lambda: seen.append(made.glimpse and made.glimpse()))
    draw([made])
    last = [each for each in seen if each is not None][-1]
    small = Image.open(store.get(made.pictures[0]).path).resize(last.size)
    assert np.abs(np.asarray(last, float) - np.asarray(small, float)).mean() < 8  # of 255: the last step's x0
    assert made.glimpse is None


def test_a_full_disk_fails_what_it_cannot_hold(pipe, store, draw, monkeypatch):
    def full(*_):
        raise UserError("cannot write to s: No space left on device")

    made = begun(tickets(pipe, BOATS[1]))
    Drawing(draw.model, draw.root, full, draw.limits, 4)(made)
    assert (made[0].state, made[0].error) == (State.FAILED, "cannot write to s: No space left on device")


def test_images_are_noted_as_the_store_has_them(pipe, store, draw):
    Image.new("RGB", (16, 16), "red").save(store.uploads / "a.png")
    (made,) = begun(
        tickets(pipe, {"prompt": "sea", "image": "uploads/a.png", "strength": 0.5, "seeds": (1,)})
    )
    draw([made])
    assert made.error is None
    request = read_request(store.get(made.pictures[0]).path)
    assert (request.image, len(request.image_sha256)) == ("uploads/a.png", 64)


def test_a_model_s_own_defaults_are_bounded_too(pipe, store):
    draw = Drawing(Shelf(pipe, ldm.load), store.folder, store.keep, Limits(side=8), 4)
    made = begun(tickets(pipe, BOATS[1]))
    draw(made)
    assert made[0].error.endswith("is not allowed: this server takes at most 8")


def test_models_are_read_when_named_and_the_least_recently_used_goes(pipe, tmp_path, tiny_folder):
    folder = tmp_path / "models"
    for name in ("a", "b", "c", "pickled"):
        shutil.copytree(tiny_folder, folder / name)
    (folder / "pickled" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    (folder / "old.ckpt").write_bytes(b"")
    (folder / "linked").symlink_to(tiny_folder)
    read = []
    shelf = Shelf(pipe, lambda path: read.append(path.name) or ldm.load(path, dtype="fp32"), folder, most=3)
    assert list(shelf.places) == [pipe.name, "a", "b", "c"]
    for name in ("a", "b", "a", "c"):
        assert shelf(name).name == name
    assert read == ["a", "b", "c"]
    assert shelf.loaded == (pipe.name, "a", "c")
    for wrong in ("linked", "pickled", "../models/a", str(folder / "a")):
        with pytest.raises(UserError, match="unknown model"):
            shelf(wrong)


def test_pictures_are_saved_while_the_next_are_drawn(pipe, store):
    """The second is drawn to its end while the first is still being written; both are kept, in order."""
    go, kept = threading.Event(), []

    def slowly(ticket, *others):
        assert go.wait(30)
        kept.append(ticket)
        return store.keep(ticket, *others)

    saver = Saver(apart=True)
    draw = Drawing(Shelf(pipe, ldm.load), store.folder, slowly, Limits(), 4, saver)
    first, second = begun(tickets(pipe, BOATS[1], BOATS[2]))
    draw([first])
    assert (first.step, first.state) == (3, State.GENERATING)
    drawing = threading.Thread(target=draw, args=([second],))
    drawing.start()
    while second.step < 3:
        time.sleep(0.01)
    assert (kept, first.state, second.state) == ([], State.GENERATING, State.GENERATING)
    go.set()
    assert first.wait(30)
    assert second.wait(30)
    drawing.join()
    saver.close()
    assert kept == [first, second]
    assert [each.state for each in (first, second)] == [State.COMPLETED] * 2
    alone = np.asarray(Image.open(store.get(second.pictures[0]).path))
    expected = pipe("", num_inference_steps=3, seed=5).images[0]
    assert np.array_equal(alone, np.asarray(expected))


def test_not_more_than_two_things_wait_to_be_saved():
    go, done, saver = threading.Event(), [], Saver(apart=True)
    for k in range(2):
        saver(lambda k=k: (go.wait(30), done.append(k)))
    third = threading.Thread(target=saver, args=(lambda: done.append(2),))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    go.set()
    third.join(30)
    saver.close()
    assert done == [0, 1, 2]
