"""Pictures of the class: always the same set, however drawing is stopped, shared out or gone on with."""

import io
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm.checkpoint.parts import Defaults
from ldm.errors import UserError
from ldm.finetune import prior
from ldm.finetune.inpainting import widen
from ldm.finetune.prior import class_examples, draw_class
from ldm.images.png import read_request
from ldm.pipeline import Pipeline

PROMPT, COUNT, SIZE = "a red boat", 11, 16  # of batches of 8 and 3


def quick(pipe: Pipeline) -> Pipeline:
    """It draws in few steps."""
    return replace(pipe, parts=replace(pipe.parts, defaults=Defaults(num_inference_steps=4)))


@pytest.fixture(scope="module")
def pipe(families):
    return quick(ldm.load(families("sd1")[0], device="cpu", dtype="fp32"))


def draw(pipe, folder, count=COUNT, prompt=PROMPT, **options):
    draw_class(lambda: pipe, (prompt,), folder, count, size=SIZE, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_same_set(folder, whole):
    """The same names and requests, and pictures equal up to rounding: batches are others."""
    found = files(folder)
    assert sorted(found) == sorted(whole)
    for name, data in found.items():
        one, other = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(whole[name]))
        assert one.text == other.text
        assert levels_apart(one, other) <= 1


def levels_apart(one, other):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


def no_model():
    raise AssertionError("a model was loaded")


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    """The files of a drawing that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "class"
    draw(pipe, folder)
    return files(folder)


def test_pictures_are_those_of_their_numbers_seeds(pipe, whole):
    assert sorted(whole) == [f"drawn-{k:05d}.png" for k in range(COUNT)]
    for k in (0, 7, 8, 10):
        data = io.BytesIO(whole[f"drawn-{k:05d}.png"])
        alone = pipe(PROMPT, seed=k, height=SIZE, width=SIZE).images[0]
        assert levels_apart(Image.open(data), alone) <= 1


def test_each_picture_says_how_it_is_drawn_again(pipe, whole, tmp_path):
    (tmp_path / "3.png").write_bytes(whole["drawn-00003.png"])
    request = read_request(tmp_path / "3.png")
    assert (request.prompt, request.seeds, request.model_hash) == (PROMPT, (3,), pipe.model_hash)
    again = pipe.generate(request).images[0]
    assert levels_apart(Image.open(tmp_path / "3.png"), again) <= 1


def test_what_is_missing_is_drawn_and_nothing_else_is_written(pipe, whole, tmp_path):
    draw(pipe, tmp_path, count=5)
    (tmp_path / "drawn-00002.png").unlink()
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    seen = []
    draw(pipe, tmp_path, on_progress=lambda *numbers: seen.append(numbers))
    check_same_set(tmp_path, whole)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept} == kept
    assert seen == [(7, 7)]


def test_two_processes_draw_the_same_set(pipe, whole, tmp_path):
    draw(pipe, tmp_path, share=(0, 2))
    assert sorted(files(tmp_path)) == [f"drawn-{k:05d}.png" for k in range(0, COUNT, 2)]
    draw(pipe, tmp_path, share=(1, 2))
    check_same_set(tmp_path, whole)


def test_a_process_that_sees_another_draw_does_not_count_its_pictures_as_given(
    pipe, whole, tmp_path, monkeypatch
):
    """The other's pictures appear after the files were listed and before they are counted."""
    examine = prior.examine

    def late(folder, **options):
        for k in range(0, COUNT, 2):
            (tmp_path / f"drawn-{k:05d}.png").write_bytes(whole[f"drawn-{k:05d}.png"])
        return examine(folder, **options)

    monkeypatch.setattr(prior, "examine", late)
    draw(pipe, tmp_path, share=(1, 2))
    check_same_set(tmp_path, whole)


