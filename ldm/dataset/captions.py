"""Where the captions of a folder of pictures lie: tables, files beside the pictures, names.

Of what there is, each picture takes the first: a row of a `metadata.jsonl`, `.csv` or `.parquet`; a `.txt` or
`.caption` beside it; the name of its kohya folder (`10_sks dog`); its own file name, where most names speak.

Suffixes and names of tables are read in any case, and names in any form of Unicode: macOS stores and gives an
ä as two characters, most others as one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.dataset.findings import Effect, Finding
from ldm.dataset.picture import SUFFIX

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first in a folder is read
BESIDE = (".txt", ".caption")
# Pictures to people, but not to Pillow: said, since a silent gap is worse than a line.
FOREIGN = re.compile(r"\.(hei[cf]|jxl|svg|psd|cr[23]|nef|arw|dng|raf|orf|tga|eps|ico)", re.IGNORECASE)
# Tables by other names: Windows hides the end of some, and other programs have names of their own.
OTHER_TABLE = re.compile(
    r".*\.(jsonl|json1|ndjson|csv|tsv|parquet)(\.txt)?|"
    r"(meta|caption|label|prompt|annotation|dataset|train|tags)\w*\.json(\.txt)?",
    re.IGNORECASE,
)
COLUMNS = ("file_name", "text")  # of a picture's file and of its caption
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

    def beside_by_name(self) -> dict[str, dict[str, Path]]:
        """The files of captions: their `same_name` without a suffix -> suffix in lower case -> file."""
        found: dict[str, dict[str, Path]] = {}
        for path in self.beside:
            found.setdefault(same_name(path.with_suffix("")), {}).setdefault(path.suffix.lower(), path)
        return found

    def holds(self, path: Path) -> bool:
        """Whether `path` lies in the folder, links followed. May raise OSError or ValueError."""
        return path.resolve().is_relative_to(self.root)


def same_name(path: Path) -> str:
    """What two spellings of one name have in common."""
    return unicodedata.normalize("NFC", str(path))


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
    if path.name.lower() in TABLES:
        group = listing.tables
    elif OTHER_TABLE.fullmatch(path.name):
        text = f"it is not read: {_rename(path.name)}, if it is a table of captions"
        listing.findings.append(Finding(path, "table of another name", text, "note"))
        return
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


def _rename(name: str) -> str:
    """How to call a table that is called `name`."""
    suffix = Path(name.lower().removesuffix(".txt")).suffix
    called = {".csv": TABLES[1], ".tsv": TABLES[1], ".parquet": TABLES[2]}.get(suffix, TABLES[0])
    lines = " and write one JSON object in each line" if suffix == ".json" else ""
    return f"call it {called}{lines}"


def _safely_held(listing: Listing, path: Path) -> bool:
    try:
        return path.exists() and listing.holds(path)
    except (OSError, ValueError, RuntimeError):  # a link to itself, a name of NULs
        return False


def _one_table_per_folder(listing: Listing) -> None:
    chosen: dict[Path, Path] = {}
    for table in sorted(listing.tables, key=lambda table: TABLES.index(table.name.lower())):
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


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold a picture's file and its caption."""

    image: str = COLUMNS[0]
    caption: str = COLUMNS[1]

    def among(self, names: Collection[str]) -> Columns:
        """Those of a table with these columns. Raises _Unreadable, naming what there is instead.

        `image` is what datasets calls the picture of a row, whose file is in `file_name`.
        """
        datasets = self.image == "image" and "image" not in names and COLUMNS[0] in names
        found = Columns(COLUMNS[0], self.caption) if datasets else self
        wanted = {found.image: "--image-column", found.caption: "--caption-column"}
        if absent := [name for name in wanted if name not in names]:
            have, flags = ", ".join(names) or "nothing", " and ".join(wanted[name] for name in absent)
            raise _Unreadable(
                f"it has no column {' and no '.join(absent)}, but {have}: name its columns so, or say with "
                f"{flags} how they are called"
            )
        return found


def read_tables(listing: Listing, columns: Columns | None = None) -> dict[Path, str]:
    """Picture -> caption ("" where the text is empty), of all tables.

    A picture's name counts from the folder that its table lies in. Adds what is wrong to `listing.findings`,
    and pictures that only a table names (without a picture's suffix) to `listing.pictures`.
    """
    captions: dict[Path, str] = {}
    pictures = listing.pictures
    known = {same_name(path): path for path in pictures} | {str(path): path for path in pictures}
    for table in listing.tables:
        names: set[str] = set()
        used = columns or Columns()
        try:
            for used, row in _rows(table, columns or Columns(), listing.findings):
                names.update(map(str, row.values))
                _take(row, used, table, listing, captions, known)
        except _Unreadable as error:
            listing.findings.append(Finding(table, "broken table", f"{error}", "stops"))
        if others := sorted(names - {used.image, used.caption}):
            text = f"columns that are not read: {', '.join(others)}"
            listing.findings.append(Finding(table, "unread columns", text, "note"))
    listing.pictures.sort()
    return captions


