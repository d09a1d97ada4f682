"""What a small model can draw, told by a table beside its weights; and prompts put into its words.

`world.json` has the model's things by all the names that it was trained on, singular and plural, other names
for them, and what else it knows. A prompt's "puppy" is then drawn as a dog, if the model never saw a puppy.
Which words are drawn as which is decided once (`World.drawn_as`) and kept in the request: `as_drawn` alone
makes of it what text encoders read. No torch here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ldm.errors import UserError, reason
from ldm.files import whole_file

TABLE = "world.json"
MAX_BYTES = 100 * 2**10
Words = tuple[tuple[str, str], ...]  # each with what is drawn in its place

_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*", re.IGNORECASE)
_PLURALS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"), ("es", ""), ("s", ""))
# Where a noun and its adjectives end: what comes after is another part of the sentence.
_BETWEEN = {
    *(
        "a",
        "above",
        "after",
        "an",
        "and",
        "are",
        "as",
        "at",
        "before",
        "behind",
        "below",
        "beside",
        "between",
    ),
    *("break", "by", "for", "from", "her", "his", "in", "into", "is", "its", "near", "of", "on", "onto"),
    *("or", "over", "that", "the", "through", "to", "under", "was", "were", "which", "while", "with"),
}
_AHEAD = 2  # words in which a noun's head may follow: "an electric blue car"
_LIKE = 0.82  # of difflib's ratio: so near is a misspelt word
_VOWEL = re.compile(r"(?!uni|uku|ufo|one\b)[aeiou]|hour", re.IGNORECASE)


class World(BaseModel):
    """A model's table.

    things: of each its names, singular with plural (None where there is none), the plain one first; words:
    other names, singular, with the plain name of the thing that they are drawn as; near: what the model does
    not know, with the thing that is nearest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    things: tuple[tuple[tuple[str, str | None], ...], ...]
    words: dict[str, str] = {}
    near: dict[str, str] = {}
    styles: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    hours: tuple[str, ...] = ()
    weathers: tuple[str, ...] = ()

    @cached_property
    def plurals(self) -> dict[str, str | None]:
        """The plain name of each thing, and its plural."""
        return {names[0][0]: names[0][1] for names in self.things}

    @cached_property
    def names(self) -> dict[str, str]:
        """Every name that the model was trained on, in lower case, with the thing's plain one."""
        return {name.lower(): names[0][0] for names in self.things for pair in names for name in pair if name}

    @cached_property
    def _longest(self) -> int:
        """Words of the longest name."""
        return max((len(name.split()) for name in (*self.names, *self.words)), default=1)

    def drawn_as(self, texts: Iterable[str], seen: frozenset[str] = frozenset()) -> Words:
        """The words of prompts that are other names of things, each with the name to be drawn.

        A name all of whose words were `seen` in training stays, and so does one that stands anywhere before
        another thing's, as in "a vintage car": there it is no thing itself.
        """
        found: dict[str, str] = {}
        kept = set[str]()
        for said, is_noun in self._mentions(texts):
            drawn = self._other_name(said)
            if drawn is None or seen.issuperset(re.findall(r"[a-z']+", said)):
                continue
            found[said] = drawn
            kept |= set() if is_noun else {said}
        return tuple((said, drawn) for said, drawn in found.items() if said not in kept)

    def nearest(self, word: str) -> tuple[str, ...]:
        """The things nearest to a word that the model does not know: by its meaning, else by its letters."""
        said = word.lower()
        if (meant := _of(self.near, said)) is not None:
            return (meant[0],)
        alike = difflib.get_close_matches(said, [*self.names, *self.words], n=2, cutoff=_LIKE)
        return tuple(dict.fromkeys(self.names.get(each) or self.words[each] for each in alike))

    def told(self, name: str) -> str:
        """A name of a thing as it is said of one: "a dog"; "dogs" and "scissors" as they are."""
        return f"{article(name)} {name}" if self.plurals.get(name) else name

    def lines(self) -> Iterator[str]:
        """All that it knows, a line for each kind of word."""
        things = (
            f"{plain} ({', '.join(one for one, _ in others)})" if others else plain
            for (plain, _), *others in self.things
        )
        yield f"things ({len(self.things)}): {', '.join(things)}"
        for name in ("styles", "colours", "places", "hours", "weathers"):
            if known := getattr(self, name):
                yield f"{name}: {', '.join(known)}"
        if self.words:
            word, thing = list(self.words.items())[-1]
            count = len(self.words)
            yield f"{count} other names are drawn as one of these: {word} as {self.told(thing)}, ..."

    def write(self, path: Path) -> None:
        """Write the table, a line for each thing. Raises UserError for one that is too large to be read."""
        parts = []
        for name, value in self.model_dump(mode="json", exclude_defaults=True).items():
            text = json.dumps(value, ensure_ascii=False)
            rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in value)
            parts.append(f"{json.dumps(name)}: " + (f"[\n  {rows}\n ]" if name == "things" else text))
        data = ("{\n " + ",\n ".join(parts) + "\n}\n").encode()
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: these words take {len(data)} bytes, and {MAX_BYTES} are read")
        with whole_file(path) as aside:
            aside.write_bytes(data)

    def _mentions(self, texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """The names in texts, the longest where there are several, in lower case; and whether each is a noun:
        none is that a thing's name follows.
        """
        for text in texts:
            words = list(_WORD.finditer(text))
            i = 0
            while i < len(words):
                count = next((n for n in range(self._longest, 1, -1) if self._is_name(text, words, i, n)), 1)
                said = _said(words[i : i + count])
                if self._is_name(text, words, i, count):
                    yield said, not self._precedes(text, words, i + count)
                i += count

    def _is_name(self, text: str, words: Sequence[re.Match[str]], first: int, count: int) -> bool:
        """Whether so many words from `first` on, with nothing but spaces between them, are one."""
        run = words[first : first + count]
        if len(run) < count or any(text[a.end() : b.start()].strip() for a, b in pairwise(run)):
            return False
        said = _said(run)
        return said in self.names or self._other_name(said) is not None

    def _precedes(self, text: str, words: Sequence[re.Match[str]], after: int) -> bool:
        """Whether a thing's name follows a name that ends before word `after`, in the same phrase."""
        for i in range(after, min(after + _AHEAD, len(words))):
            if text[words[i - 1].end() : words[i].start()].strip() or words[i][0].lower() in _BETWEEN:
                return False
            if any(self._is_name(text, words, i, n) for n in range(1, self._longest + 1)):
                return True
        return False

    def _other_name(self, said: str) -> str | None:
        """What is drawn for another name, or for a plural that the model was not trained on; else None."""
        found = None if said in self.names else _of(self.words, said) or _of(self.names, said)
        if found is None:
            return None
        thing, several = found
        return self.plurals[thing] or thing if several else thing


def read_world(path: Path) -> World | None:
    """The table in a file; None without the file. Raises UserError, naming what is wrong in it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):  # a model may be one file
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: has more than {MAX_BYTES // 2**10} KiB; a model's words take less")
    try:
        world = World.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise UserError(f"{path}: {place + ': ' if place else ''}{fault['msg']}") from None
    unknown = next(
        (thing for thing in (*world.words.values(), *world.near.values()) if thing not in world.plurals), None
    )
    if unknown is not None:
        raise UserError(f"{path}: {unknown!r} is the plain name of no thing in it")
    return world


@lru_cache(maxsize=1024)
def as_drawn(text: str, words: Words) -> str:
    """A text with other words in the place of `words`, wherever they stand whole; "a" and "an" follow.

    Marks around them stay: "an (alpaca:1.2)" is "a (llama:1.2)". Takes any text.
    """
    if not words:
        return text
    others = {" ".join(said.lower().split()): drawn for said, drawn in words}
    longest_first = sorted(others, key=len, reverse=True)
    either = "|".join(r"\s+".join(map(re.escape, said.split())) for said in longest_first)
    pattern = rf"(?:\b(an?)([\s(\[]+))?(?<![\w-])({either})(?![\w-])"

    def replace(match: re.Match[str]) -> str:
        drawn = others[" ".join(match[3].lower().split())]
        if match[1] is None:
            return drawn
        return f"{match[1][0]}{article(drawn)[1:]}{match[2]}{drawn}"

    return re.sub(pattern, replace, text, flags=re.IGNORECASE)


def article(name: str) -> str:
    """ "a" or "an": an hourglass, a unicorn."""
    return "an" if _VOWEL.match(name) else "a"


def _said(words: Sequence[re.Match[str]]) -> str:
    return " ".join(word[0].lower() for word in words)


def _of(table: dict[str, str], said: str) -> tuple[str, bool] | None:
    """What a table has of a word, or of what it is the plural of: then with True."""
    if said in table:
        return table[said], False
    singulars = (said.removesuffix(end) + new for end, new in _PLURALS if said.endswith(end))
    found = next((one for one in singulars if one in table), None)
    return None if found is None else (table[found], True)
