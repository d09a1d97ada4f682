"""The grammars of prompts, against what the programs that they are from make of the same text.

The lists are facts of AUTOMATIC1111 and ComfyUI: their documented examples, or computed by their rule.
"""

import contextlib
import time

import pytest

from ldm.errors import UserError
from ldm.prompts.grammar import BREAK, DEEPEST, at_step, composed, edited, pieces

# prompt -> [(text, weight)]
A1111 = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    ("\\(literal\\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.573),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641),
            (".", 1.1),
        ],
    ),
    ("", [("", 1.0)]),
    ("(red:1.3) boat", [("red", 1.3), (" boat", 1.0)]),
    ("(red: 1.3 ) boat", [("red", 1.3), (" boat", 1.0)]),
    ("(red:-0.5)", [("red", -0.5)]),
    ("(red:+1.5)", [("red", 1.5)]),
    ("(red:.5)", [("red", 0.5)]),
    ("(red:1.)", [("red", 1.0)]),
    ("((red))", [("red", 1.21)]),
    ("[red]", [("red", 0.9090909091)]),
    ("[[red]]", [("red", 0.826446281)]),
    ("(red, (blue:1.5):1.2)", [("red, ", 1.2), ("blue", 1.8)]),
    ("a ] b", [("a ] b", 1.0)]),
    ("a ) b", [("a ) b", 1.0)]),
    ("red:1.3", [("red:1.3", 1.0)]),
    ("(red:1.3", [("red:1.3", 1.1)]),
    ("(a:b:1.2)", [("a:b", 1.2)]),
    ("(a:1.2) BREAK (b:0.8)", [("a", 1.2), ("", 1.0), ("BREAK", -1), ("", 1.0), ("b", 0.8)]),
    ("a BREAK b", [("a", 1.0), ("BREAK", -1), ("b", 1.0)]),
    ("ABREAKB", [("ABREAKB", 1.0)]),
    ("a\\\\b", [("a\\b", 1.0)]),
    ("\\(smile\\)", [("(smile)", 1.0)]),
    ("(\\(smile\\):1.2)", [("(smile)", 1.2)]),
    ("a (b) (c:1.1)", [("a ", 1.0), ("b", 1.1), (" ", 1.0), ("c", 1.1)]),
    ("(1:2)", [("1", 2.0)]),
    ("café (naïve:1.2)", [("café ", 1.0), ("naïve", 1.2)]),
    (
        "masterpiece, (best quality:1.4), 1girl, [blurry], solo",
        [
            ("masterpiece, ", 1.0),
            ("best quality", 1.4),
            (", 1girl, ", 1.0),
            ("blurry", 0.9090909091),
            (", solo", 1.0),
        ],
    ),
    ("(a:1.1)(b:1.1)", [("ab", 1.1)]),
    ("<lora:style:0.8> (a:1.2)", [("<lora:style:0.8> ", 1.0), ("a", 1.2)]),
    ("(a:0)", [("a", 0.0)]),
    ("(  spaced  :1.2)", [("  spaced  ", 1.2)]),
    ("((a:1.2):1.3)", [("a", 1.56)]),
    ("a\nb (c)", [("a\nb ", 1.0), ("c", 1.1)]),
    ("[a:b:0.5]", [("a:b:0.5", 0.9090909091)]),
    ("[a|b]", [("a|b", 0.9090909091)]),
]

