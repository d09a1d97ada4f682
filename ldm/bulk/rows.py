"""Tables of requests: Parquet, JSON lines and CSV, as rows that have an id and the fields of a request.

A table is read whole, and what is wrong with it as a table is said before anything is drawn: a column that is
no field, an id that is there twice, a column that changes its kind on the way. What is wrong with one row's
values is said when that row's turn comes, and fails it alone (`ldm.bulk.mapper`).
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ldm.bulk.tables import ID, expand, read_table
from ldm.errors import UserError, printable
from ldm.prompts.tags import take_tags
from ldm.request import OWN, Request, field_named
from ldm.request.fields import short
from ldm.spelling import unknown

NAME = re.compile(r"[A-Za-z0-9_-]{1,90}")  # of files, and of a tar's members without a longer header
KINDS = {bool: "truth", int: "number", float: "number", str: "text", list: "list", dict: "object"}
TAG = re.compile(r"<(?:lora|lyco):[^<>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One picture that is asked for."""

    id: str
    fields: str  # of a Request, as JSON


@dataclass
class Rows:
    """All rows of a run, in the table's order. A row takes some 300 bytes here, by the length of its prompt.

    Attributes:
        kinds: by row, the number of its settings: rows of equal number differ in texts and seeds only.
        models: by that number, the model that such rows name; None: the run's own.
        loras: the names of all that rows name.
        digest: SHA-256 of all ids and fields, whatever file they were read from.
    """

    ids: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    kinds: array[int] = field(default_factory=lambda: array("L"))
    models: list[str | None] = field(default_factory=list)
    loras: set[str] = field(default_factory=set)
    digest: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Row:
        return Row(self.ids[i], self.fields[i])


def seed_of(row_id: str) -> int:
    """The seed of a row that gives none: the first 53 bits of the SHA-256 of its id in UTF-8.

    So many a double holds: the number comes through every reader of JSON and every table as it is.
    """
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big") >> 11


def read_rows(sources: Sequence[str]) -> Rows:
    """The rows of one table, or of several in order; names may be URLs and hold *.

    Raises UserError: for a file that cannot be read, a column that is no field of a request, an id that is
    missing, not allowed or there twice, a column whose kind changes.
    """
    rows, digest = Rows(), hashlib.sha256()
    known: dict[str, int] = {}  # settings -> their number
    first: dict[str, tuple[str, str]] = {}  # column -> its kind, and where that was first seen
    seen = set[str]()
    for source in (each for name in sources for each in expand(name)):
        for number, values in read_table(source):
            where = f"{printable(source)}, row {number}"
            row_id, fields = checked(values, where, first)
            if row_id in seen:
                raise UserError(f"{where}: the id {row_id} is there twice: give each row its own")
            seen.add(row_id)
            text = json.dumps(fields, ensure_ascii=False, sort_keys=True)
            kind = known.setdefault(settings_of(fields), len(known))
            if kind == len(rows.models):
                rows.models.append(fields.get("model"))
                rows.loras.update(loras_of(fields))
            rows.ids.append(row_id)
            rows.fields.append(text)
            rows.kinds.append(kind)
            digest.update(f"{row_id}\0{text}\n".encode("utf-8", "surrogatepass"))
    if not rows.ids:
        raise UserError(f"no rows in {printable(', '.join(sources))}: give one for each picture")
    rows.digest = digest.hexdigest()
    return rows


def checked(
    values: Mapping[str, Any], where: str, first: dict[str, tuple[str, str]]
) -> tuple[str, dict[str, Any]]:
    """A row's id, and its fields by their names in `Request`, without those that say nothing.

    Raises UserError.
    """
    fields: dict[str, Any] = {}
    for column, value in values.items():
        value = without_none(value)
        name = column if column == ID else known_field(column)
        if name is None:
            raise UserError(f"{where}: {unknown('column', column, [ID, *Request.model_fields])}")
        if value is None:
            continue
        kind = KINDS.get(type(value))
        if kind is None:
            raise UserError(f"{where}: {column} holds {type(value).__name__}, which no field of a request is")
        was, seen_at = first.setdefault(column, (kind, where))
        if kind != was:
            raise UserError(
                f"{where}: {column} is a {kind} here, and a {was} in {seen_at}: give a column one kind"
            )
        if name in fields:
            raise UserError(f"{where}: {name} has two columns: give it once")
        fields[name] = value
    return id_of(fields.pop(ID, None), where), fields


known_field = cache(field_named)  # the same few columns in every row


def id_of(value: Any, where: str) -> str:
    """An id as text. Raises UserError."""
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers with gaps
        value = int(value)
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if text is None or text == "":
        raise UserError(f"{where}: it has no id: give each row its own")
    if not isinstance(text, str) or not NAME.fullmatch(text):
        raise UserError(
            f"{where}: the id {printable(short(value))} is not allowed: it names a file, so write at most 90 "
            "letters of a to z, digits, - and _"
        )
    return text


def settings_of(fields: Mapping[str, Any]) -> str:
    """What rows of one batch have alike, as text: all but prompts and seeds, and the tags in the prompt.

    As it is written: two spellings of one sampler are two settings, which costs a fuller batch and no more.
    """
    shared: dict[str, Any] = {name: value for name, value in fields.items() if name not in OWN}
    shared["tags"] = TAG.findall(str(fields.get("prompt", "")))
    shared["edit"] = "target_prompt" in fields
    return json.dumps(shared, sort_keys=True)


def loras_of(fields: Mapping[str, Any]) -> list[str]:
    """The names of LoRAs in a row's prompt and fields, as far as they can be read."""
    named = fields.get("loras")
    uses = list(named) if isinstance(named, list) else []
    with suppress(UserError):
        uses += take_tags(str(fields.get("prompt", "")))[1]
    return [str(use["name"]) for use in uses if isinstance(use, dict) and "name" in use]


def without_none(value: Any) -> Any:
    """A value without what its objects do not say: in Parquet each of them has all names."""
    if isinstance(value, dict):
        return {name: without_none(each) for name, each in value.items() if each is not None} or None
    return [without_none(each) for each in value] if isinstance(value, list) else value
