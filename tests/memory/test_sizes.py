"""Sizes of memory as people write them."""

import pytest

from ldm.errors import UserError
from ldm.memory.sizes import as_text, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * 2**30),
        ("6000MiB", 6000 * 2**20),
        ("6G", 6 * 2**30),
        ("1.5 gib", 3 * 2**29),
        ("6GB", 6 * 10**9),
        ("512", 512),
        (4096, 4096),
    ],
)
def test_a_size_is_read_in_the_usual_spellings(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1G", "6 apples", "GiB", "6iB", "inf"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="give 6GiB"):
        parse_size(text)


def test_a_size_is_told_in_the_unit_that_fits():
    assert as_text(3 * 2**29) == "1.50 GiB"
    assert as_text(5 * 2**20) == "5 MiB"
