"""The words of a prompt, by the places that their tokens have in its embedding; and those of two, matched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers.decoders import ByteLevel

from ldm.prompts.grammar import Grammar
from ldm.prompts.text_encoder import Clip


@dataclass(frozen=True)
class Word:
    """A word as a text encoder reads it: its tokens, and where they are in the embedding."""

    text: str
    ids: tuple[int, ...]
    places: tuple[int, ...]


def words_of(clip: Clip, prompt: str, grammar: Grammar = "plain") -> tuple[Word, ...]:
    """The words of a prompt in their order; punctuation is a word. Starts, ends and padding are none."""
    added = set(clip.tokenizer.get_added_vocab().values())
    words, ids, places = list[Word](), list[int](), list[int]()
    for number, window in enumerate(clip.cut(prompt, grammar)):
        pieces = clip.tokenizer.convert_ids_to_tokens(window.ids)
        for place, (i, piece) in enumerate(zip(window.ids, pieces, strict=True), number * clip.window + 1):
            ids.append(i)
            places.append(place)
            if piece.endswith("</w>") or i in added:
                words.append(_word(clip, ids, places))
                ids, places = [], []
    if ids:  # a vocabulary of another make, without ends of words
        words.append(_word(clip, ids, places))
    return tuple(words)


def _word(clip: Clip, ids: Sequence[int], places: Sequence[int]) -> Word:
    pieces = [each.removesuffix("</w>") for each in clip.tokenizer.convert_ids_to_tokens(ids)]
    return Word(ByteLevel().decode(pieces), tuple(ids), tuple(places))


def matched(source: Sequence[Word], target: Sequence[Word]) -> list[tuple[Word | None, Word]]:
    """For each word of `target` the one of `source` that it takes the place of; None for one that is new.

    Of as many words each takes that in its own place (a swap). Else those that are the same in the same
    order, as many as can be (a refinement).
    """
    if len(source) == len(target):
        return list(zip(source, target, strict=True))
    n, m = len(source), len(target)
    common = [[0] * (m + 1) for _ in range(n + 1)]  # of the rests from i and j on
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            same = source[i].ids == target[j].ids
            common[i][j] = 1 + common[i + 1][j + 1] if same else max(common[i + 1][j], common[i][j + 1])
    pairs, i = list[tuple[Word | None, Word]](), 0
    for j, word in enumerate(target):
        while i < n and source[i].ids != word.ids and common[i + 1][j] == common[i][j]:
            i += 1
        if i < n and source[i].ids == word.ids:
            pairs.append((source[i], word))
            i += 1
        else:
            pairs.append((None, word))
    return pairs
