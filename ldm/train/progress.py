"""How a run goes: metrics.jsonl always, a bar where stderr is a terminal, lines elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from ldm.files import whole_file
from ldm.train.state import Position

Track = Callable[[dict[str, float], int], None]


class Progress:
    """Means of what the steps report, as JSON lines in a file and for a person to see.

    After a run is resumed, the file reads as that of one that was never stopped: rows of steps that are made
    again are dropped, and the mean that was under way goes on (`window`, which is a part of the state).
    """

    def __init__(
        self,
        run_dir: Path,
        device: torch.device,
        logging_steps: int,
        active: bool,
        track: Track | None = None,
    ) -> None:
        self.path, self.device, self.every = run_dir / "metrics.jsonl", device, logging_steps
        self.active, self.track = active, track
        self.sums: dict[str, float] = {}
        self.count = 0
        self.first = self.last = Position()
        self.first_fraction = 0.0
        self.looks: list[dict[str, Any]] = []  # rows of held-out figures
        self.bar = _Bar() if active and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    @property
    def window(self) -> dict[str, Any]:
        """The mean that is under way, for the state."""
        return {"sums": self.sums, "count": self.count}

    def resume(self, position: Position, fraction: float, window: Mapping[str, Any] | None) -> None:
        """Go on at `position`, with the `window` of its state."""
        self.first = self.last = position
        self.first_fraction = fraction
        if window is not None:
            self.sums, self.count = dict(window["sums"]), window["count"]
        if self.active:
            self._cut(position.step)

    def _cut(self, step: int) -> None:
        """Drop rows after `step`, and one that a killed run has not finished."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = [row for line in lines if (row := _row(line)) is not None and row["step"] <= step]
        self.looks = [row for row in rows if "samples_per_s" not in row]
        if len(rows) < len(lines):
            with whole_file(self.path) as aside:
                aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def step(self, position: Position, fraction: float, values: Mapping[str, float]) -> None:
        """Note a step that was made; `values` is empty for one that was skipped."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += bool(values)
        left = self._time_left(position, fraction)
        if self.bar:
            speed = _speed(self.first, position)
            self.bar.show(fraction, _line(position, values, speed, left, self._memory()))
        if position.step % self.every == 0 and self.count:
            means = {name: total / self.count for name, total in self.sums.items()}
            means |= {"samples_per_s": _speed(self.last, position), "memory_gb": self._memory()}
            if position.skipped:
                means["skipped"] = position.skipped
            self._write(position, means, f"  {left} left")
            self.sums, self.count, self.last = {}, 0, position

    def evaluation(self, position: Position, values: Mapping[str, float]) -> None:
        """Write a row of held-out figures."""
        self._write(position, values)
        self.looks.append(_place(position) | dict(values))

    @property
    def evaluated(self) -> int | None:
        """The step of the last look."""
        return max((look["step"] for look in self.looks), default=None)

    def best(self, figure: str) -> tuple[dict[str, Any] | None, int]:
        """The look of the lowest `figure`, the first of equals, and how many came after it."""
        known = [look for look in self.looks if figure in look]
        best = min(known, key=lambda look: float(look[figure]), default=None)
        return best, 0 if best is None else len(known) - 1 - known.index(best)

    def _write(self, position: Position, values: Mapping[str, float], more: str = "") -> None:
        if not self.active:
            return
        row = _place(position) | dict(values)
        _append(self.path, json.dumps(row))
        if self.track:
            self.track(dict(values), position.step)
        if values:  # of no held-out pictures there is nothing to tell
            print("  ".join(f"{name} {value:.5g}" for name, value in row.items()) + more, flush=True)

    def _time_left(self, position: Position, fraction: float) -> timedelta:
        """At the speed of this part of the run."""
        made = max(fraction - self.first_fraction, 1e-9)
        return timedelta(seconds=round((position.seconds - self.first.seconds) / made * (1 - fraction)))

    def _memory(self) -> float:
        """GiB: the most that the GPU has held for this process, or what the process holds now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return float(psutil.Process().memory_info().rss) / 2**30


def _place(position: Position) -> dict[str, Any]:
    return {"step": position.step, "samples": position.samples, "minutes": position.seconds / 60}


def _append(path: Path, line: str) -> None:
    """Append a whole line or, where the disk is full, nothing. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, 2)
        try:
            rest = line.encode() + b"\n"
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(before)
            raise


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _speed(since: Position, now: Position) -> float:
    """Samples per second."""
    return (now.samples - since.samples) / max(now.seconds - since.seconds, 1e-9)


def _line(
    position: Position, values: Mapping[str, float], speed: float, left: timedelta, memory: float
) -> str:
    loss = f"loss {values['loss']:.4g}" if values else "skipped"
    return f"step {position.step}  {loss}  {speed:.3g} images/s  {left} left  {memory:.1f} GB"


class _Bar:
    """One line at the bottom of the terminal; what is printed appears above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self.rich = RichProgress(
            BarColumn(24),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self.task = self.rich.add_task("", total=1.0)
        self.start, self.stop = self.rich.start, self.rich.stop

    def show(self, fraction: float, line: str) -> None:
        self.rich.update(self.task, completed=min(fraction, 1.0), description=line)
