"""How prompts are cut into windows, with a vocabulary of one token a word."""

import pytest

from ldm.prompts.text_encoder import Vocabulary, cut, spell_out

COMMA = 0
WORDS = {",": COMMA}


def ids(text):
    return [
        WORDS.setdefault(part, len(WORDS))
        for word in text.split()
        for part in word.replace(",", " , ").split()
    ]


def letters(text):
    """A token a letter."""
    return [WORDS.setdefault(letter, len(WORDS)) for letter in text if letter != " "]


VOCABULARY = Vocabulary(ids, {"<cat>": 500, "<cat>_1": 501, "<cat>_2": 502}, COMMA)
WORDS["<cat>"] = 500


def texts(prompt, grammar, room, vocabulary=VOCABULARY):
    windows = cut(prompt, vocabulary, room, grammar)
    words = {number: word for word, number in WORDS.items()} | {501: "+", 502: "+"}
    return [[words[i] for i in window.ids] for window in windows]


def test_plain_windows_end_where_they_are_full():
    assert texts("a b, c d", "plain", 3) == [["a", "b", ","], ["c", "d"]]
    assert texts("", "plain", 3) == [[]]
    assert texts("a <cat> b", "plain", 3) == [["a", "<cat>", "+"], ["+", "b"]]


def test_a_full_window_ends_at_its_last_comma():
    assert texts("a, b c d e", "a1111", 4) == [["a", ","], ["b", "c", "d", "e"]]
    assert texts("a, b, c d e", "a1111", 4) == [["a", ",", "b", ","], ["c", "d", "e"]]
    assert texts("a, b c", "a1111", 4) == [["a", ",", "b", "c"]]
    assert texts("a b c d, e", "a1111", 4) == [["a", "b", "c", "d"], [",", "e"]]


@pytest.mark.parametrize("words", range(17, 24))
def test_but_not_more_than_20_tokens_back(words):
    prompt = "a, " + "b " * words + "c"
    whole = words + 2  # room: all but c
    first, second = texts(prompt, "a1111", whole)
    assert (len(first), len(second)) == ((2, words + 1) if words < 20 else (whole, 1))


def test_break_ends_a_window():
    assert texts("a BREAK b", "a1111", 4) == [["a"], ["b"]]
    assert texts("BREAK b BREAK BREAK c BREAK", "a1111", 4) == [[], ["b"], [], ["c"]]
    assert texts("a BREAK b", "plain", 4) == [["a", "BREAK", "b"]]


def test_learnt_words_are_not_divided_where_grammar_is_read():
    assert texts("a <cat> b", "a1111", 3) == [["a"], ["<cat>", "+", "+"], ["b"]]
    assert texts("a <cat> b", "comfy", 3) == [["a"], ["<cat>", "+", "+"], ["b"]]
    assert texts("<cat>", "a1111", 2) == [["<cat>", "+"], ["+"]]
    assert spell_out([7, 500], VOCABULARY.added) == [[7], [500, 501, 502]]


def test_comfy_divides_long_words_only():
    vocabulary = Vocabulary(letters, {}, None)
    assert texts("abcde fgh", "comfy", 7, vocabulary) == [["a", "b", "c", "d", "e"], ["f", "g", "h"]]
    assert [len(each) for each in texts("ab cdefghij", "comfy", 7, vocabulary)] == [7, 3]


def test_every_token_has_its_weight():
    (window,) = cut("a (b c:1.5) d", VOCABULARY, 9, "a1111")
    assert window.weights == (1, 1.5, 1.5, 1)
    assert [each.weights for each in cut("(a BREAK b:2)", VOCABULARY, 9, "a1111")] == [(2,), (2,)]
    (window,) = cut("a [b] ((c))", VOCABULARY, 9, "comfy")
    assert window.weights == pytest.approx((1, 1, 1.21))
