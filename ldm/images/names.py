"""Names of pictures by a pattern such as "{seed}-{prompt:40}", which every system takes."""

from __future__ import annotations

import re
import string
import unicodedata
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ldm.errors import UserError
from ldm.request import Request, field_named
from ldm.spelling import unknown

MAX_BYTES = 150  # of what the fields of a name take together: systems allow 255
# Windows takes these for devices, whatever their suffix.
RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\.|$)", re.IGNORECASE
)
# What most requests have once they are filled in.
FILLED: dict[str, Any] = {
    **dict.fromkeys(("prompt", "negative_prompt", "model", "model_hash"), "a"),
    **dict.fromkeys(("width", "height", "num_inference_steps"), 8),
    **dict.fromkeys(("guidance_scale", "strength", "eta"), 0.5),
    "sampler": "euler",
    "spacing": "karras",
}
UNSAFE = re.compile(r'[<>:"/\\|?*%\s]+')


@dataclass(frozen=True)
class Pattern:
    """A pattern of names: fields of a request, `counter`, `date` and `time` in braces, each with a format.

    A text's format is the most characters it takes, a number's and a date's is Python's: `{seed:010}`,
    `{date:%Y%m%d}`. Slashes of the pattern make folders. Raises UserError where it cannot be followed.
    """

    text: str

    def __post_init__(self) -> None:
        path, _ = self.fill(Request(**FILLED), datetime.now())  # raises for a format that does not fit
        counters = sum(field == "counter" for _, field, _ in self._parts())
        if counters > 1 or "%" in path.rpartition("/")[0]:
            raise UserError(f"--name {self.text}: write the counter once, in the name itself")
        literals = sum(len(literal.encode()) for literal, _, _ in self._parts())
        if not self.text.strip("/ ") or self.text.endswith("/") or literals > MAX_BYTES // 2:
            raise UserError(f"--name {self.text!r:.80} is no name: write such as {{seed}}-{{prompt:40}}")

    def fill(self, request: Request, now: datetime) -> tuple[str, str]:
        """The path without a suffix, and what the name in it looks like for others: "a boat-%05d", "*-%05d".

        In both, %05d stands for the counter.
        """
        parts = self._parts()
        room = MAX_BYTES // max(1, sum(field is not None for _, field, _ in parts))
        path = like = ""
        for literal, field, form in parts:
            literal = "/".join(_seen(part, "_") for part in literal.split("/"))
            shown = "" if field is None else self._counter(form) if field == "counter" else None
            value = self._value(str(field), form, request, now) if shown is None else shown
            path, like = (
                path + literal + _cut(value, room),
                like + literal + ("*" if shown is None else shown),
            )
        *folders, name = path.split("/")
        names = [*(safe(folder) for folder in folders if folder.strip()), safe(name)]
        return "/".join(names), re.sub(r"\*+", "*", like.rpartition("/")[2])

    def _parts(self) -> list[tuple[str, str | None, str]]:
        """(text before it, name of a field, its format) of each field; the last text has no field."""
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise UserError(
                f"--name {self.text}: {error}; {{{{ and }}}} stand for braces themselves"
            ) from None
        return [(literal, field, form or "") for literal, field, form, _ in parts]

    def _counter(self, form: str) -> str:
        if not re.fullmatch("(0?[1-9])?", form):
            raise UserError(
                f"--name {self.text}: {{counter:05}} has five digits; {form!r} says no number of them"
            )
        return f"%0{int(form or 5)}d"

    def _value(self, field: str, form: str, request: Request, now: datetime) -> str:
        value = now if field in ("date", "time") else self._of_request(field, request)
        try:
            if isinstance(value, datetime):
                return _seen(value.strftime(form or ("%Y-%m-%d" if field == "date" else "%H-%M-%S")), "-")
            if isinstance(value, int | float):
                return _seen(format(value, form), "-")
            return "" if value is None else _seen(str(value), " ")[: int(form or MAX_BYTES)].strip()
        except ValueError:
            raise UserError(f"--name {self.text}: {{{field}}} cannot be written as {form!r}") from None

    def _of_request(self, field: str, request: Request) -> Any:
        name = field_named(field)
        if name is None:
            known = ("counter", "date", "time", "seed", "steps", "cfg", *Request.model_fields)
            raise unknown(f"field of --name {self.text}:", field, known)
        if name == "seeds":
            return request.seeds[0]
        return request.shown if name == "prompt" else getattr(request, name)


def safe(name: str) -> str:
    """One part of a path, of characters that are, as Windows, macOS and Linux all take it.

    Shells take it for no flag, and it is not hidden.
    """
    name = name.strip(" ").lstrip("-").rstrip(". ")
    return f"_{name}" if not name or name.startswith(".") or RESERVED.match(name) else name


def _seen(text: str, instead: str) -> str:
    """Without what no name may hold, and without what is not seen: controls, turns of direction."""
    text = UNSAFE.sub(
        lambda found: instead if found[0].strip(" ") else found[0], unicodedata.normalize("NFC", text)
    )
    return "".join(c for c in text if unicodedata.category(c)[0] != "C")


def _cut(text: str, most: int) -> str:
    """The first characters of it, of at most that many bytes."""
    return text.encode()[:most].decode(errors="ignore")
