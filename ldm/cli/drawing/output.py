"""Where the pictures of a run go: files and their names, grids, plots; and what is there already."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.drawing.requests import Asked
from ldm.cli.provenance import marks
from ldm.cli.terminal import echo
from ldm.errors import UserError
from ldm.images.plot import Cell, Plot

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.pipeline import Job
    from ldm.pipeline.job import Batch
    from ldm.request import Request

GRID_LIMIT = 100  # pictures on one grid: a run may be endless, a sheet may not


class Output:
    """Takes pictures as they are drawn. Raises UserError, before drawing where it can be known then."""

    def __init__(self, args: argparse.Namespace, asked: Sequence[Asked], plot: Plot | None = None) -> None:
        from ldm.files import check_writable
        from ldm.images.formats import encoding_of
        from ldm.images.names import Pattern
        from ldm.images.provenance import COMPOSITE, TRAINED

        self.args, self.kept = args, 0  # pictures
        self.marks = marks(args)
        edited = any(each.request.has_images for each in asked)
        self.sheet_marks = replace(self.marks, source=COMPOSITE if edited else TRAINED)
        self.encoding = encoding_of(args.output, args.format, args.quality, args.lossless)
        if self.encoding.format == "jpeg" and any(each.request.transparent for each in asked):
            raise UserError("--transparent: a JPEG cannot be transparent: give --format png or webp")
        self.pattern = None if args.name is None else Pattern(args.name)
        self.plot = plot
        self.several = len({each.request.shown for each in asked}) > 1
        self.sheet: list[Image] = []
        self.plotted: dict[Cell, tuple[Image, Request, Path | None]] = {}
        self.current_plot, self.scale = 0, 1.0
        count = sum(each.request.num_images for each in asked)
        if args.resume and args.seed is not None and args.seed < 0:
            raise UserError("--resume looks for the same seeds again: give --seed, from 0 up")
        if args.output is None:
            check_writable(args.outdir)
        elif count > 1:
            raise UserError(f"--output names one file, but {count} pictures were asked for: use --outdir")
        else:
            check_file(args.output)

    @property
    def folder(self) -> Path:
        """Of the single pictures."""
        return Path(self.args.outdir) / "samples"

    @property
    def where(self) -> str:
        """Of the finished pictures, for whoever stopped."""
        if self.kept == 0 or self.args.skip_save:
            return "none of this run" if self.kept == 0 else f"sheets in {self.args.outdir}"
        return f"{self.kept} in {self.folder if self.args.output is None else self.args.output}"

    def take(self, images: Sequence[Image], batch: Batch, asked: Sequence[Asked], seconds: float) -> None:
        """Write the pictures of a batch, and the sheets that are complete with them."""
        for image, picture in zip(images, batch, strict=True):
            request, path = picture.request, None
            if not self.args.skip_save:
                path = self._save(image, request)
                echo(self.args, f"{path}  seed {picture.seed}  {seconds:.2f} s")
            if picture.flagged:  # said even with --quiet
                print(f"the safety checker flags seed {picture.seed}: its picture is black", file=sys.stderr)
            self.kept += 1
            self._lay(image, request, asked[picture.prompt], path)
        if len(self.sheet) + self.args.n_samples > GRID_LIMIT:
            self._save_grid()

    def close(self, stopped: bool = False) -> None:
        """Write the sheets of what is there; of a run that was stopped, if they hold what no file does."""
        if not stopped or self.args.skip_save:
            self._save_grid()
        self._save_plot()

    def _save(self, image: Image, request: Request) -> Path:
        from ldm.images.png import save_new, save_numbered, save_png

        suffix, marks = self.encoding.suffix, self.marks
        if self.args.output is not None:
            return save_png(image, self.args.output, request, self.encoding, marks)
        if self.pattern is None:
            return save_numbered(image, self.folder, f"%05d{suffix}", request, self.encoding, marks=marks)
        name, like = self.pattern.fill(request, datetime.now())
        path = self.folder / f"{name}{suffix}"
        if "%" not in name:
            return save_new(image, path, request, self.encoding, marks)
        return save_numbered(image, path.parent, path.name, request, self.encoding, f"{like}.*", marks)

    # --- sheets ---

    def _lay(self, image: Image, request: Request, asked: Asked, path: Path | None) -> None:
        """Put a picture on its sheet."""
        if self.args.skip_grid:
            return
        from ldm.images.opening import to_rgb
        from ldm.images.sheet import captioned, shrinking, shrunk

        image = to_rgb(image)
        if self.plot is not None and asked.cell is not None:
            if asked.plot != self.current_plot:
                self._save_plot()
            if not self.plotted:
                across, down, tables = self.plot.shape
                self.scale = shrinking(image.size, across, (down + 1) * tables)
            self.current_plot = asked.plot
            self.plotted[asked.cell] = (shrunk(image, self.scale), request, path)
        elif self.args.grid_labels:
            words = f"{request.shown}  " if self.several else ""
            self.sheet.append(captioned(image, f"{words}seed {request.seeds[0]}"))
        else:
            self.sheet.append(image)

    def _save_grid(self) -> None:
        from ldm.images.pixels import contact_sheet
        from ldm.images.sheet import shrinking, shrunk

        if len(self.sheet) > 1:
            columns = self.args.n_rows or self.args.n_samples
            largest = max(image.width for image in self.sheet), max(image.height for image in self.sheet)
            scale = shrinking(largest, min(columns, len(self.sheet)), -(-len(self.sheet) // columns))
            path = self._numbered(
                contact_sheet([shrunk(image, scale) for image in self.sheet], columns), "grid"
            )
            echo(self.args, f"{path}  grid of {len(self.sheet)}")
        self.sheet.clear()

    def _save_plot(self) -> None:
        if self.plot is not None and self.plotted:
            sheet = self.plot.sheet({cell: image for cell, (image, _, _) in self.plotted.items()})
            path = self._numbered(sheet, "plot")
            self.plot.write(
                path, {cell: (request, file) for cell, (_, request, file) in self.plotted.items()}
            )
            echo(self.args, f"{path}  plot of {len(self.plotted)}")
        self.plotted.clear()

    def _numbered(self, sheet: Image, name: str) -> Path:
        from ldm.images.png import save_numbered

        like, name = f"{name}-%04d.*", f"{name}-%04d{self.encoding.suffix}"
        return save_numbered(sheet, self.args.outdir, name, None, self.encoding, like, self.sheet_marks)

    # --- what is there already ---

    def left(self, drawings: Sequence[tuple[Job, list[Asked]]]) -> list[tuple[Job, list[Asked]]]:
        """Without the pictures that --resume finds: those whose files hold the same request."""
        from ldm.images.opening import open_picture

        there, found = self._there(), 0
        left: list[tuple[Job, list[Asked]]] = []
        for job, asked in drawings:
            batches: list[Batch] = []
            for batch in job.batches:
                missing = []
                for picture in batch:
                    paths = there.get(_key(picture.request.to_json()))
                    if not paths:
                        missing.append(picture)
                        continue
                    found, path = found + 1, paths.pop()
                    if self.plot is not None:
                        self._lay(open_picture(path), picture.request, asked[picture.prompt], path)
                batches += [tuple(missing)] if missing else []
            left.append((replace(job, batches=tuple(batches)), asked))
        total = found + sum(len(job.pictures) for job, _ in left)
        echo(self.args, f"resume: {found} of {total} pictures are there already")
        return left

    def _there(self) -> dict[str, list[Path]]:
        """The files of earlier runs by the requests in them. Heads of files are read, no pixels."""
        from ldm.images.formats import SUFFIXES
        from ldm.images.texts import read_own

        there = defaultdict[str, list[Path]](list)
        one = self.args.output
        for path in sorted(self.folder.rglob("*"), reverse=True) if one is None else [one]:
            if path.suffix.lower() in SUFFIXES and (own := read_own(path)) is not None:
                there[_key(own)].append(path)
        return there


def check_file(path: Path) -> None:
    """Raise UserError if a picture cannot be written there."""
    from ldm.files import check_writable

    if path.is_dir():
        raise UserError(f"--output {path} must name a file, and is a folder: write such as boat.png")
    check_writable(path.parent)


def _key(text: str) -> str:
    """A request's JSON, whatever the order and the escapes in which it is written, without what was found."""
    try:
        fields = json.loads(text)
        return json.dumps({k: v for k, v in fields.items() if k != "nsfw_content_detected"}, sort_keys=True)
    except (ValueError, RecursionError, AttributeError):
        return ""
