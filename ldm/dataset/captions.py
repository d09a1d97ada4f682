"""Where the captions of a folder of pictures lie: tables, files beside the pictures, names.

Of what there is, each picture takes the first: a row of a `metadata.jsonl`, `.csv` or `.parquet`; a `.txt` or
`.caption` beside it; the name of its kohya folder (`10_sks dog`); its own file name, where most names speak.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.dataset.findings import Effect, Finding
from ldm.dataset.picture import SUFFIX

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first in a folder is read
BESIDE = (".txt", ".caption")
# Pictures to people, but not to Pillow: said, since a silent gap is worse than a line.
FOREIGN = re.compile(r"\.(hei[cf]|jxl|svg|psd|cr[23]|nef|arw|dng|raf|orf|tga|eps|ico)", re.IGNORECASE)
KOHYA = re.compile(r"0*([1-9]\d{0,2}|1000)_(.+)")  # 2024_summer is a year, not 2024 repeats


# --- what lies in the folder -------------------------------------------------------------------------------


@dataclass
class Listing:
    """The files below a folder, sorted. Names that start with a dot are left out."""

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    beside: list[Path] = field(default_factory=list)  # .txt and .caption
    tables: list[Path] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.folder.resolve()

    def holds(self, path: Path) -> bool:
        """Whether `path` lies in the folder, links followed. May raise OSError or ValueError."""
        return path.resolve().is_relative_to(self.root)


def list_files(folder: Path) -> Listing:
    """Walk down the folder. Links to folders are not followed, links that lead out of it are refused."""
    listing = Listing(folder)

    def unreadable(error: OSError) -> None:
        path = Path(error.filename or folder)
        text = f"the folder cannot be read ({error.strerror}): nothing in it is used"
        listing.findings.append(Finding(path, "unreadable", text, "skipped"))

    for where, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (path := Path(where, name)).is_symlink():
                text = "a link to a folder: not followed, nothing in it is used"
                listing.findings.append(Finding(path, "link", text, "skipped"))
        for name in sorted(name for name in files if not name.startswith(".")):
            _sort_in(listing, Path(where, name))
    _one_table_per_folder(listing)
    return listing


def _sort_in(listing: Listing, path: Path) -> None:
    suffix = path.suffix.lower()
    if path.name in TABLES:
        group = listing.tables
    elif suffix in BESIDE:
        group = listing.beside
    elif SUFFIX.fullmatch(suffix):
        group = listing.pictures
    elif FOREIGN.fullmatch(suffix):
        text = f"{suffix} pictures are not read: it is skipped, unless you convert it to PNG or JPEG"
        listing.findings.append(Finding(path, "other format", text, "skipped"))
        return
    else:
        return
    if path.is_symlink() and not _safely_held(listing, path):
        text = "a link that leads nowhere or out of the folder: refused, it is skipped"
        listing.findings.append(Finding(path, "link", text, "skipped"))
    else:
        group.append(path)


def _safely_held(listing: Listing, path: Path) -> bool:
    try:
        return path.exists() and listing.holds(path)
    except (OSError, ValueError, RuntimeError):  # a link to itself, a name of NULs
        return False


def _one_table_per_folder(listing: Listing) -> None:
    chosen: dict[Path, Path] = {}
    for table in sorted(listing.tables, key=lambda table: TABLES.index(table.name)):
        if (first := chosen.setdefault(table.parent, table)) is not table:
            text = f"not read, since {first.name} lies beside it"
            listing.findings.append(Finding(table, "unread table", text, "note"))
    listing.tables = list(chosen.values())


# --- tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row, wherever it comes from."""

    line: int  # 1 is the first of the file
    values: Mapping[str, Any]


def read_tables(listing: Listing) -> dict[Path, str]:
    """Picture -> caption ("" where the text is empty), of all tables.

    `file_name` counts from the folder that its table lies in. Adds what is wrong to `listing.findings`, and
    pictures that only a table names (without a picture's suffix) to `listing.pictures`.
    """
    captions: dict[Path, str] = {}
    known = set(listing.pictures)
    for table in listing.tables:
        columns: set[str] = set()
        try:
            for row in _rows(table, listing.findings):
                columns.update(map(str, row.values))
                _take(row, table, listing, captions, known)
        except _Unreadable as error:
            listing.findings.append(Finding(table, "broken table", f"{error}", "stops"))
        if others := sorted(columns - {"file_name", "text"}):
            text = f"columns that are not read: {', '.join(others)}"
            listing.findings.append(Finding(table, "unread columns", text, "note"))
    listing.pictures.sort()
    return captions


def _take(row: Row, table: Path, listing: Listing, captions: dict[Path, str], known: set[Path]) -> None:
    def tell(kind: str, text: str, effect: Effect) -> None:
        listing.findings.append(Finding(table, kind, f"row {row.line}: {text}", effect))

    name, text = row.values.get("file_name"), row.values.get("text", ...)
    if not isinstance(name, str) or not name.strip() or not isinstance(text, str | None):
        tell("broken row", "it must have a file_name and a text, both words: mend or remove it", "stops")
        return
    path, held, there = _find(name.strip(), table, listing)
    if not held:
        tell("row leaves the folder", f"{name} lies outside: refused, the row is skipped", "skipped")
    elif not there:
        tell("row without a file", f"there is no {name}: the row is skipped", "skipped")
    elif path in captions:
        tell("repeated row", f"{name} has a row already: this one is skipped", "skipped")
    else:
        captions[path] = _one_line(text or "")
        if path not in known:
            known.add(path)
            listing.pictures.append(path)


