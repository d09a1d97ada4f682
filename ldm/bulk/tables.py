"""Files of requests: Parquet, JSON lines and CSV, read row by row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from glob import glob
from pathlib import Path
from typing import IO, Any

from ldm.bulk.objects import open_filesystem
from ldm.errors import UserError, printable, reason
from ldm.request import Request, field_named

ID = "id"
READ_ROWS = 4096  # of Parquet at once


def expand(name: str) -> list[str]:
    """The files that a name with * means, sorted; without one, itself. Raises UserError if there is none."""
    if "*" not in name:
        return [name]
    if "://" not in name:
        found = sorted(glob(name, recursive=True))
    else:
        fs, path_ = open_filesystem(name)
        found = sorted(fs.unstrip_protocol(each) for each in fs.glob(path_))
    if not found:
        raise UserError(f"there is no {printable(name)}")
    return found


def open_input(name: str) -> IO[bytes]:
    """A file or an object to read from. Raises UserError where it cannot be opened."""
    try:
        if "://" not in name:
            return Path(name).open("rb")
        fs, path = open_filesystem(name)
        file: IO[bytes] = fs.open(path, "rb")
    except UserError:
        raise
    except Exception as error:  # each store has errors of its own
        raise UserError(f"cannot read {printable(name)}: {printable(reason(error))}") from None
    return file


def read_table(source: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file, each with its number: of a Parquet file from 1, else the line. Raises UserError."""
    readers = {".parquet": parquet_rows, ".jsonl": json_rows, ".ndjson": json_rows, ".csv": csv_rows}
    reader = next((read for suffix, read in readers.items() if source.lower().endswith(suffix)), None)
    if reader is None:
        raise UserError(f"{printable(source)} is no table that is read: give {', '.join(readers)}")
    try:
        with open_input(source) as file:
            yield from reader(file)
    except UserError:
        raise
    except BadRow as error:
        raise UserError(f"{printable(source)}, row {error.number}: {printable(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read {printable(source)}: it is not UTF-8 text") from None
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's own are of these kinds
        raise UserError(f"cannot read {printable(source)}: {printable(reason(error))}") from None


class BadRow(Exception):
    """A row that cannot be read, by its number."""

    def __init__(self, number: int, fault: str) -> None:
        super().__init__(fault)
        self.number = number


def parquet_rows(file: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    from pyarrow.parquet import ParquetFile

    batches = ParquetFile(file).iter_batches(READ_ROWS)
    yield from enumerate((values for batch in batches for values in batch.to_pylist()), 1)


def json_rows(file: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(io.TextIOWrapper(file, "utf-8-sig", newline="\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRow(number, f"it is not JSON ({reason(error)})") from None
        if not isinstance(values, dict):
            raise BadRow(number, "it is no JSON object: write one in each line")
        yield number, values


def csv_rows(file: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Cells of fields that are no text are JSON, as 512, 7.5, true and [1, 2] are; empty ones say nothing."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    head = text.readline()
    delimiter = max(",;\t", key=head.count)  # spreadsheets of many countries write semicolons
    (names,) = csv.reader([head], delimiter=delimiter)
    names = [name.strip() for name in names]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise BadRow(1, f"the column {doubled[0]} is there twice")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    for cells in reader:
        number = reader.line_num + 1
        if len(cells) != len(names) and cells:
            raise BadRow(
                number,
                f"it has {len(cells)} fields, and the head {len(names)} (quote a text that holds a comma)",
            )
        if values := cells_of(names, cells):
            yield number, values


def cells_of(names: Iterable[str], cells: Iterable[str]) -> dict[str, Any]:
    return {
        name: cell if name == ID or is_text(name) else from_cell(cell)
        for name, cell in zip(names, cells, strict=False)
        if cell != ""
    }


def from_cell(cell: str) -> Any:
    try:
        return json.loads(cell.lower() if cell.lower() in ("true", "false") else cell)
    except (ValueError, RecursionError):
        return cell


@cache
def is_text(column: str) -> bool:
    """Whether a column's field holds text; one that is no field does."""
    schema = Request.model_json_schema()
    schema = schema.get("$defs", {}).get("Request", schema)["properties"].get(field_named(column), {})
    kinds = {each.get("type") for each in (schema, *schema.get("anyOf", ()))} - {None, "null"}
    return kinds <= {"string"}
