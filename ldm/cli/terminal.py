"""What commands say: lines on stdout, bars on stderr; and `--preview`, pictures in a terminal or a file."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.provenance import marks
from ldm.errors import UserError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.diffusion.solvers import Step
    from ldm.images.formats import Encoding
    from ldm.pipeline import Pipeline

TERMINAL = "terminal"
SIDE = 384  # pixels: the longest side of what a terminal shows
LINE = 16  # pixels: the lowest that a terminal's line may be, to find how many lines a picture takes


def echo(args: argparse.Namespace, line: str) -> None:
    """Print a line, unless --quiet was given."""
    if not args.quiet:
        print(line, flush=True)


@contextmanager
def bar(title: str, unit: str, quiet: bool, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar that is moved on by ``on_progress(done, total)``, with `unit` per second.

    Without `total` it shows when it is first moved: an error before that leaves no empty bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rate = TextColumn("{task.fields[rate]:.2f} " + unit)
    # stdout is left alone: it may be a pipe that waits for the paths.
    made = Progress(*columns, rate, console=Console(stderr=True), disable=quiet, redirect_stdout=False)
    task, start = made.add_task(title, total=total, rate=0.0), time.perf_counter()
    with ExitStack() as shown:
        if total is not None:
            shown.enter_context(made)

        def on_progress(done: int, total: int) -> None:
            if not made.live.is_started:
                shown.enter_context(made)
            made.update(task, completed=done, total=total, rate=done / (time.perf_counter() - start))

        yield on_progress


# --- previews ---------------------------------------------------------------------------------------------


class Preview:
    """What is called after each step: shows where the pictures of the batch are going.

    It never spoils a drawing: a file that cannot be written is told once.
    """

    def __init__(self, pipe: Pipeline, args: argparse.Namespace) -> None:
        from ldm.images.provenance import TRAINED
        from ldm.pipeline.preview import decoder

        self.file = None if args.preview == TERMINAL else Path(args.preview)
        self.encoding = check_preview(args)
        self.marks = replace(marks(args), source=TRAINED, signer=None)  # of pictures that are not finished
        self.way = None if self.file is not None or args.quiet else terminal()
        self.decode = decoder(pipe) if self.file is not None or self.way is not None else None
        if self.decode is None and not args.quiet:
            print(
                "this terminal shows no pictures: --preview FILE writes each step to a file", file=sys.stderr
            )
        self.lines = self.number = 0  # that the last picture took; and its number in the terminal
        self.told = False

    @property
    def in_terminal(self) -> bool:
        return self.way is not None

    def __call__(self, step: Step, title: str) -> None:
        if self.decode is None:
            return
        from ldm.images.formats import PNG
        from ldm.images.pixels import contact_sheet, to_pil
        from ldm.images.png import save_png

        try:
            images = to_pil(self.decode(step.x0))
        except (FloatingPointError, ValueError):  # of 16 bits, on the way
            return
        image = enlarged(contact_sheet(images, columns(len(images))) if len(images) > 1 else images[0])
        if self.file is None:
            self._show(image, title, step.i == 0)
            return
        try:
            save_png(image, self.file, encoding=self.encoding or PNG, marks=self.marks)
        except UserError as error:
            if not self.told:
                print(f"no preview: {printable(error)}", file=sys.stderr)
            self.told = True

    def _show(self, image: Image, title: str, first: bool) -> None:
        """Where the last step's was; the first of a batch comes below all that is there."""
        from ldm.images.inline import ESC, inline

        up = "" if first or not self.lines else f"\r{ESC}[{self.lines + 1}A{ESC}[J"
        self.lines = -(-image.height // LINE)
        self.number = secrets.randbelow(2**24) + 1 if first else self.number
        # Room below first, so that nothing scrolls while the picture is there; then back up, and down again.
        room = "\n" * self.lines
        picture = inline(image, str(self.way), self.number)
        sys.stderr.write(f"{up}{room}{ESC}[{self.lines}A{ESC}7{picture}{ESC}8{ESC}[{self.lines}B\r{title}\n")
        sys.stderr.flush()


def check_preview(args: argparse.Namespace) -> Encoding | None:
    """How --preview FILE is written. Raises UserError, before anything is loaded."""
    if args.preview is not None and args.safety_checker is not None:
        raise UserError("--preview shows what no --safety-checker has seen: leave one of them out")
    if args.preview in (None, TERMINAL):
        return None
    from ldm.files import check_writable
    from ldm.images.formats import encoding_of

    path = Path(args.preview)
    if path.is_dir():
        raise UserError(f"--preview {path} is a folder: name a picture, such as preview.png")
    check_writable(path.parent)
    return encoding_of(path)


def terminal() -> str | None:
    """How the terminal behind stderr shows pictures; None for one that does not, and for a pipe."""
    from ldm.images.inline import protocol

    return protocol(os.environ) if sys.stderr.isatty() else None


def columns(count: int) -> int:
    """Of a sheet about as wide as high."""
    return -(-count // max(1, int(count**0.5)))


def enlarged(image: Image) -> Image:
    """A small picture by a whole factor, pixel by pixel; one that is longer than SIDE made smaller."""
    from PIL.Image import Resampling

    longest = max(image.size)
    if longest <= SIDE:
        factor = SIDE // longest
        return image.resize((image.width * factor, image.height * factor), Resampling.NEAREST)
    small = (max(1, round(side * SIDE / longest)) for side in image.size)
    width, height = small
    return image.resize((width, height), Resampling.LANCZOS)
