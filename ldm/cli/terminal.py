"""What commands say: lines on stdout, bars on stderr."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


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
