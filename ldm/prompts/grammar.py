r"""What the marks in a prompt mean: weights, breaks, edits over the steps, composition. No torch here.

Three grammars: "a1111", that of AUTOMATIC1111's web interface; "comfy", ComfyUI's; "plain", in which every
character is text. Reading goes from the outside in: `composed` (AND), `edited` (``[from:to:0.4]``), `pieces`
(weights and BREAK). A backslash before a bracket makes it text. All take time in proportion to the prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal, get_args

from ldm.errors import UserError

Grammar = Literal["a1111", "comfy", "plain"]
GRAMMARS: tuple[str, ...] = get_args(Grammar)

DEEPEST = 256  # brackets in brackets: 1.1 to that power is no weight any more


@dataclass(frozen=True)
class Piece:
    """Some words and how strongly they act: 1 is as they are."""

    text: str
    weight: float = 1.0


BREAK = Piece("BREAK", -1.0)  # itself, not its like: here a window of the text encoder ends


def pieces(prompt: str, grammar: Grammar) -> list[Piece]:
    r"""A prompt as words with weights.

    - a1111: ``(a)`` 1.1, ``[a]`` 1 / 1.1, ``(a:1.3)`` 1.3, multiplied where they lie in each other; what is
      not closed ends with the prompt, what was not opened is text. ``BREAK`` within brackets breaks too: in
      the original it is text with a weight there.
    - comfy: ``(a)`` 1.1 times what is around it, ``(a:1.3)`` just 1.3; square brackets are text, and so is
      all from a bracket that is not closed.

    Raises:
        UserError: for a weight that is not finite, and for brackets that lie too deep.
    """
    match grammar:
        case "a1111":
            return _a1111(prompt)
        case "comfy":
            return list(_comfy(prompt))
        case _:
            return [Piece(prompt)]


# --- weights -----------------------------------------------------------------------------------------------

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
# An escape; an opening bracket; a weight with its closing bracket; a closing one; other text.
_A1111 = re.compile(
    rf"\\(?P<escaped>[()\[\]\\]?)|(?P<opens>[(\[])|:\s*(?P<weight>{_NUMBER}|[+-]?(?:nan|inf)\b)\s*\)"
    r"|(?P<closes>[)\]])|(?P<text>[^\\()\[\]:]+|:)",
    re.IGNORECASE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_OF_BRACKET = {"(": 1.1, "[": 1 / 1.1}
_OPENING = {")": "(", "]": "["}


def _a1111(prompt: str) -> list[Piece]:
    found: list[Piece] = []  # with weight 1
    ranges: list[tuple[int, int, float]] = []  # of pieces, and by what they are multiplied: the inner first
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def add(text: str) -> None:
        for i, part in enumerate(_BREAK.split(text)):
            found.extend([BREAK] * (i > 0) + [Piece(part)])

    for token in _A1111.finditer(prompt):
        kind, text = token.lastgroup, token[0]
        bracket = "(" if kind == "weight" else _OPENING.get(text, "") if kind == "closes" else ""
        if kind == "opens":
            opened[text].append(len(found))
            _check_depth(len(opened[text]))
        elif bracket and opened[bracket]:
            weight = _finite(float(token["weight"]), text) if kind == "weight" else _OF_BRACKET[bracket]
            ranges.append((opened[bracket].pop(), len(found), weight))
        else:
            add(token["escaped"] if kind == "escaped" else text)
    ranges += [(start, len(found), _OF_BRACKET[each]) for each in "([" for start in opened[each]]
    return _merged(_weighted(found, ranges)) or [Piece("")]


def _weighted(found: list[Piece], ranges: list[tuple[int, int, float]]) -> Iterator[Piece]:
    starts: dict[int, list[int]] = {}
    for number, (start, end, _) in enumerate(ranges):
        if start < end:
            starts.setdefault(start, []).append(number)
    active: list[int] = []
    for i, piece in enumerate(found):
        active = sorted([n for n in active if ranges[n][1] > i] + starts.pop(i, []))
        weight = math.prod(ranges[n][2] for n in active)
        yield piece if piece is BREAK else Piece(piece.text, weight)


def _merged(weighted: Iterator[Piece]) -> list[Piece]:
    """Neighbours of one weight as one piece, so that the tokenizer reads over what says nothing."""
    merged: list[Piece] = []
    for is_break, run in groupby(weighted, lambda piece: piece is BREAK):
        if is_break:
            merged += run
            continue
        for weight, alike in groupby(run, lambda piece: piece.weight):
            merged.append(Piece("".join(piece.text for piece in alike), weight))
    return merged


def _check_depth(depth: int) -> None:
    if depth > DEEPEST:
        raise UserError(f"brackets of the prompt lie more than {DEEPEST} deep: a backslash makes one text")


def _finite(weight: float, text: str) -> float:
    if not math.isfinite(weight):
        raise UserError(
            f"the weight of {text[:40]!r} in the prompt is not allowed: it must be a finite number"
        )
    return weight


_ESCAPED = re.compile(r"\\([()])")


def _comfy(prompt: str) -> Iterator[Piece]:
    marks = _ESCAPED.sub("\0\0", prompt)  # the same without escaped brackets, place by place
    closing = _pairs(marks)
    todo = [(0, len(prompt), 1.0, False)]  # from, to, weight, whether it is text alone: the next one last
    while todo:
        start, end, weight, is_text = todo.pop()
        if is_text:
            yield Piece(_ESCAPED.sub(r"\1", prompt[start:end]), weight)
            continue
        for left, right in reversed([*_items(marks, start, end, closing)]):
            is_group = right - left > 1 and marks[left] == "(" and marks[right - 1] == ")"
            inside = _inside(marks, left + 1, right - 1, weight) if is_group else (left, right, weight)
            todo.append((*inside, not is_group))


def _pairs(marks: str) -> dict[int, int]:
    """Where each bracket that is closed is closed."""
    closing, opened = dict[int, int](), list[int]()
    for i, character in enumerate(marks):
        if character == "(":
            opened.append(i)
        elif character == ")" and opened:
            closing[opened.pop()] = i
    return closing


def _items(marks: str, start: int, end: int, closing: dict[int, int]) -> Iterator[tuple[int, int]]:
    """The groups in brackets and the text between them, as ComfyUI counts: from a stray ")" on, the next
    "(" is text, and from a "(" that is not closed, all is.
    """
    depth, first, i = 0, start, start
    while i < end:
        if marks[i] == "(" and depth == 0:
            if i > first:
                yield first, i
            last = closing.get(i, end)
            if last >= end:
                yield i, end
                return
            yield i, last + 1
            first = i = last + 1
            continue
        depth += {"(": 1, ")": -1}.get(marks[i], 0)
        i += 1
    if first < end:
        yield first, end


def _inside(marks: str, start: int, end: int, weight: float) -> tuple[int, int, float]:
    """What is between two brackets, without its number, and its weight."""
    colon = marks.rfind(":", start, end)
    try:
        own = float(marks[colon + 1 : end]) if colon > start else None
    except ValueError:
        own = None
    if own is None:
        return start, end, _finite(1.1 * weight, marks[start:end])
    return start, colon, _finite(own, marks[start:end])


# --- over the steps ----------------------------------------------------------------------------------------

_MARK = re.compile(r"\\.|[()\[\]:|]", re.DOTALL)
_WHEN = re.compile(rf"\s*({_NUMBER}(?:[eE][+-]?\d+)?)\s*")


@dataclass(frozen=True)
class Edit:
    """``[before:after:when]``, ``[after:when]`` and ``[before::when]``; `when` as it is written."""

    before: Edited
    after: Edited
    when: str

    def step(self, steps: int) -> int:
        """How many steps of `steps` it is `before`: a share where there is a point, else a number."""
        share = "." in self.when
        return min(steps, int(float(self.when) * (steps if share else 1)))


@dataclass(frozen=True)
class Turns:
    """``[a|b|c]``: another one in each step, by turns."""

    options: tuple[Edited, ...]


Edited = tuple["str | Edit | Turns", ...]  # one after the other


def edited(prompt: str) -> Edited:
    """A prompt with what changes in it over the steps; brackets that say nothing of that stay text.

    AUTOMATIC1111's prompt editing: a group in square brackets that ends in a colon and a number, with one
    colon more or none before it, or else that holds bars. Colons and bars in other brackets within it, or
    after a backslash, are text; so is a bracket without its like.

    Raises UserError for brackets that lie too deep.
    """
    frames = [_Frame("")]
    place = 0
    for mark in _MARK.finditer(prompt):
        frames[-1].add(prompt[place : mark.start()])
        place, text = mark.end(), mark[0]
        if text in _OF_BRACKET:
            frames.append(_Frame(text))
            _check_depth(len(frames) - 1)
        elif text in _OPENING and frames[-1].bracket == _OPENING[text]:
            frame = frames.pop()
            frames[-1].take(frame, text)
        elif text in _OPENING:
            frames[-1].add(text)
            frames[-1].is_whole = False
        elif text in ":|":
            frames[-1].parts.append(_Mark(text))
        else:
            frames[-1].add(text)
    frames[-1].add(prompt[place:])
    while len(frames) > 1:
        frame = frames.pop()
        frames[-1].add(frame.bracket)
        frames[-1].parts += frame.parts
    return _joined(frames[0].parts)


class _Mark(str):
    """A colon or a bar that may divide the group that it lies in."""


class _Frame:
    """A bracket that is open, and what came after it."""

    def __init__(self, bracket: str) -> None:
        self.bracket, self.is_whole = bracket, True
        self.parts: list[str | Edit | Turns] = []

    def add(self, text: str) -> None:
        if text:
            self.parts.append(text)

    def take(self, inner: _Frame, closing: str) -> None:
        """A group that was closed: as what it says, or as text."""
        read = inner.read() if inner.bracket == "[" and inner.is_whole else None
        if read is not None:
            self.parts.append(read)
            return
        self.is_whole &= inner.is_whole
        self.parts += [inner.bracket, *_joined(inner.parts), closing]

    def read(self) -> Edit | Turns | None:
        colons, bars = (
            [i for i, part in enumerate(self.parts) if isinstance(part, _Mark) and part == mark]
            for mark in ":|"
        )
        if colons:
            when = self.parts[colons[-1] + 1 :]
            number = _WHEN.fullmatch(when[0]) if len(when) == 1 and isinstance(when[0], str) else None
            if len(colons) > 2 or number is None:
                return None
            before = self.parts[: colons[0]] if len(colons) == 2 else []
            after = self.parts[colons[0] + 1 if len(colons) == 2 else 0 : colons[-1]]
            return Edit(_joined(before), _joined(after), number[1])
        if bars:
            edges = [-1, *bars, len(self.parts)]
            return Turns(tuple(_joined(self.parts[a + 1 : b]) for a, b in pairwise(edges)))
        return None


def _joined(parts: list[str | Edit | Turns]) -> Edited:
    """Neighbouring text as one, marks that divide nothing as text."""
    joined: list[str | Edit | Turns] = []
    texts: list[str] = []
    for part in [*parts, None]:
        if isinstance(part, str):
            texts.append(part)
            continue
        joined += ["".join(texts)] if texts else []
        joined += [part] if part else []
        texts = []
    return tuple(joined)


def at_step(prompt: Edited, step: int, steps: int) -> str:
    """The text of step `step` (from 0) of `steps`."""
    return "".join(
        part if isinstance(part, str) else at_step(_chosen(part, step, steps), step, steps) for part in prompt
    )


def _chosen(part: Edit | Turns, step: int, steps: int) -> Edited:
    if isinstance(part, Turns):
        return part.options[step % len(part.options)]
    return part.before if step < part.step(steps) else part.after


# --- composition -------------------------------------------------------------------------------------------

_AND = re.compile(r"\bAND\b")
_SHARE = re.compile(rf"\s*({_NUMBER})?\s*")


def composed(prompt: str) -> list[Piece]:
    """The prompts between ``AND``, each with its weight, ``a cat AND a dog :0.5``.

    The network's answer to the whole is ``uncond + sum_i weight_i (cond_i - uncond)``; Liu et al. 2022,
    "Compositional Visual Generation with Composable Diffusion Models", equation 11.

    Raises:
        UserError: for a weight that is not finite.
    """
    return [_with_share(part) for part in _AND.split(prompt)]


def _with_share(prompt: str) -> Piece:
    text, colon, share = prompt.rpartition(":")
    number = _SHARE.fullmatch(share) if colon else None
    if number is None:
        return Piece(prompt.rstrip())
    return Piece(text.rstrip(), _finite(float(number[1] or 1), prompt))
