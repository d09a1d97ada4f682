"""What a terminal may have."""

import pytest

from ldm.errors import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Schloß 橋 ⛵ \u3000\xa0", "Schloß 橋 ⛵ \u3000\xa0"),
        ("\x1b[2J\x07\x9b1m", r"\x1b[2J\x07\x9b1m"),
        ("a\rb\tc\nd\x00", r"a\rb\tc\nd\x00"),
        ("\u202egnp\u2028\ud800", r"\u202egnp\u2028\ud800"),
    ],
)
def test_controls_are_written_out(text, shown):
    assert printable(text) == shown


def test_newlines_of_our_own_messages_stay():
    assert printable("a\nb\rc", keep="\n") == "a\nb\\rc"
