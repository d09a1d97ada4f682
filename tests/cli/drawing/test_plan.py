"""`--plan` and `--max-memory`: nothing is drawn, what does not fit is refused, and all else is as without."""

import pytest

from ldm import cli
from ldm.memory.residence import Sleeping, leave


@pytest.fixture(autouse=True)
def gone():
    yield
    leave()


def test_the_plan_tells_what_takes_what_and_draws_nothing(tiny, tmp_path, capsys, monkeypatch):
    woken = []
    monkeypatch.setattr(Sleeping, "wake", lambda self: woken.append(self))
    assert cli.txt2img([*tiny, "--plan"]) == 0
    out = capsys.readouterr().out
    for what in ("weights: unet", "VAE decode", "peak, all in memory", "peak, layers while used", "there is"):
        assert what in out
    assert out.splitlines()[-1] == "fits: all in memory"
    assert not woken
    assert not list(tmp_path.rglob("*.png"))


def test_a_plan_that_does_not_fit_says_what_to_change(tiny, capsys):
    assert cli.txt2img([*tiny, "--plan", "--max-memory", "50MiB", "--n-samples", "2", "--n-iter", "2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("does not fit: ")
    assert "--dtype bf16" in last


def test_what_takes_more_is_refused_with_the_prediction_and_nothing_is_written(tiny, tmp_path, capsys):
    assert cli.txt2img([*tiny, "--max-memory", "50MiB"]) == 2
    assert "at least" in (told := capsys.readouterr().err)
    assert "there is 50 MiB" in told
    assert not list(tmp_path.rglob("*.png"))


def test_with_room_the_picture_is_the_same_to_the_pixel(tiny, tmp_path):
    assert cli.txt2img([*tiny, "-o", "plain.png"]) == 0
    assert cli.txt2img([*tiny, "-o", "limited.png", "--max-memory", "64GiB"]) == 0
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "limited.png").read_bytes()


def test_a_size_that_is_none_is_refused(tiny, capsys):
    assert cli.txt2img([*tiny, "--max-memory", "much"]) == 2
    assert "give 6GiB" in capsys.readouterr().err


def test_it_is_told_where_free_memory_is_short(tiny, capsys, monkeypatch):
    assert cli.txt2img([*tiny, "-o", "a.png"]) == 0
    assert "this will take" not in capsys.readouterr().err
    monkeypatch.setattr("ldm.cli.drawing.draw.is_large", lambda job: True)
    monkeypatch.setattr("ldm.runtime.resident_memory", lambda: 1)
    monkeypatch.setattr("ldm.runtime.Runtime.free_memory", property(lambda self: 1 << 20))
    assert cli.txt2img([*tiny, "-o", "b.png"]) == 0
    assert "this will take about" in capsys.readouterr().err