def _find(name: str, table: Path, listing: Listing) -> tuple[Path, bool, bool]:
    """A row's file, whether it lies in the folder, and whether it is there."""
    inner = Path(os.path.normpath(name.replace("\\", "/")))
    path = table.parent / inner
    try:
        held, there = listing.holds(path), path.is_file()
        if held and (inner.is_absolute() or ".." in inner.parts):  # name it as the walk did
            path = listing.folder / path.resolve().relative_to(listing.root)
    except (OSError, ValueError, RuntimeError):  # a name of NULs, or longer than any file's
        return path, True, False
    return path, held, there


class _Unreadable(Exception):
    """A table of which no more can be read."""


def _rows(table: Path, findings: list[Finding]) -> Iterator[Row]:
    if table.suffix == ".parquet":
        return _parquet_rows(table)
    try:
        text = decode(table.read_bytes())
    except OSError as error:
        raise _Unreadable(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _Unreadable("it is not UTF-8 text: save it as UTF-8") from None
    return _jsonl_rows(table, text, findings) if table.suffix == ".jsonl" else _csv_rows(text)


def _jsonl_rows(table: Path, text: str, findings: list[Finding]) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = f"row {number}: it is not JSON ({error}): mend or remove it"
            findings.append(Finding(table, "broken row", said, "stops"))
            continue
        yield Row(number, values if isinstance(values, dict) else {})


def _csv_rows(text: str) -> Iterator[Row]:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)  # spreadsheets of many countries write semicolons
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        _check_columns([name.strip() for name in reader.fieldnames or ()])
        for values in reader:
            more = values.pop(None, None)  # fields beyond the header's
            if more:
                raise csv.Error("it has more fields than columns (quote a caption that holds a comma)")
            yield Row(reader.line_num, {name.strip(): value for name, value in values.items()})
    except csv.Error as error:
        raise _Unreadable(f"row {reader.line_num}: {error}: mend or remove it") from None


def _parquet_rows(table: Path) -> Iterator[Row]:
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise _Unreadable("reading it needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(table) as file:
            columns = file.schema_arrow.names
            _check_columns(columns)
            rows = file.read(columns=["file_name", "text"]).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
        raise _Unreadable(f"it cannot be read: {str(error).splitlines()[0]}") from None
    for number, values in enumerate(rows, 1):
        yield Row(number, {**dict.fromkeys(columns), **values})


def _check_columns(columns: Collection[str]) -> None:
    if absent := [name for name in ("file_name", "text") if name not in columns]:
        have = ", ".join(columns) or "nothing"
        raise _Unreadable(f"it has no column {' and no '.join(absent)}, but {have}: name its columns so")


# --- files beside, and names -------------------------------------------------------------------------------


def read_beside(picture: Path, beside: Container[Path]) -> tuple[str, Path] | None:
    """The caption in the `.txt` or else `.caption` of a picture's name, and that file; None if there is none.

    Raises UnicodeDecodeError and OSError where it cannot be read.
    """
    for suffix in BESIDE:
        if (path := picture.with_suffix(suffix)) in beside:
            return _one_line(decode(path.read_bytes())), path
    return None


def kohya(picture: Path, folder: Path) -> tuple[int, str] | None:
    """Repeats and name of the nearest folder called as in `10_sks dog`; None if there is none."""
    for name in reversed(picture.relative_to(folder).parts[:-1]):
        if match := KOHYA.fullmatch(name):
            return int(match[1]), match[2].strip()
    return None


def from_name(picture: Path) -> str | None:
    """The caption that a file name holds: `a_red_car (2).png` is a red car, `IMG_1234.jpg` says nothing.

    A name speaks if it has two words of letters, one of them of three or more.
    """
    text = picture.stem.replace("_", " ")
    text = text if " " in text.strip() else text.replace("-", " ")
    text = re.sub(r"(\s*\(\d+\)|\s+\d+|\s+copy)+$", "", " ".join(text.split()))
    words = [word for word in text.split() if word.strip(".,;!?'\"()").isalpha()]
    return text if len(words) >= 2 and max(map(len, words)) >= 3 else None


def decode(data: bytes) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one. Raises UnicodeDecodeError."""
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def clip_counter() -> Callable[[str], int]:
    """Tokens of a caption by CLIP's own vocabulary, start and end not counted. Loaded at the first call."""
    made: list[Any] = []

    def count(caption: str) -> int:
        if not made:
            from ldm.checkpoint.tokenizer import END, make_tokenizer

            made.append(make_tokenizer({"pad_token": END}).backend_tokenizer)
        return len(made[0].encode(caption, add_special_tokens=False).ids)

    return count
