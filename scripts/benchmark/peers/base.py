"""What every peer is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmark.case import NEGATIVE, Case

Run = Callable[[int], Any]  # the number of a round -> what was computed: arrays, a tensor or several, or None

COLOURS = ("red", "blue", "white", "yellow", "green", "black", "orange", "grey")
THINGS = ("boat", "house", "balloon", "lighthouse", "tree", "windmill", "cloud", "sailboat")


def prompt_of(k: int) -> str:
    """Another one each round, as who has seen a text before need not encode it again."""
    return f"a {COLOURS[k % 8]} {THINGS[k // 8 % 8]}"


class Opened:
    """A library that has been imported, in a process of its own.

    A subclass has a method for each row that it knows, by its name, which makes all ready and gives a `Run`;
    what is asked for once is kept.
    """

    def __init__(self, case: Case, peer: Peer) -> None:
        self.case, self.peer = case, peer

    def load(self) -> float | None:
        """Load all that a picture needs; MiB of the weights in memory where they are told."""
        raise NotImplementedError

    def ready(self, row: str) -> Run:
        """A row's `Run`."""
        run: Run = getattr(self, row)()
        return run


class OpenedPipeline(Opened):
    """One whose `pipe` takes the names of diffusers' call, and whose `inputs` are tensors on the device."""

    arguments: ClassVar[dict[str, Any]] = {}  # that its call needs beside
    pipe: Any
    inputs: Any

    def picture(self, pictures: int = 1) -> Run:
        pipe, case, noise = self.pipe, self.case, self.inputs["noise"][:pictures]

        def run(k: int) -> Any:
            return pipe(
                prompt_of(k),
                negative_prompt=NEGATIVE,
                height=case.height,
                width=case.width,
                num_inference_steps=case.steps,
                guidance_scale=case.guidance,
                num_images_per_prompt=pictures,
                latents=noise.clone(),
                output_type="np",
                **self.arguments,
            ).images

        return run

    def batch(self) -> Run:
        return self.picture(self.case.batch)

    def lora(self) -> Run:
        return self._step(lora=True)

    def full(self) -> Run:
        return self._step(lora=False)

    def _step(self, lora: bool) -> Run:
        raise NotImplementedError


@dataclass(frozen=True)
class Peer:
    """A library in a precision. What it says of itself needs no imports; `start` imports."""

    dtype: str
    compiled: bool = False

    library: ClassVar[str]
    modules: ClassVar[dict[str, str]] = {}  # that it needs: what to install for each
    rows: ClassVar[tuple[str, ...]]

    @property
    def name(self) -> str:
        return "-".join([self.library, *(["compiled"] if self.compiled else []), self.dtype])

    def lacks(self, case: Case) -> str:
        """Why it cannot run, "" if it can."""
        lacking = [how for module, how in self.modules.items() if importlib.util.find_spec(module) is None]
        return f"not installed: pip install {lacking[0]}" if lacking else ""

    def unmade(self, case: Case) -> list[Path]:
        """The files that `make` will write."""
        return []

    def make(self, case: Case) -> None:
        """Convert the model, once; what is made is kept in `case.made`."""

    def cold_command(self, case: Case, png: Path) -> list[str]:
        """A command line that draws one picture from nothing, if there is one but the benchmark's own."""
        return []

    def start(self, case: Case) -> Opened:
        raise NotImplementedError


def without_gradients(call: Run) -> Run:
    """`call` as drawing has it."""
    import torch

    def run(k: int) -> Any:
        with torch.no_grad():
            return call(k)

    return run
