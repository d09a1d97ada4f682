"""A folder of someone's own pictures, examined before training: everything that is wrong with it, at once.

    list_files -> inspect every picture -> read_tables, captions -> Examples to train on, Findings to tell

Nothing in the folder is ever written to, moved or deleted. No torch here: it answers before any model loads.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ldm.dataset.captions import (
    BESIDE,
    COLUMNS,
    Columns,
    Listing,
    from_name,
    kohya,
    list_files,
    read_beside,
    read_tables,
    same_name,
)
from ldm.dataset.duplicates import find_near_duplicates
from ldm.dataset.findings import EFFECTS, Effect, Examined, Example, Finding
from ldm.dataset.picture import Fault, PictureInfo, inspect_picture, masks_beside
from ldm.dataset.shards import Member, find_shards, read_index
from ldm.errors import UserError
from ldm.runtime import local_cores

MAX_ASPECT = 3.0  # of the longer side to the shorter
MISSING: dict[str, tuple[Effect, str]] = {
    "error": ("stops", "training stops: write one, or choose --missing_caption empty or skip"),
    "empty": ("fixed", "it is trained on with an empty caption"),
    "skip": ("skipped", "it is skipped"),
}
MissingCaption = Literal["error", "empty", "skip"]
Progress = Callable[[int, int], None]  # pictures done, pictures in all


def examine(
    folder: str | Path,
    *,
    instance_prompt: str | None = None,
    missing_caption: MissingCaption = "error",
    count_tokens: Callable[[str], int] | None = None,
    window: int = 77,
    resolution: int = 512,
    image_column: str | None = None,
    caption_column: str | None = None,
    on_progress: Progress | None = None,
    index: Path | None = None,
) -> Examined:
    """Find out what can be trained on, reading every file whole.

    Args:
        folder: of pictures; or shards, as `find_shards` knows them.
        instance_prompt: the caption of every picture; those in the folder are not read.
        missing_caption: what happens to a picture whose caption is missing, empty or no text.
        count_tokens: tokens of a caption, start and end not counted; without it, none is called too long.
        window: tokens that the text encoder sees, start and end counted.
        resolution: pixels; pictures whose shorter side is below half of it are told.
        image_column, caption_column: of tables; by default file_name and text.
        on_progress: called after each picture of a folder.
        index: a folder in which it is kept what shards hold, so that each is read through once.

    Raises:
        UserError: if `folder` is no folder, a shard cannot be read, or `missing_caption` is no choice.
    """
    if missing_caption not in MISSING:
        raise UserError(f"missing_caption {missing_caption!r} is not one of {', '.join(MISSING)}")
    shards = find_shards(folder)
    if shards:
        found = _in_shards(read_index(shards, index), instance_prompt, missing_caption)
    else:
        columns = Columns(image_column or COLUMNS[0], caption_column or COLUMNS[1])
        found = _in_folder(Path(folder), instance_prompt, missing_caption, columns, on_progress)
    examples, copies = _drop_copies(found.examples)
    # Thumbnails of shards are not kept: they are many, and all would be compared with all.
    near = [] if shards else _near_duplicates(examples, found.readable)
    findings = found.findings + copies + near
    for example in examples:
        findings += _picture_findings(example, found.readable[example.path], resolution)
    if count_tokens is not None:
        captions = [(example.path, example.caption) for example in examples]
        one = [(None, instance_prompt)]
        findings += _long_captions(captions if instance_prompt is None else one, count_tokens, window - 2)
    if not examples:
        findings.append(Finding(None, "no pictures", f"no picture to train on in {folder}", "stops"))
    findings.sort(key=lambda each: (EFFECTS.index(each.effect), each.kind, str(each.path), each.text))
    return Examined(Path(folder), _layout(examples, found.sources), tuple(examples), tuple(findings))


@dataclass(frozen=True)
class _Found:
    """What pictures and captions there are, and what is wrong with them."""

    examples: list[Example]
    readable: dict[Path, PictureInfo]
    findings: list[Finding]
    sources: dict[Path, str]  # where a caption is from


def _in_folder(
    folder: Path,
    instance_prompt: str | None,
    missing: MissingCaption,
    columns: Columns,
    on_progress: Progress | None,
) -> _Found:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one that holds pictures")
    listing = _without_masks(list_files(folder))
    tables = {} if instance_prompt is not None else read_tables(listing, columns)
    inspected = _inspect_all(listing.pictures, on_progress)
    findings = listing.findings
    if columns != Columns(*COLUMNS) and not listing.tables:
        text = f"the columns {columns.image} and {columns.caption} were asked for, but there is no table"
        findings.append(Finding(None, "no table", text, "note"))
    readable, faults = _sorted_out(inspected)
    captioner = _Captioner(listing, tables, instance_prompt, missing)
    examples = captioner.examples(readable)
    return _Found(examples, readable, findings + faults + captioner.findings, captioner.sources)


def _in_shards(members: Sequence[Member], instance_prompt: str | None, missing: MissingCaption) -> _Found:
    readable, findings = _sorted_out({member.path: member.found for member in members})
    examples, sources = [], {}
    effect, then = MISSING[missing]
    for member in members:
        info, caption = readable.get(member.path), instance_prompt or member.caption
        if info is None:
            continue
        if not caption:
            text = "it has no caption in its shard" if caption is None else "its caption is empty"
            findings.append(Finding(member.path, "missing caption", f"{text}: {then}", effect))
            if effect == "skipped":
                continue
            caption = "" if effect == "fixed" else None
        else:
            sources[member.path] = "shards" if instance_prompt is None else "the instance prompt"
        examples.append(Example(member.path, caption, info.size, info.digest, place=member.place))
    return _Found(examples, readable, findings, sources)


def _sorted_out(
    inspected: Mapping[Path, PictureInfo | Fault],
) -> tuple[dict[Path, PictureInfo], list[Finding]]:
    """What can be read, and what is said of the rest."""
    readable = {path: info for path, info in inspected.items() if isinstance(info, PictureInfo)}
    return readable, [
        _fault_finding(path, info) for path, info in inspected.items() if isinstance(info, Fault)
    ]


def _layout(examples: Sequence[Example], sources: Mapping[Path, str]) -> str:
    """Where the captions of what is trained on come from, e.g. "18 from .txt files, 2 without"."""
    counts = Counter(sources.get(example.path, "") for example in examples)
    without = counts.pop("", 0)
    parts = [f"{number} from {source}" for source, number in counts.most_common()]
    return ", ".join(parts + ([f"{without} without"] if without else [])) or "none"


def _without_masks(listing: Listing) -> Listing:
    """Masks of pictures are no pictures themselves."""
    if masks := set(masks_beside(listing.pictures).values()):
        listing.pictures = [path for path in listing.pictures if path not in masks]
        text = f"{len(masks)} masks beside pictures, such as {min(masks).name}: read with --masked_loss"
        listing.findings.append(Finding(None, "masks", text, "note"))
    return listing


def _inspect_all(pictures: Sequence[Path], on_progress: Progress | None) -> dict[Path, PictureInfo | Fault]:
    """Threads, since decoding and hashing release the interpreter's lock: as fast as processes here."""
    with warnings.catch_warnings(), ThreadPoolExecutor(local_cores()) as pool:
        warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are large but not too large
        jobs = {pool.submit(inspect_picture, path): path for path in pictures}
        try:
            for done, _ in enumerate(as_completed(jobs), 1):
                if on_progress is not None:
                    on_progress(done, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {path: job.result() for job, path in jobs.items()}


# --- captions ----------------------------------------------------------------------------------------------


class _Captioner:
    """Which caption each picture has, where it is from, and what is wrong with it."""

    def __init__(
        self, listing: Listing, tables: dict[Path, str], prompt: str | None, missing: MissingCaption
    ) -> None:
        self.folder, self.tables, self.prompt, self.missing = listing.folder, tables, prompt, missing
        self.beside = listing.beside_by_name()
        self.table_names = " and ".join(sorted({table.name for table in listing.tables}))
        self.findings: list[Finding] = []
        self.sources: dict[Path, str] = {}
        pictures = listing.pictures
        stems = {_stem(path) for path in pictures}
        self.paired = [path for path in listing.beside if _stem(path) in stems]
        self._note_unread(listing, [path for path in listing.beside if _stem(path) not in stems])
        nothing_else = not (listing.tables or self.paired)
        self.names_speak = nothing_else and 2 * sum(from_name(path) is not None for path in pictures) > len(
            pictures
        )

    def examples(self, readable: dict[Path, PictureInfo]) -> list[Example]:
        """The pictures with their captions; those that are skipped for want of one are left out."""
        found = []
        for path, info in readable.items():
            caption = self._caption(path)
            if not caption:
                effect, _ = MISSING[self.missing]
                if effect == "skipped":
                    continue
                caption = "" if effect == "fixed" else None
            repeats, _ = kohya(path, self.folder) or (1, "")
            found.append(Example(path, caption, info.size, info.digest, repeats))
        self._note_repeats(found)
        return found

    def _caption(self, path: Path) -> str | None:
        """The first caption that there is; where it is missing or empty, that is told."""
        try:
            caption, source = self._first(path)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            self._note_missing(path, "unreadable caption", f"its caption cannot be read ({reason})")
            return None
        if caption:
            self.sources[path] = source
        elif caption is not None:
            self._note_missing(path, "empty caption", f"its caption (from {source}) is empty")
        elif self.table_names:
            self._note_missing(path, "file without a row", f"no row of {self.table_names} names it")
        else:
            self._note_missing(path, "missing caption", "it has no caption")
        return caption

    def _first(self, path: Path) -> tuple[str | None, str]:
        if self.prompt is not None:
            return self.prompt, "the instance prompt"
        if path in self.tables:
            return self.tables[path], self.table_names
        if (read := read_beside(path, self.beside)) is not None:
            return read[0], f"{read[1].suffix.lower()} files"
        if not self.table_names and (repeated := kohya(path, self.folder)):
            return repeated[1], "names of folders"
        return (from_name(path) if self.names_speak else None), "names of files"

    def _note_missing(self, path: Path, kind: str, text: str) -> None:
        effect, then = MISSING[self.missing]
        self.findings.append(Finding(path, kind, f"{text}: {then}", effect))

    def _note_unread(self, listing: Listing, orphans: Sequence[Path]) -> None:
        """Captions that lie there and are not used, silently in most trainers."""
        for path in orphans:
            text = "no picture has its name: it is not read"
            self.findings.append(Finding(path, "caption without a picture", text, "note"))
        if self.prompt is not None:
            unread = [*listing.tables, *self.paired]
            why = "every picture's caption is the instance prompt"
        else:
            rows = {_stem(path) for path in self.tables}
            first = {name: min(files.items(), key=_rank)[1] for name, files in self.beside.items()}
            unread = [path for path in self.paired if _stem(path) in rows or first[_stem(path)] is not path]
            why = "a row or a .txt file goes before it"
        for path in unread:
            self.findings.append(Finding(path, "unread captions", f"it is not read: {why}", "note"))

    def _note_repeats(self, examples: Sequence[Example]) -> None:
        repeated = Counter((example.path.parent, example.repeats) for example in examples)
        for (parent, repeats), number in repeated.items():
            if repeats > 1:
                text = f"the folder's name has its {number} pictures shown {repeats} times in each epoch"
                self.findings.append(Finding(parent, "repeats", text, "note"))


def _stem(path: Path) -> str:
    return same_name(path.with_suffix(""))


def _rank(found: tuple[str, Path]) -> int:
    return BESIDE.index(found[0])


# --- pictures ----------------------------------------------------------------------------------------------


def _fault_finding(path: Path, fault: Fault) -> Finding:
    return Finding(path, fault.kind, f"{fault.text}: it is skipped", "skipped")


def _drop_copies(examples: Sequence[Example]) -> tuple[list[Example], list[Finding]]:
    """Of files with the same bytes and the same caption, the first is kept."""
    kept: dict[tuple[str, str | None], Example] = {}
    first: dict[str, Example] = {}
    findings = []
    for example in examples:
        one = first.setdefault(example.digest, example)
        if (same := kept.setdefault((example.digest, example.caption), example)) is not example:
            text = f"the same bytes as {same.path}: it is skipped, the other is kept"
            findings.append(Finding(example.path, "duplicate", text, "skipped"))
        elif one is not example:
            text = f"the same bytes as {one.path} with another caption: both are trained on"
            findings.append(Finding(example.path, "duplicate", text, "note"))
    return list(kept.values()), findings


def _near_duplicates(examples: Sequence[Example], readable: dict[Path, PictureInfo]) -> list[Finding]:
    if not examples:
        return []
    findings = []
    for i, j in find_near_duplicates(np.stack([readable[example.path].thumb for example in examples])):
        if examples[i].digest != examples[j].digest:
            text = f"looks the same as {examples[j].path}: both are trained on"
            findings.append(Finding(examples[i].path, "near duplicate", text, "note"))
    return findings


def _picture_findings(example: Example, info: PictureInfo, resolution: int) -> list[Finding]:
    """What is odd about one picture that is trained on."""
    found = [Finding(example.path, kind, text, "fixed") for kind, text in info.oddities]
    (height, width), short = info.size, min(info.size)
    if 2 * short < resolution:
        enlarged = f"{resolution / short:.1f} times for {resolution} pixels"
        text = f"{width} x {height}: its shorter side is enlarged {enlarged}"
        found.append(Finding(example.path, "tiny", text, "note"))
    if max(info.size) > MAX_ASPECT * short:
        text = f"{width} x {height} is {max(info.size) / short:.1f} : 1: most of it is cut off"
        found.append(Finding(example.path, "extreme aspect", text, "note"))
    return found


def _long_captions(
    captions: Sequence[tuple[Path | None, str | None]], count: Callable[[str], int], room: int
) -> list[Finding]:
    findings = []
    for path, caption in captions:
        # A token has at least one byte, so most captions need no counting.
        if caption and len(caption.encode()) > room and (n := count(caption)) > room:
            text = f"{n} tokens; the text encoder reads {room} at once: it is read in {-(-n // room)} parts"
            findings.append(Finding(path, "long caption", text, "note"))
    return findings
