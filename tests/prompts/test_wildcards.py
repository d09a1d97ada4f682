"""Templates of prompts."""

import pytest

from ldm.errors import UserError
from ldm.prompts.wildcards import expand


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "animal.txt").write_text("# a comment\ncat\ndog\nhorse\n", encoding="utf-8")
    (tmp_path / "places").mkdir()
    (tmp_path / "places" / "far.txt").write_text("Łódź\n東京\n", encoding="utf-8")
    (tmp_path / "loop.txt").write_text("__loop__\n", encoding="utf-8")
    (tmp_path / "deep.txt").write_text("a {small|big} __animal__\n", encoding="utf-8")
    return tmp_path


def test_a_seed_chooses_the_same_for_ever():
    """A picture keeps what was chosen; but a template and a seed are what people pass on."""
    chosen = "blue blue red blue red blue red blue"
    assert " ".join(expand("{red|blue}", seed) for seed in range(8)) == chosen


def test_a_wildcard_is_a_line_of_its_file(folder):
    found = {expand("a __animal__ in __places/far__", seed, folder) for seed in range(40)}
    assert found == {f"a {a} in {b}" for a in ("cat", "dog", "horse") for b in ("Łódź", "東京")}
    assert {expand("__deep__", seed, folder) for seed in range(40)} == {
        f"a {size} {animal}" for size in ("small", "big") for animal in ("cat", "dog", "horse")
    }


def test_other_marks_are_left_alone():
    text = r"a \(quiet\) (boat:1.2), [sea:lake:0.5] AND [a] BREAK <lora:x:0.5>, <cat>"
    assert expand(text, 3) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a {red|blue", "cannot be read as a template"),
        ("a __animl__", "no wildcard animl: .* has animal, deep, loop"),
        ("__loop__", "holds itself"),
    ],
)
def test_faults_are_told(folder, template, message):
    with pytest.raises(UserError, match=message):
        expand(template, 1, folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        expand("a", 1, tmp_path / "none")
    with pytest.raises(UserError, match="give --wildcards FOLDER"):
        expand("__animal__", 1)
