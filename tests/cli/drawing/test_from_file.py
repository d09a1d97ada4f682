"""--from-file: a prompt or a JSON object in each line; a bad line fails alone. --styles."""

import json
from pathlib import Path

import pytest
from fake_pipeline import files

from ldm import cli
from ldm.images.png import read_request
from ldm.request import Request


def write(*lines):
    text = "".join(
        f"{line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)}\n" for line in lines
    )
    Path("p.txt").write_text(text, encoding="utf-8")
    return ["--from-file", "p.txt", "--outdir", "o", "--skip-grid"]


def drawn():
    return [read_request(path) for path in sorted(Path("o/samples").iterdir())]


def test_lines_say_what_differs_from_the_flags(fake):
    argv = write(
        "a boat",
        {"prompt": "a sea", "num_inference_steps": 2, "guidance_scale": 1.5},
        {"prompt": "ein Schloß", "steps": 2, "cfg": 1.5, "seed": 7},
        {"negative_prompt": None, "width": 64},
        '{a|b} and "c"',
    )
    assert cli.txt2img([*argv, "--steps", "4", "-n", "fog", "-b", "1"]) == 0
    found = [
        (r.prompt, r.num_inference_steps, r.guidance_scale, r.seeds, r.negative_prompt, r.width)
        for r in drawn()
    ]
    assert found == [
        ("a boat", 4, 7.0, (42,), "fog", 24),
        ("a sea", 2, 1.5, (43,), "fog", 24),
        ("ein Schloß", 2, 1.5, (7,), "fog", 24),
        ("", 4, 7.0, (45,), None, 64),
        ('{a|b} and "c"', 4, 7.0, (46,), "fog", 24),
    ]


def test_lines_give_seeds(fake):
    argv = write(
        {"prompt": "a", "seed": 7}, {"prompt": "b", "seeds": [1, 5, 3]}, {"prompt": "c", "seeds": None}
    )
    assert cli.txt2img([*argv, "-b", "2"]) == 0
    assert [r.seeds[0] for r in drawn()] == [7, 8, 1, 5, 3, 46, 47]


def test_neighbours_that_are_alike_are_one_job(fake, monkeypatch):
    jobs = []
    prepare = type(fake).prepare
    monkeypatch.setattr(
        "ldm.pipeline.deciding.prepare.prepare",
        lambda pipe, asked, batch_size: jobs.append(len(asked)) or prepare(pipe, asked, batch_size),
    )
    argv = write(
        "a",
        "b",
        {"prompt": "c", "negative_prompt": "n"},
        {"prompt": "d", "steps": 2},
        {"prompt": "e", "steps": 2},
        "f",
    )
    assert cli.txt2img(argv) == 0
    assert jobs == [3, 2, 1]
    assert [r.prompt for r in drawn()] == ["a", "b", "c", "d", "e", "f"]


BAD = [
    '{"prompt": "no end',
    {"prompt": "a", "heigth": 8},
    {"prompt": "a", "height": 5},
    {"prompt": 5},
    {"prompt": "a", "seeds": []},
    {"prompt": "a", "seed": "one"},
    {"prompt": "a", "steps": 2, "num_inference_steps": 3},
    {"prompt": "a", "sampler": "eulr"},
    {"prompt": "a", "guidance_scale": float("nan")},
    {"prompt": "a", "model_hash": "another", "model": "big"},
    "a <lora:x:high>",
]


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_bad_line_fails_alone(fake, capsys, bad):
    assert cli.txt2img(write("a boat", bad, "a sea")) == 2
    told = capsys.readouterr().err.splitlines()
    named = [line for line in told if line.startswith("txt2img: p.txt, line 2: ")]
    assert len(named) == 1
    assert len(named[0]) > 40
    assert told[-1] == "txt2img: not drawn: line 2"
    assert [(r.prompt, r.seeds) for r in drawn()] == [("a boat", (42,)), ("a sea", (44,))]


def test_a_line_that_the_model_cannot_draw_fails_alone(fake, capsys, monkeypatch):
    from ldm.errors import UserError

    prepare = type(fake).prepare

    def picky(pipe, asked, batch_size):
        for request in asked:
            if request.prompt.startswith("bad"):
                raise UserError("this model cannot")
        return prepare(pipe, asked, batch_size)

    monkeypatch.setattr("ldm.pipeline.deciding.prepare.prepare", picky)
    assert cli.txt2img(write("a", "bad 1", "b", "c", "bad 2", "d")) == 2
    assert [r.prompt for r in drawn()] == ["a", "b", "c", "d"]
    told = capsys.readouterr().err
    assert "p.txt, line 2: this model cannot" in told
    assert "p.txt, line 5: this model cannot" in told
    assert told.endswith("txt2img: not drawn: line 2, 5\n")


@pytest.mark.parametrize("error", [MemoryError(), FloatingPointError("the U-Net gives NaN")])
def test_a_line_that_fails_while_it_is_drawn_fails_alone(fake, capsys, monkeypatch, error):
    draw_batch = fake.draw_batch

    def failing(job, batch, on_step=lambda step: None):
        if any(picture.request.prompt == "bad" for picture in batch):
            raise error
        return draw_batch(job, batch, on_step)

    monkeypatch.setattr("ldm.pipeline.sample.draw_batch", failing)
    assert cli.txt2img([*write("bad", "a", "b"), "--n-samples", "2"]) == 2
    assert [r.prompt for r in drawn()] == ["a", "a", "b", "b"]
    assert capsys.readouterr().err.count("p.txt, line 1: ") == 1


def test_where_no_line_can_be_drawn_no_model_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.cli.drawing.draw.load", lambda args: pytest.fail("the model was loaded"))
    assert cli.txt2img(write({"height": 5}, {"width": 5})) == 2
    assert capsys.readouterr().err.endswith("not drawn: line 1, 2\n")
    assert files(".") == ["p.txt"]


def test_a_picture_s_own_json_is_a_line(fake):
    assert cli.txt2img(["-p", "a boat", "--steps", "2", "--outdir", "one", "-s", "3"]) == 0
    request = read_request("one/samples/00000.png")
    assert cli.txt2img([*write(request.to_json()), "--steps", "5"]) == 0
    assert drawn() == [request]


def test_a_flag_that_is_wrong_is_no_line_s_fault(fake, capsys):
    assert cli.txt2img([*write("a", "b"), "--height", "5"]) == 2
    assert capsys.readouterr().err.startswith("txt2img: --height 5 is not allowed")


def test_too_many_pictures(fake, capsys):
    assert cli.txt2img([*write("a", {"seeds": [1]}), "-b", "60000"]) == 2
    assert "120000 pictures are too many for one run" in capsys.readouterr().err


def test_styles_go_around_every_prompt(fake):
    Path("styles.csv").write_text(
        "name,prompt,negative_prompt\nink,{prompt} in ink,colour\nold times,old,\n", encoding="utf-8"
    )
    argv = write("a boat", {"prompt": "a sea", "negative_prompt": None})
    assert cli.txt2img([*argv, "-n", "fog", "--styles", "ink", "old times"]) == 0
    assert [(r.prompt, r.negative_prompt) for r in drawn()] == [
        ("a boat in ink, old", "fog, colour"),
        ("a sea in ink, old", "colour"),
    ]
    assert drawn()[0] == fake.resolve(
        Request(prompt="a boat in ink, old", negative_prompt="fog, colour", seeds=(42,))
    )
