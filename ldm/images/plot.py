"""`--plot`: what is drawn for each combination of values, on one labelled sheet with a JSON beside it."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.request import Request

AXES = 3
MAX_CELLS = 2500  # of one sheet
REPLACE = ("promptsr", "replace", "sr")  # names of prompt search-and-replace
_NUMBER = r"([+-]?\d+(?:\.\d+)?)"
RANGE = re.compile(rf"{_NUMBER} *- *{_NUMBER} *(?:\( *{_NUMBER} *\)|\[ *(\d+) *\])?")

Cell = tuple[int, ...]  # which value of each axis


@dataclass(frozen=True)
class Axis:
    """A field of a request, or None for words of the prompt that are replaced, and its values."""

    title: str
    field: str | None
    values: tuple[str | int | float, ...]

    def change(self, fields: Mapping[str, Any], k: int) -> dict[str, Any]:
        """The fields of a request with the k-th value. Raises UserError for a word that is not there."""
        from ldm.request import PROMPTS

        value = self.values[k]
        if self.field is not None:
            return {**fields, self.field: (value,) if self.field == "seeds" else value}
        word = str(self.values[0])
        texts = {name: fields[name] for name in PROMPTS if fields.get(name)}
        if not any(word in text for text in texts.values()):
            raise UserError(f"--plot replaces {word!r}, which is in no prompt: begin with a word that is")
        return {**fields, **{name: text.replace(word, str(value)) for name, text in texts.items()}}

    def label(self, k: int) -> str:
        from ldm.request import PROMPTS

        value = self.values[k]
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        return shown if self.field is None or self.field in PROMPTS else f"{self.title}: {shown}"


@dataclass(frozen=True)
class Plot:
    """Axes: across, down, and one table after another."""

    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows and tables."""
        across, down, tables = (*(len(axis.values) for axis in self.axes), 1, 1)[:AXES]
        return across, down, tables

    def cells(self, fields: Mapping[str, Any]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Each cell and the fields of its request, row by row. Raises UserError."""
        axes = self.axes[::-1]
        for numbers in itertools.product(*(range(len(axis.values)) for axis in axes)):
            changed = dict(fields)
            for axis, k in zip(axes, numbers, strict=True):
                changed = axis.change(changed, k)
            yield numbers[::-1], changed

    def sheet(self, pictures: Mapping[Cell, Image]) -> Image:
        """All cells with their values beside them; those that are not there are left empty."""
        from ldm.images.sheet import font_size, label, table

        across, down, tables = self.shape
        width = max(image.width for image in pictures.values())
        size = font_size(width)
        names = [[label(axis.label(k), width, size) for k in range(len(axis.values))] for axis in self.axes]
        rows: list[list[Image | None]] = []
        blank: list[Image | None] = [None] if len(names) > 1 else []
        for z in range(tables):
            heading = [*blank, *names[0]]
            if tables > 1:
                heading[0] = names[2][z]
            rows.append(heading)
            for y in range(down):
                line: list[Image | None] = [] if len(names) < 2 else [names[1][y]]
                cells = [(x, y, z)[: len(self.axes)] for x in range(across)]
                rows.append([*line, *(pictures.get(cell) for cell in cells)])
        return table(rows)

    def write(self, path: Path, cells: Mapping[Cell, tuple[Request, Path | None]]) -> Path:
        """The JSON beside a sheet: axes, and of each cell its values, request and file. Raises UserError."""
        from ldm.files import whole_file

        told = {
            "sheet": path.name,
            "axes": [{"name": axis.title, "values": axis.values} for axis in self.axes],
            "cells": [
                {
                    "values": [axis.values[k] for axis, k in zip(self.axes, cell, strict=True)],
                    "file": None if file is None else _beside(file, path),
                    "request": json.loads(request.to_json()),
                }
                for cell, (request, file) in cells.items()
            ],
        }
        with whole_file(path.with_suffix(".json")) as temporary:
            text = json.dumps(told, ensure_ascii=False, indent=1)
            temporary.write_text(f"{text}\n", encoding="utf-8")
        return path.with_suffix(".json")


def read_plot(texts: Sequence[str]) -> Plot:
    """The plot that `--plot "steps=4,8; cfg=1-7(+2)"` asks for. Raises UserError."""
    pieces = [piece for text in texts for piece in re.findall(r'(?:"(?:[^"]|"")*"|[^;"]|")+', text)]
    axes = tuple(_axis(piece.strip()) for piece in pieces if piece.strip())
    if not 1 <= len(axes) <= AXES:
        raise UserError(f"--plot has {len(axes)} axes: give one to three, such as 'steps=4,8; cfg=1,4,7'")
    fields = [axis.field for axis in axes]
    for field in fields:
        if field is not None and fields.count(field) > 1:
            raise UserError(f"--plot has two axes of {field}: give its values to one")
    plot = Plot(axes)
    across, down, tables = plot.shape
    if across * down * tables > MAX_CELLS:
        raise UserError(f"--plot has {across * down * tables} cells: a sheet holds at most {MAX_CELLS}")
    return plot


def _axis(text: str) -> Axis:
    from ldm.request import NOTED, Request, field_named
    from ldm.request.fields import consecutive_seeds
    from ldm.spelling import squash, unknown

    name, equals, values = text.partition("=")
    title = printable(name.strip())
    if not equals or not values.strip():
        raise UserError(f"--plot {text!r} has no values: write such as steps=4,8,20")
    written = next(csv.reader([values.strip()], skipinitialspace=True))
    given = [value.strip() for value in written if value.strip()]
    if squash(name) in REPLACE:
        return Axis(title, None, tuple(given))
    field = field_named(name)
    plottable = [each for each in Request.model_fields if each not in NOTED and _kind(each) is not None]
    if field not in plottable:
        raise unknown("axis of --plot", title, ["seed", "steps", "cfg", "prompt s/r", *plottable])
    kind = _kind(field)
    if kind is str:
        return Axis(title, field, tuple(given))
    numbers = [number for value in given for number in _numbers(value, kind is int, title)]
    if field == "seeds":  # a random one is told, and stays the same in its row
        numbers = [consecutive_seeds(int(seed))[0] for seed in numbers]
    return Axis(title, field, tuple(numbers))


def _kind(field: str) -> type | None:
    """What the values of a field are: int, float or str; None for pairs and lists."""
    from ldm.request import Request

    if field == "seeds":
        return int
    said = str(Request.model_fields[field].annotation)
    if "tuple" in said or "Request" in said:
        return None
    return int if "int" in said else float if "float" in said else str


def _numbers(text: str, whole: bool, title: str) -> list[int | float]:
    """A number, or a range as AUTOMATIC1111 writes it: 1-5, 1-10(+3) by steps, 0-1[5] as so many."""
    found = RANGE.fullmatch(text)
    try:
        if found is None:
            return [int(text) if whole else float(text)]
        first, last = float(found[1]), float(found[2])
        if found[4] is not None:
            count = int(found[4])
            step = (last - first) / max(1, count - 1)
        else:
            step = float(found[3] or (1 if last >= first else -1))
            count = int((last - first) / step + 1e-9) + 1 if step * (last - first) >= 0 else 0
        if not 1 <= count <= MAX_CELLS:
            raise ValueError(f"{count} values")
        if whole and found[4] is None and not (first.is_integer() and step.is_integer()):
            raise ValueError("not whole")
    except (ValueError, ZeroDivisionError):
        what = "whole numbers" if whole else "numbers"
        raise UserError(f"--plot {title}={text}: write {what}, or ranges 1-5, 1-10(+3), 0-1[5]") from None
    values = [first + k * step for k in range(count)]
    return [round(value) for value in values] if whole else [round(value, 9) for value in values]


def _beside(file: Path, sheet: Path) -> str:
    """The file as seen from the sheet's folder, where it lies below."""
    try:
        return file.relative_to(sheet.parent).as_posix()
    except ValueError:
        return str(file)