def _take(
    row: Row,
    columns: Columns,
    table: Path,
    listing: Listing,
    captions: dict[Path, str],
    known: dict[str, Path],
) -> None:
    def tell(kind: str, text: str, effect: Effect) -> None:
        listing.findings.append(Finding(table, kind, f"row {row.line}: {text}", effect))

    name, text = row.values.get(columns.image), row.values.get(columns.caption, ...)
    if not isinstance(name, str) or not name.strip() or not isinstance(text, str | None):
        wanted = f"a {columns.image} and a {columns.caption}"
        tell("broken row", f"it must have {wanted}, both words: mend or remove it", "stops")
        return
    path, held, there = _find(name.strip(), table, listing, known)
    if not held:
        tell("row leaves the folder", f"{name} lies outside: refused, the row is skipped", "skipped")
    elif not there:
        tell("row without a file", f"there is no {name}: the row is skipped", "skipped")
    elif path in captions:
        tell("repeated row", f"{name} has a row already: this one is skipped", "skipped")
    else:
        captions[path] = _one_line(text or "")
        if str(path) not in known:
            known[str(path)] = path
            listing.pictures.append(path)


def _find(name: str, table: Path, listing: Listing, known: Mapping[str, Path]) -> tuple[Path, bool, bool]:
    """A row's file, as the walk named it, whether it lies in the folder, and whether it is there."""
    inner = Path(os.path.normpath(name.replace("\\", "/")))
    path = table.parent / inner
    try:
        path = known.get(str(path)) or known.get(same_name(path), path)
        held, there = listing.holds(path), path.is_file()
        if held and (inner.is_absolute() or ".." in inner.parts):  # name it as the walk did
            path = listing.folder / path.resolve().relative_to(listing.root)
    except (OSError, ValueError, RuntimeError):  # a name of NULs, or longer than any file's
        return path, True, False
    return path, held, there


class _Unreadable(Exception):
    """A table of which no more can be read."""


def _rows(table: Path, columns: Columns, findings: list[Finding]) -> Iterator[tuple[Columns, Row]]:
    """The rows, each with the columns that are read. Raises _Unreadable, maybe after some of them."""
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(table, columns)
    try:
        text = decode(table.read_bytes())
    except OSError as error:
        raise _Unreadable(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _Unreadable("it is not UTF-8 text: save it as UTF-8") from None
    return _jsonl_rows(table, text, columns, findings) if suffix == ".jsonl" else _csv_rows(text, columns)


def _jsonl_rows(
    table: Path, text: str, columns: Columns, findings: list[Finding]
) -> Iterator[tuple[Columns, Row]]:
    if _is_one_value(text):
        raise _Unreadable("it is one JSON value and not lines of it: write each row as an object in its line")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = f"row {number}: it is not JSON ({error}): mend or remove it"
            findings.append(Finding(table, "broken row", said, "stops"))
            continue
        rows.append(Row(number, values if isinstance(values, dict) else {}))
    names = dict.fromkeys(name for row in rows for name in row.values)
    used = columns.among(names) if names else columns
    for row in rows:
        yield used, row


def _is_one_value(text: str) -> bool:
    """Whether a file is an array of objects, or one object over several lines."""
    if not re.match(r"\s*(\[\s*(\{|$)|\{\s*$)", text, re.MULTILINE):  # as they begin
        return False
    return _is_json(text) or not any(_is_json(line) for line in text.split("\n"))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _csv_rows(text: str, columns: Columns) -> Iterator[tuple[Columns, Row]]:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)  # spreadsheets of many countries write semicolons
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        used = columns.among([name.strip() for name in reader.fieldnames or ()])
        for values in reader:
            more = values.pop(None, None)  # fields beyond the header's
            if more:
                raise csv.Error("it has more fields than columns (quote a caption that holds a comma)")
            yield used, Row(reader.line_num, {name.strip(): value for name, value in values.items()})
    except csv.Error as error:
        raise _Unreadable(f"row {reader.line_num}: {error}: mend or remove it") from None


def _parquet_rows(table: Path, columns: Columns) -> Iterator[tuple[Columns, Row]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise _Unreadable("reading it needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(table) as file:
            names = file.schema_arrow.names
            used = columns.among(names)
            rows = file.read(columns=[used.image, used.caption]).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
        raise _Unreadable(f"it cannot be read: {str(error).splitlines()[0]}") from None
    for number, values in enumerate(rows, 1):
        yield used, Row(number, {**dict.fromkeys(names), **values})


# --- files beside, and names -------------------------------------------------------------------------------


def read_beside(picture: Path, beside: Mapping[str, Mapping[str, Path]]) -> tuple[str, Path] | None:
    """The caption in the `.txt` or else `.caption` of a picture's name, and that file; None if there is none.

    Args:
        beside: `Listing.beside_by_name`.

    Raises UnicodeDecodeError and OSError where it cannot be read.
    """
    for suffix in BESIDE:
        if (path := beside.get(same_name(picture.with_suffix("")), {}).get(suffix)) is not None:
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
            from ldm.checkpoint.tokenizer import make_tokenizer
            from ldm.prompts.tokenizer import END

            made.append(make_tokenizer({"pad_token": END}))
        return len(made[0].ids(caption))

    return count