def photograph(path, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_the_users_own_count_and_stay(pipe, whole, tmp_path):
    own = [photograph(tmp_path / f"{i}.jpg", i) for i in range(6)]
    own.append(photograph(tmp_path / "more" / "drawn-00001.png", 6))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(own[0].read_bytes()[:200])  # no picture to train on, so it does not count
    before = {path: path.read_bytes() for path in (*own, broken)}
    draw(pipe, tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in tmp_path.glob("drawn-*")) == sorted(whole)[: COUNT - 7]
    examples = class_examples(tmp_path, (PROMPT,))
    assert len(examples) == COUNT
    assert {each.caption for each in examples} == {PROMPT}


def test_enough_of_the_users_own_need_no_model(tmp_path):
    for i in range(3):
        photograph(tmp_path / f"{i}.jpg", i)
    draw_class(no_model, (PROMPT,), tmp_path, 3, size=SIZE)
    assert len(files(tmp_path)) == 3


def test_more_than_are_asked_for_are_kept_and_count(pipe, whole, tmp_path):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    draw(pipe, tmp_path, count=4)
    assert files(tmp_path) == whole
    for k in range(4):
        (tmp_path / f"drawn-{k:05d}.png").unlink()
    draw(pipe, tmp_path, count=4)  # there are 7 of higher numbers
    assert files(tmp_path) == {name: whole[name] for name in sorted(whole)[4:]}


def test_several_prompts_take_turns_and_caption_what_they_drew(pipe, tmp_path):
    prompts = (PROMPT, "a sea", "a tree")
    draw_class(lambda: pipe, prompts, tmp_path, 5, size=SIZE)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "mine.png")
    for k in range(5):
        request = read_request(tmp_path / f"drawn-{k:05d}.png")
        assert (request.prompt, request.seeds) == (prompts[k % 3], (k,))
    captions = {each.path.name: each.caption for each in class_examples(tmp_path, prompts)}
    assert captions == {f"drawn-{k:05d}.png": prompts[k % 3] for k in range(5)} | {"mine.png": PROMPT}
    with pytest.raises(
        UserError, match=r"drawn-00001\.png was drawn for the prompt 'a sea' and not 'a tree'"
    ):
        draw_class(lambda: pipe, (PROMPT, "a tree"), tmp_path, 5, size=SIZE)


def test_another_prompt_is_refused_before_anything_is_drawn(pipe, tmp_path):
    draw(pipe, tmp_path, count=2)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"drawn-00000\.png was drawn for the prompt 'a red boat' and not 'a"):
        draw(pipe, tmp_path, prompt="a boat", count=3)
    assert files(tmp_path) == before


def test_another_model_is_refused(pipe, families, tmp_path):
    draw(pipe, tmp_path, count=1)
    other = quick(ldm.load(families("sd2")[0], device="cpu", dtype="fp32"))
    with pytest.raises(UserError, match=rf"by sd1 \({pipe.model_hash}\) and not sd2 \({other.model_hash}\)"):
        draw(other, tmp_path, count=1)
    in_memory = replace(pipe, parts=replace(pipe.parts, weights=None))
    draw(in_memory, tmp_path, count=1)  # of the same name
    with pytest.raises(UserError, match="and not another"):
        draw(replace(in_memory, name="another"), tmp_path, count=1)


def test_a_damaged_picture_is_told(pipe, tmp_path):
    draw(pipe, tmp_path, count=2)
    path = tmp_path / "drawn-00001.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"drawn-00001\.png .*: delete it"):
        draw(pipe, tmp_path, count=2)


def test_an_inpainting_model_draws_whole_pictures(pipe, families, tmp_path):
    """A U-Net that was only widened ignores its mask: the pictures are those of the model it was."""
    wide = replace(pipe, parts=widen(pipe.parts))
    draw(wide, tmp_path / "wide", count=2)
    draw(pipe, tmp_path / "plain", count=2)
    for k in range(2):
        assert (
            levels_apart(*(Image.open(tmp_path / name / f"drawn-{k:05d}.png") for name in ("wide", "plain")))
            <= 1
        )


def test_a_folder_that_cannot_be_written_to_is_told_before_drawing(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        draw(replace(pipe, schedule=None), tmp_path / "file" / "class")  # could not draw


def test_no_picture_of_the_class_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no picture"):
        class_examples(tmp_path, (PROMPT,))


def killed_while_writing(pipe, folder, drawn, monkeypatch):
    """Be killed while the third picture's bytes are written; what is written was drawn before."""
    save, written = Image.Image.save, []

    def half(self, file, **options):
        if len(written) == 2:
            data = io.BytesIO()
            save(self, data, **options)
            file.write(data.getvalue()[:400])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(file)
        save(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", half)
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: drawn)
    draw(pipe, folder, count=len(drawn.images))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_in_the_middle_of_a_picture(pipe, whole, tmp_path, monkeypatch):
    drawn = pipe([PROMPT] * 4, seed=[0, 1, 2, 3], height=SIZE, width=SIZE)
    fork = multiprocessing.get_context("fork")  # it computes nothing, so threads are no matter
    process = fork.Process(target=killed_while_writing, args=(pipe, tmp_path, drawn, monkeypatch))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    half = [path for path in tmp_path.iterdir() if path.stat().st_size == 400]
    assert [path.name[0] for path in half] == ["."]  # which is not looked at
    assert len(class_examples(tmp_path, (PROMPT,))) == 2
    draw(pipe, tmp_path)
    assert len(class_examples(tmp_path, (PROMPT,))) == COUNT
    half[0].unlink()
    check_same_set(tmp_path, whole)
