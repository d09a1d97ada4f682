"""Styles as AUTOMATIC1111 keeps and merges them."""

import pytest

from ldm.errors import UserError
from ldm.prompts.styles import Style, chosen, read_styles, with_styles

FILE = (
    "\ufeffname,prompt,negative_prompt\r\n"
    'ink,"drawing of {prompt}, ink",colour\r\n'
    '"two words","soft, ""warm""\nlight",\r\n'
    "none,,\r\n"
    ",a divider,\r\n"
    "short,only a prompt\r\n"
)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "styles.csv").write_bytes(FILE.encode())
    return tmp_path / "styles.csv"


def test_the_file_is_read(path):
    assert read_styles(path) == {
        "ink": Style("drawing of {prompt}, ink", "colour"),
        "two words": Style('soft, "warm"\nlight', ""),
        "none": Style("", ""),
        "short": Style("only a prompt", ""),
    }


def test_the_column_of_old_files(tmp_path):
    (tmp_path / "a.csv").write_text("name,text\nink,in ink\n", encoding="utf-8")
    assert read_styles(tmp_path / "a.csv") == {"ink": Style("in ink")}


@pytest.mark.parametrize(
    ("names", "prompt", "negative", "merged"),
    [
        (["ink"], "a boat", None, ("drawing of a boat, ink", "colour")),
        (["ink"], "a boat", "fog", ("drawing of a boat, ink", "fog, colour")),
        (["short", "ink"], "a boat", None, ("drawing of a boat, only a prompt, ink", "colour")),
        (["ink", "short"], "a boat", None, ("drawing of a boat, ink, only a prompt", "colour")),
        (["none"], "a boat", None, ("a boat", None)),
        (["none"], "a boat", "", ("a boat", "")),
        (["short"], "", None, ("only a prompt", None)),
        ([], " as it is ", " n ", (" as it is ", " n ")),
    ],
)
def test_prompts_in_styles(path, names, prompt, negative, merged):
    assert with_styles(prompt, negative, chosen(read_styles(path), names, path)) == merged


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot read styles from .*No such file"),
        (b"\xff\xfe\x00", "cannot read styles from"),
        (b"", "holds no styles"),
        (b"a,b\n1,2\n", "its first line must be name,prompt,negative_prompt"),
    ],
)
def test_a_file_without_styles(tmp_path, data, message):
    if data is not None:
        (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_styles(tmp_path / "a.csv")


def test_a_style_that_is_not_there(path):
    with pytest.raises(UserError, match=r"unknown style in .* 'imk': did you mean ink\?"):
        chosen(read_styles(path), ["imk"], path)
