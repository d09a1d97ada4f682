"""`ldm folder DIR`: the report on a folder of pictures, as text or JSON, and its contact sheet."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

from ldm.errors import UserError
from ldm.train.findings import EFFECTS, Effect, Examined, Finding
from ldm.train.folder import examine

SHOWN = 20  # lines of each kind, without --all
TITLES: dict[Effect, str] = {
    "stops": "stops training",
    "skipped": "skipped",
    "fixed": "fixed when loaded",
    "note": "worth knowing",
}


def folder(args: argparse.Namespace) -> int:
    """Examine, report, draw the sheet. 0 where training could start, 2 where something stops it."""
    if args.sheet is not None:
        _check_sheet(args)
    with _bar(args.quiet) as on_progress:
        examined = examine(
            args.folder,
            instance_prompt=args.instance_prompt,
            missing_caption=args.missing_caption,
            count_tokens=clip_counter(),
            resolution=args.resolution,
            on_progress=on_progress,
        )
    if args.json:
        print(json.dumps(as_json(examined), indent=2))
    elif not args.quiet or not examined.can_train:
        print("\n".join(report(examined, None if args.all else SHOWN)))
    if args.sheet is not None and examined.examples:
        from ldm.images import save_png
        from ldm.train.sheet import make_sheet

        save_png(make_sheet(examined.examples, args.resolution), args.sheet)
        if not (args.json or args.quiet):
            print(args.sheet)
    return 0 if examined.can_train else 2


def clip_counter() -> Callable[[str], int]:
    """Tokens of a caption by CLIP's own vocabulary, start and end not counted. Loaded at the first call."""
    made: list[Any] = []

    def count(caption: str) -> int:
        if not made:
            from ldm.checkpoint.tokenizer import END, make_tokenizer

            made.append(make_tokenizer({"pad_token": END}).backend_tokenizer)
        return len(made[0].encode(caption, add_special_tokens=False).ids)

    return count


def report(examined: Examined, shown: int | None = None) -> Iterator[str]:
    """Lines, grouped by effect and kind; at most `shown` of each kind."""
    examples, found = examined.examples, examined.findings
    yield f"{examined.folder}: {_count(len(examples), 'picture')} to train on"
    yield f"captions: {examined.layout}"
    for effect, of_effect in groupby(found, lambda finding: finding.effect):
        yield f"\n{TITLES[effect]}"
        for kind, group in groupby(of_effect, lambda finding: finding.kind):
            lines = list(group)
            yield f"  {kind} ({len(lines)})"
            for finding in lines[:shown]:
                yield f"    {_line(finding, examined)}"
            if shown is not None and len(lines) > shown:
                yield f"    and {len(lines) - shown} more (--all shows them)"
    counts = Counter(finding.effect for finding in found)
    yield ""
    yield (
        ", ".join(f"{counts[effect]} {TITLES[effect]}" for effect in EFFECTS if counts[effect]) or "no faults"
    )
    if examined.can_train:
        shows = sum(example.repeats for example in examples)
        yield f"training could start: {_count(shows, 'picture')} in each epoch"
    else:
        yield "training could not start: mend what stops it"


def as_json(examined: Examined) -> dict[str, Any]:
    """Everything, in what JSON can hold; paths as they were given."""
    return {
        "folder": str(examined.folder),
        "layout": examined.layout,
        "can_train": examined.can_train,
        "examples": [{**vars(example), "path": str(example.path)} for example in examined.examples],
        "findings": [
            {**vars(finding), "path": finding.path and str(finding.path)} for finding in examined.findings
        ],
    }


def _line(finding: Finding, examined: Examined) -> str:
    """`name: text` in one line, whatever characters a name holds: terminals obey some of them."""
    path, text = finding.path, finding.text
    if path is not None:
        path = path.relative_to(examined.folder) if path.is_relative_to(examined.folder) else path
        text = f"{path}: {text}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _check_sheet(args: argparse.Namespace) -> None:
    """Find out first that the sheet could not be written, or would change the folder that is examined."""
    from ldm.images import check_writable
    from ldm.train.buckets import make_buckets

    make_buckets(args.resolution)
    if args.sheet.suffix.lower() != ".png" or args.sheet.is_dir():
        raise UserError(f"--sheet {args.sheet} must name a .png file")
    if args.sheet.resolve().is_relative_to(args.folder.resolve()):
        raise UserError(
            f"--sheet {args.sheet} lies in the folder itself, and would be trained on: move it out"
        )
    check_writable(args.sheet.parent)


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, with pictures per second."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("examining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rate = TextColumn("{task.fields[rate]:.0f} images/s")
    bar = Progress(*columns, rate, console=Console(stderr=True), disable=quiet, redirect_stdout=False)
    task = bar.add_task("", rate=0.0)
    start = time.perf_counter()
    with ExitStack() as shown:

        def on_progress(done: int, total: int) -> None:
            if done == 1:
                shown.enter_context(bar)  # not before: an error would leave an empty bar
            bar.update(task, completed=done, total=total, rate=done / (time.perf_counter() - start))

        yield on_progress
