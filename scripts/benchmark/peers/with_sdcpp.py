"""stable-diffusion.cpp through the package cyllama: whole pictures only, from a single file.

Its noise is its own and so is its grid, so that its pictures are compared with nobody's.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from benchmark.case import NEGATIVE, Case
from benchmark.inputs import config_of
from benchmark.peers.base import Opened, Peer, Run, prompt_of


class StableDiffusionCpp(Peer):
    library: ClassVar[str] = "sdcpp"
    modules: ClassVar[dict[str, str]] = {"cyllama": "cyllama"}
    rows: ClassVar[tuple[str, ...]] = ("picture", "cold", "load")

    def lacks(self, case: Case) -> str:
        lacking = super().lacks(case)
        if not lacking and config_of(case, "vae")["_class_name"] != "AutoencoderKL":
            lacking = "reads published families only"
        return lacking

    def file(self, case: Case) -> Path:
        return case.made / "single.safetensors"

    def unmade(self, case: Case) -> list[Path]:
        return [file for file in [self.file(case)] if not file.exists()]

    def make(self, case: Case) -> None:
        """In the original layout."""
        import ldm

        self.file(case).parent.mkdir(parents=True, exist_ok=True)
        ldm.load(case.folder, device="cpu", dtype="fp16").save(self.file(case))

    def start(self, case: Case) -> Opened:
        return OpenedStableDiffusionCpp(case, self)


class OpenedStableDiffusionCpp(Opened):
    peer: StableDiffusionCpp

    def __init__(self, case: Case, peer: Peer) -> None:
        super().__init__(case, peer)
        import cyllama.sd

        self.sd = cyllama.sd

    @cached_property
    def context(self) -> Any:
        kinds = {"fp16": self.sd.SDType.F16, "int8": self.sd.SDType.Q8_0}
        params = self.sd.SDContextParams(
            model_path=str(self.peer.file(self.case)),
            n_threads=self.case.threads or os.cpu_count() or 1,
            wtype=kinds[self.peer.dtype],
        )
        params.free_params_immediately = False  # else the second picture finds no weights
        return self.sd.SDContext(params)

    def load(self) -> float | None:
        _ = self.context
        return None

    def picture(self) -> Run:
        case, context = self.case, self.context

        def run(k: int) -> Any:
            (image,) = context.generate(
                prompt_of(k),
                negative_prompt=NEGATIVE,
                width=case.width,
                height=case.height,
                seed=k,
                sample_steps=case.steps,
                cfg_scale=case.guidance,
                sample_method=self.sd.SampleMethod.DPMPP2M,
                scheduler=self.sd.Scheduler.DISCRETE,
            )
            return image.to_numpy()[None] / 255

        return run
