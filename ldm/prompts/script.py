"""What a prompt says over the steps of a drawing: one text or several that are composed, which may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ldm.errors import UserError
from ldm.prompts.grammar import BREAK, Edit, Edited, Grammar, at_step, composed, edited, pieces


@dataclass(frozen=True)
class Script:
    """The texts of a prompt, each with its share in the composition."""

    texts: tuple[Edited, ...]
    shares: tuple[float, ...] = (1.0,)

    def at(self, step: int, steps: int) -> tuple[str, ...]:
        """The texts of step `step` (from 0) of `steps`."""
        return tuple(at_step(text, step, steps) for text in self.texts)

    def check(self, grammar: Grammar) -> None:
        """Raise UserError for weights that are not allowed in any of its words."""
        for text in self.texts:
            for words in _strings(text):
                pieces(words, grammar)

    @property
    def changes(self) -> bool:
        """Whether steps differ in what it says."""
        return any(not isinstance(part, str) for text in self.texts for part in text)

    @property
    def is_one(self) -> bool:
        """Whether it is one text for all steps, with its full share."""
        return self.shares == (1.0,) and not self.changes


@lru_cache(maxsize=1024)
def read_script(prompt: str, grammar: Grammar, composes: bool = True) -> Script:
    """A prompt in a grammar. Raises UserError for what is not allowed in it.

    Args:
        composes: whether AND composes; in a negative prompt it is a word.
    """
    if grammar != "a1111":
        return Script(((prompt,),))
    if not composes:
        return Script((edited(prompt),))
    parts = composed(prompt)
    if len(parts) == 1:  # AUTOMATIC1111 would take the 9 of "in 16:9" for its weight
        return Script((edited(prompt),))
    return Script(tuple(edited(part.text) for part in parts), tuple(part.weight for part in parts))


Scripts = tuple[Script, Script, Script, Script]


def read_scripts(
    grammar: Grammar, prompt: str, negative: str, prompt_2: str, negative_2: str, target: str | None = None
) -> Scripts:
    """The prompt, the negative prompt, and those of a second text encoder.

    Args:
        target: of an edit by inversion, which has one text for all its steps.

    Raises:
        UserError: for marks that are not allowed, and for two prompts that are composed in other ways.
    """
    first, second = (read_script(text, grammar) for text in (prompt, prompt_2))
    negatives = (read_script(text, grammar, composes=False) for text in (negative, negative_2))
    one, two = negatives
    for script in (first, second, one, two):
        script.check(grammar)
    if second.shares != first.shares:
        raise UserError("prompt and prompt_2 are composed by AND: give both as many parts, and equal weights")
    if target is not None:
        aim = read_script(target, grammar)
        if not (first.is_one and second.is_one and aim.is_one) or one.changes or two.changes:
            raise UserError(
                "an edit by inversion has one text for all its steps: leave AND and [from:to:when] out, or "
                "give prompt_grammar plain (--prompt-grammar plain)"
            )
    return first, one, second, two


def all_words(prompt: str, grammar: Grammar) -> str:
    """All that a prompt says in any step and part, without its marks."""
    texts = [text for edited_text in read_script(prompt, grammar).texts for text in _strings(edited_text)]
    return " ".join(piece.text for text in texts for piece in pieces(text, grammar) if piece is not BREAK)


def describe(prompt: str, grammar: Grammar) -> str | None:
    """What the marks of a prompt make of it, in a few words; None for a prompt without any."""
    script = read_script(prompt, grammar)
    if len(script.texts) > 1:
        shares = ", ".join(f"{share:g}" for share in script.shares)
        return f"{len(script.texts)} prompts are composed, with shares {shares}"
    if script.changes:
        return "the prompt changes over the steps"
    for piece in pieces(script.at(0, 1)[0], grammar):
        if piece is BREAK:
            return "BREAK begins a new window of the text encoder"
        if piece.weight != 1:
            words = " ".join(piece.text.split())
            return f"{words if len(words) <= 40 else f'{words[:40]}...'!r} has weight {piece.weight:.4g}"
    return None


def _strings(text: Edited) -> Iterator[str]:
    for part in text:
        if isinstance(part, str):
            yield part
        else:
            for inner in (part.before, part.after) if isinstance(part, Edit) else part.options:
                yield from _strings(inner)
