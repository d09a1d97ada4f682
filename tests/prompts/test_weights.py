"""Which prompts ask for weights, as other programs write them."""

import time

import pytest

from ldm.prompts.weights import find_weight


@pytest.mark.parametrize(
    "prompt",
    [
        "(a red boat:1.3)",
        "the (sea : .8 ) at night",
        "((sea))",
        "[[fog]]",
        "[boat:ship:0.5]",
        "(a (small) boat:-1)",
        "sea BREAK boat",
    ],
)
def test_weights_are_found_and_quoted(prompt):
    assert find_weight(prompt) == repr(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "(two) boats",
        "a [red] boat",
        "scale 1:3",
        "a break (at 12:30 or so)",
        r"\(\(plain\)\)",
        "BREAKERS",
        ":)",
    ],
)
def test_plain_brackets_are_no_weights(prompt):
    assert find_weight(prompt) is None


@pytest.mark.parametrize("piece", ["(", ":", ": ", ":1", "1", "(a:1", "BREAKS"])
def test_in_linear_time(piece):
    start = time.process_time()
    find_weight("x" + piece * (200_000 // len(piece)))
    assert time.process_time() - start < 1