# the same
COMFY = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("(unbalanced", 1.0)]),
    ("\\(literal\\)", [("(literal)", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessary", 1.1), ("parens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [("a ", 1.0), ("(((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", 1.0)],
    ),
    ("(red:1.3) boat", [("red", 1.3), (" boat", 1.0)]),
    ("(red: 1.3 ) boat", [("red", 1.3), (" boat", 1.0)]),
    ("((red))", [("red", 1.21)]),
    ("(red, (blue:1.5):1.2)", [("red, ", 1.2), ("blue", 1.5)]),
    ("((a:1.2):1.3)", [("a", 1.2)]),
    ("(a:b:1.2)", [("a:b", 1.2)]),
    ("(a:0)", [("a", 0.0)]),
    ("(red:-0.5)", [("red", -0.5)]),
    ("[red]", [("[red]", 1.0)]),
    ("a ) b", [("a ) b", 1.0)]),
    ("(a:1.1)(b:1.1)", [("a", 1.1), ("b", 1.1)]),
    ("(:1.2)", [(":1.2", 1.1)]),
    ("(a:)", [("a:", 1.1)]),
    ("()", []),
]

# prompt, steps -> [(last step, text)]
EDITS = [
    ("test", 10, [(10, "test")]),
    ("a [b:3]", 10, [(3, "a "), (10, "a b")]),
    ("a [b: 3]", 10, [(3, "a "), (10, "a b")]),
    ("a [[[b]]:2]", 10, [(2, "a "), (10, "a [[b]]")]),
    ("[(a:2):3]", 10, [(3, ""), (10, "(a:2)")]),
    ("a [b : c : 1] d", 10, [(1, "a b  d"), (10, "a  c  d")]),
    ("a[b:[c:d:2]:1]e", 10, [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("a [unbalanced", 10, [(10, "a [unbalanced")]),
    ("a [b:.5] c", 10, [(5, "a  c"), (10, "a b c")]),
    ("a [{b|d{:.5] c", 10, [(5, "a  c"), (10, "a {b|d{ c")]),
    ("((a][:b:c [d:3]", 10, [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    (
        "[a|(b:1.1)]",
        10,
        [
            (1, "a"),
            (2, "(b:1.1)"),
            (3, "a"),
            (4, "(b:1.1)"),
            (5, "a"),
            (6, "(b:1.1)"),
            (7, "a"),
            (8, "(b:1.1)"),
            (9, "a"),
            (10, "(b:1.1)"),
        ],
    ),
    (
        "[fe|]male",
        10,
        [
            (1, "female"),
            (2, "male"),
            (3, "female"),
            (4, "male"),
            (5, "female"),
            (6, "male"),
            (7, "female"),
            (8, "male"),
            (9, "female"),
            (10, "male"),
        ],
    ),
    (
        "[fe|||]male",
        10,
        [
            (1, "female"),
            (2, "male"),
            (3, "male"),
            (4, "male"),
            (5, "female"),
            (6, "male"),
            (7, "male"),
            (8, "male"),
            (9, "female"),
            (10, "male"),
        ],
    ),
]

# prompt -> [(text, weight)]
COMPOSED = [
    ("a AND b", [("a", 1.0), (" b", 1.0)]),
    ("a:1.2 AND b:0.5", [("a", 1.2), (" b", 0.5)]),
    ("a AND b :-1", [("a", 1.0), (" b", -1.0)]),
    ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
    ("aANDb", [("aANDb", 1.0)]),
    ("a AND b AND c:2", [("a", 1.0), (" b", 1.0), (" c", 2.0)]),
    ("a : 1 : 2", [("a : 1", 2.0)]),
    ("red AND ", [("red", 1.0), ("", 1.0)]),
]


def read(prompt, grammar):
    return [(piece.text, pytest.approx(piece.weight, rel=1e-9)) for piece in pieces(prompt, grammar)]


@pytest.mark.parametrize(("prompt", "wanted"), A1111)
def test_weights_are_read_as_a1111_reads_them(prompt, wanted):
    assert read(prompt, "a1111") == wanted


@pytest.mark.parametrize(("prompt", "wanted"), COMFY)
def test_weights_are_read_as_comfy_reads_them(prompt, wanted):
    assert read(prompt, "comfy") == wanted


@pytest.mark.parametrize("prompt", [prompt for prompt, _ in A1111])
def test_plain_is_plain(prompt):
    assert read(prompt, "plain") == [(prompt, 1)]


@pytest.mark.parametrize(("prompt", "steps", "wanted"), EDITS)
def test_edits_over_the_steps(prompt, steps, wanted):
    whole = edited(prompt)
    for step in range(steps):
        assert at_step(whole, step, steps) == next(text for last, text in wanted if step < last)


@pytest.mark.parametrize(("prompt", "wanted"), COMPOSED)
def test_composition(prompt, wanted):
    assert [(part.text, part.weight) for part in composed(prompt)] == wanted


# --- a second calculation --------------------------------------------------------------------------------


def character_weights(prompt):
    """A1111's rule once more, character by character: every bracket multiplies what lies between its ends."""
    shown, weights, opened = [], [], {"(": [], "[": []}

    def close(start, factor):
        weights[start:] = [weight * factor for weight in weights[start:]]

    i = 0
    while i < len(prompt):
        c = prompt[i]
        if c == "\\" and i + 1 < len(prompt) and prompt[i + 1] in "()[]\\":
            shown.append(prompt[i + 1])
            weights.append(1.0)
            i += 2
            continue
        if c in "([":
            opened[c].append(len(shown))
        elif c == ":" and opened["("] and number(prompt, i + 1) is not None:
            value, i = number(prompt, i + 1)
            close(opened["("].pop(), value)
        elif c == ")" and opened["("]:
            close(opened["("].pop(), 1.1)
        elif c == "]" and opened["["]:
            close(opened["["].pop(), 1 / 1.1)
        elif c != "\\":
            shown.append(c)
            weights.append(1.0)
        i += 1
    for start in opened["("]:
        close(start, 1.1)
    for start in opened["["]:
        close(start, 1 / 1.1)
    return list(zip(shown, weights, strict=True))


def number(prompt, start):
    """(value, where its closing bracket is) of a number before one, or None."""
    end = prompt.find(")", start)
    text = prompt[start:end].strip() if end > 0 else ""
    plain = text.lstrip("+-")
    if end < 0 or len(text) - len(plain) > 1 or not plain.replace(".", "", 1).isdecimal():
        return None
    return float(text), end


ODD = [
    "((((a))))",
    "[[[[a]]]]",
    "([a])",
    "[(a)]",
    "(a [b) c]",
    "(a [b (c:1.5) d] e:0.7) f",
    "((a:1.1)(b:1.2):1.3)",
    "(((",
    ")))",
    "[",
    "]",
    "()",
    "[]",
    "(:1.2)",
    "(a:)",
    "(a:b)",
    "(a::1.2)",
    "(a:1.2:1.3)",
    "(a:-1)",
    "(a:+.25)",
    "(a: 2. )",
    "(a:1.2.3)",
    "(a:1,2)",
    "(a:1e3)",
    r"\(a:1.2\)",
    r"(\(a\):1.2)",
    r"\\(a)",
    r"a\b",
    "\\",
    r"[\]:1]",
    "(猫:1.3) と 犬",
    "(👩‍👩‍👧:1.2) 👍🏽",
    "(שלום:1.4) עולם",
    "(مرحبا [بالعالم]:0.5)",
    "(a\n b:1.2)\t c",
    "a:1.2, (b), c:1.3)",
    "((a) b (c) d)",
    "(a:0.0) (b:000.5)",
    "(one (two (three (four (five:2):3):4):5):6)",
    "a" * 2000 + "(b:1.5)" + "c " * 500,
]


@pytest.mark.parametrize("prompt", ODD)
def test_odd_prompts_by_a_second_calculation(prompt):
    found = [(c, piece.weight) for piece in pieces(prompt, "a1111") for c in piece.text]
    wanted = character_weights(prompt)
    assert [c for c, _ in found] == [c for c, _ in wanted]
    assert [w for _, w in found] == pytest.approx([w for _, w in wanted], rel=1e-9)


def test_neighbours_of_one_weight_are_read_together():
    """So that "(word:1.0)" is tokenised as "word" is, and is the same picture."""
    assert read("a (red:1) (sea):1 boat", "a1111")[0] == ("a red ", 1)
    assert read("(a:1)(b:1.0) [c:x]", "a1111")[0] == ("ab ", 1)


def test_break_within_brackets_breaks():
    assert [piece is BREAK for piece in pieces("(a BREAK b:1.2)", "a1111")] == [False, True, False]
    assert pieces("BREAK", "comfy")[0] is not BREAK
    assert pieces("(BREAK:-1)", "comfy")[0] is not BREAK


@pytest.mark.parametrize(
    ("prompt", "when", "texts"),
    [
        ("a [b:c:0.5] d", (0, 4, 5, 9), ("a b d", "a b d", "a c d", "a c d")),
        ("[a:[b|c]:2]", (0, 1, 2, 3), ("a", "a", "b", "c")),
        ("[[a|b]:[c|d]:2]", (0, 1, 2, 3), ("a", "b", "c", "d")),
        ("[a::3]b", (2, 3), ("ab", "b")),
        ("[:a:0]", (0,), ("a",)),
        ("[a:b:1.0]", (9,), ("a",)),
        ("[a:b:-1]", (0,), ("b",)),
        (r"[a\:b:c:1]", (0, 1), (r"a\:b", "c")),
        ("[a:b:c:1]", (0,), ("[a:b:c:1]",)),
        ("[a (b:3]", (0,), ("[a (b:3]",)),
        ("[a) b:3]", (0,), ("[a) b:3]",)),
        ("(a [b:3]", (0, 3), ("(a ", "(a b")),
        ("[a|b:c]", (0,), ("[a|b:c]",)),
        ("[a:b:x]", (0,), ("[a:b:x]",)),
        ("[(a:1.2)|b]", (0, 1), ("(a:1.2)", "b")),
    ],
)
def test_more_edits(prompt, when, texts):
    assert tuple(at_step(edited(prompt), step, 10) for step in when) == texts


@pytest.mark.parametrize("read", [lambda p: pieces(p, "a1111"), lambda p: pieces(p, "comfy"), edited])
def test_brackets_that_lie_too_deep_are_told(read):
    read("(" * DEEPEST + "a" + ")" * DEEPEST)
    with pytest.raises(UserError, match=r"the prompt"):
        read("(" * 10_000 + "a" + ")" * 10_000)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "9" * 400])
@pytest.mark.parametrize("grammar", ["a1111", "comfy"])
def test_weights_that_are_not_finite_are_told(weight, grammar):
    with pytest.raises(UserError, match=r"the weight of .* must be a finite number"):
        pieces(f"a (boat:{weight})", grammar)


MARKS = ["(", ")", "[", "]", ":", "|", ": ", "\\", "(a)", "[a:b:3]", "(a:1.2) ", "a AND ", " BREAK ", "[a|b]"]


@pytest.mark.parametrize("mark", MARKS)
def test_time_is_linear(mark):
    """Or else 100,000 characters would take hours."""
    prompt, start = mark * (100_000 // len(mark)), time.process_time()
    for read in (lambda p: pieces(p, "a1111"), lambda p: pieces(p, "comfy"), edited, composed):
        with contextlib.suppress(UserError):  # of brackets that lie too deep
            read(prompt)
    assert time.process_time() - start < 10
