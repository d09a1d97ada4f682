"""From flags, and a file of prompts, to the requests of a run."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.drawing.beginnings import chosen, given_by, over_folders, varied
from ldm.errors import UserError, abbreviate, printable, reason

if TYPE_CHECKING:
    from ldm.images.plot import Cell, Plot
    from ldm.prompts.styles import Style
    from ldm.request import Request

MAX_PICTURES = 100_000  # of one run
SEED = 42  # of the first picture, if nothing gives another


@dataclass(frozen=True)
class Asked:
    """A request, and where it comes from: a line that fails alone, a cell of the n-th plot."""

    request: Request
    line: str = ""
    plot: int = 0
    cell: Cell | None = None


class Faults:
    """Lines of a file that cannot be drawn: each is told when it is found, and the rest is drawn."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str, error: Exception) -> None:
        if line not in self.lines:
            self.lines.append(line)
            print(f"txt2img: {printable(line)}: {printable(error)}", file=sys.stderr)

    @property
    def exit_code(self) -> int:
        """2 if there are any, which is told once more."""
        if not self.lines:
            return 0
        numbers = [line.rpartition(" ")[2] for line in self.lines]
        print(f"txt2img: not drawn: line {printable(abbreviate(numbers, 8))}", file=sys.stderr)
        return 2


def make_requests(args: argparse.Namespace, plot: Plot | None, faults: Faults) -> list[Asked]:
    """A request for each prompt, or each cell of its plot, with consecutive seeds.

    --fixed_code gives every batch the same. Raises UserError for what is wrong with the flags.
    """
    from ldm.prompts import styles as sheets
    from ldm.request.fields import consecutive_seeds

    check_edit(args)
    if args.prompt is None and args.from_file is None and args.from_png is None:
        raise UserError("one of the arguments -p/--prompt --from-file is required, or --from-png")
    lines = [(0, "")] if args.from_file is None else read_lines(args.from_file)
    known = sheets.read_styles(args.styles_file) if args.styles else {}
    styles = sheets.chosen(known, args.styles, args.styles_file) if args.styles else []
    each = args.n_iter * (args.n_samples if plot is None else 1)
    if plot is not None and args.n_iter > 1:
        raise UserError("--plot draws one picture for each cell: leave --n_iter out, or plot seed=1,2,3")
    check_count(len(lines) * each)
    base = given_by(args)
    own_seed = SEED if args.from_png is None else base.seeds[0]
    (seed,) = consecutive_seeds(own_seed if args.seed is None else args.seed)
    asked = list[Asked]()
    for p, (number, text) in enumerate(lines):
        line = "" if args.from_file is None else f"{args.from_file}, line {number}"
        fixed = args.fixed_code and plot is None
        seeds = consecutive_seeds(seed + (0 if fixed else p * each), args.n_samples if fixed else each)
        fields = {**dict(base), "seeds": seeds * args.n_iter if fixed else seeds}
        try:
            own = read_line(text, each) if line else {}
            asked += in_cells(dressed({**fields, **own}, styles), plot, line, p, args.wildcards)
        except UserError as error:
            if not line:
                raise
            faults.add(line, error)
    check_count(sum(each.request.num_images for each in asked))
    return asked


def in_cells(
    fields: Mapping[str, Any], plot: Plot | None, line: str, number: int, wildcards: str | None = None
) -> list[Asked]:
    """The request of these fields, or that of each cell of its plot. Raises UserError."""
    from ldm.request import Request

    if plot is None:
        every = chosen(varied(Request(**fields)), wildcards)
        return [Asked(request, line) for request in over_folders(every)]
    if fields["image"] is not None and Path(fields["image"]).is_dir():
        raise UserError(f"--plot draws from one picture, and {fields['image']} is a folder: give a file")
    if len(fields["seeds"]) > 1:
        raise UserError("--plot draws one picture for each cell: give one seed, or plot seed=1,2,3")
    return [
        Asked(request, line, number, cell)
        for cell, changed in plot.cells(fields)
        for request in chosen([Request(**changed)], wildcards)
    ]


def dressed(fields: Mapping[str, Any], styles: list[Style]) -> dict[str, Any]:
    """The fields with --styles around their prompts."""
    from ldm.prompts.styles import with_styles

    prompt, negative = with_styles(fields["prompt"], fields["negative_prompt"], styles)
    return {**fields, "prompt": prompt, "negative_prompt": negative}


def check_count(count: int) -> None:
    """Raise UserError for more pictures than one run may draw."""
    if count > MAX_PICTURES:
        raise UserError(f"{count} pictures are too many for one run: ask for at most {MAX_PICTURES}")


def check_edit(args: argparse.Namespace) -> None:
    """Raise UserError for one of --invert and --to without the other, and for two pictures."""
    if args.invert is None and args.target_prompt is not None and args.image is not None:
        raise UserError("--to TEXT with a picture needs --invert FILE: what becomes as the text says")
    if args.invert is not None and args.target_prompt is None:
        raise UserError("--invert FILE needs --to TEXT: what the picture becomes (-p says what it shows now)")
    if args.invert is not None and args.image is not None:
        raise UserError("--invert and --init-image both name a picture: give --invert alone to edit one")


# --- a file of prompts -----------------------------------------------------------------------------------


def read_lines(source: str) -> list[tuple[int, str]]:
    r"""The lines of a file, or of stdin for `-`, by their numbers from 1; blank ones are skipped.

    Lines end at \n and \r\n only: whatever else Unicode ends a line with is part of a prompt.
    """
    try:
        # Python's own reading of text would take a lone \r for the end of a line, too.
        stdin = getattr(sys.stdin, "buffer", sys.stdin)
        data = stdin.read() if source == "-" else Path(source).read_bytes()
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read prompts from {source}: {reason(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read prompts from {source}: it is not UTF-8 text") from None
    lines = [(number, line.strip(" \t\r")) for number, line in enumerate(text.split("\n"), start=1)]
    if not any(line for _, line in lines):
        raise UserError(f"no prompts in {source}: write one per line")
    return [(number, line) for number, line in lines if line]


def read_prompts(source: str) -> list[str]:
    """The prompts of a file with one per line."""
    return [line for _, line in read_lines(source)]


def read_line(text: str, count: int) -> dict[str, Any]:
    """The fields of a request that a line gives: its prompt, or those of a JSON object.

    `seed` gives `count` pictures consecutive ones, `seeds` are taken as they are. Raises UserError.
    """
    from ldm.request.as_json import fields_of

    if not re.match(r'\{\s*["}]', text):  # {a|b} is a prompt
        return {"prompt": text}
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"this is not valid JSON: {reason(error)}") from None
    return fields_of(given, count)
