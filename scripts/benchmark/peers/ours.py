"""ldm."""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from benchmark.case import NEGATIVE, PROMPT, Case
from benchmark.inputs import TIMESTEP, make_inputs
from benchmark.peers.base import Opened, OpenedPipeline, Peer, Run, prompt_of, without_gradients

SAMPLER = "dpmpp_2m"


class Ours(Peer):
    library: ClassVar[str] = "ldm"
    rows: ClassVar[tuple[str, ...]] = (
        "unet", "decode", "encode", "text", "picture", "batch", "cold", "load", "lora", "full",
    )  # fmt: skip

    def lacks(self, case: Case) -> str:
        return ""

    def cold_command(self, case: Case, png: Path) -> list[str]:
        """The command that users type."""
        if self.compiled:
            return []
        command = [sys.executable, "-m", "ldm", "txt2img", "--quiet", "--model", case.folder, "-o", str(png)]
        flags = {
            "prompt": PROMPT,
            "negative-prompt": NEGATIVE,
            "sampler": SAMPLER,
            "steps": case.steps,
            "cfg-scale": case.guidance,
            "width": case.width,
            "height": case.height,
            "device": case.device,
            "dtype": self.dtype,
        }
        if case.threads is not None:
            flags["threads"] = case.threads
        return [*command, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]

    def start(self, case: Case) -> Opened:
        return OpenedOurs(case, self)


class OpenedOurs(OpenedPipeline):
    arguments: ClassVar[dict[str, Any]] = {"sampler": SAMPLER}

    def __init__(self, case: Case, peer: Peer) -> None:
        super().__init__(case, peer)
        import torch  # noqa: F401

        import ldm.pipeline  # noqa: F401

    @cached_property
    def pipe(self) -> Any:
        import ldm

        pipe = ldm.load(self.case.folder, device=self.case.device, dtype=self.peer.dtype)
        if self.peer.compiled:
            pipe = pipe.compiled(**({"mode": "max-autotune"} if self.case.device != "cpu" else {}))
        return pipe

    @cached_property
    def inputs(self) -> Any:
        """`Inputs` as tensors on the device."""
        import torch

        given = {name: value for name, value in vars(make_inputs(self.case)).items() if value is not None}
        return {name: torch.from_numpy(value).to(self.case.device) for name, value in given.items()}

    def load(self) -> float | None:
        pipe = self.pipe
        modules = [pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
        parameters = (p for module in modules if module is not None for p in module.parameters())
        return float(sum(p.numel() * p.element_size() for p in parameters)) / 2**20

    def unet(self) -> Run:
        """As drawing calls it, from a state in sigma space to the raw output of both branches."""
        from ldm.diffusion.prediction import c_in
        from ldm.models.conditioning import Conditioning
        from ldm.pipeline import networks

        given, grid = self.inputs, self.pipe.schedule.grid(self.case.steps, sampler=SAMPLER)
        conds = [
            Conditioning(
                given["tokens"][k : k + 1],
                **{name: given[name][k : k + 1] for name in ("pooled", "time_ids") if name in given},
            )
            for k in range(2)
        ]
        sigma = grid.sigma(TIMESTEP)
        x = given["sample"][:1] / c_in(sigma).float().to(self.case.device)
        unread: list[Any] | None = None if self.case.device == "cpu" else []  # cards are not waited for
        predict = networks.predict(
            self.pipe.unet, grid, {"uncond": conds[0], "cond": conds[1]}, unread=unread
        )

        def call(k: int) -> Any:
            return list(predict(x, sigma.float(), ("uncond", "cond")).values())

        return without_gradients(call)

    def decode(self) -> Run:
        from ldm.pipeline import networks

        vae, latents = self.pipe.vae, self.inputs["latents"]
        return without_gradients(lambda k: networks.decode(vae, latents))

    def encode(self) -> Run:
        from ldm.pipeline import networks

        vae, image = self.pipe.vae, self.inputs["image"]
        return without_gradients(lambda k: networks.encode(vae, image).mean)

    def text(self) -> Run:
        text = self.pipe.text
        return without_gradients(lambda k: text.encode([prompt_of(k), NEGATIVE]).tokens)

    def _step(self, lora: bool) -> Run:
        from benchmark import training
        from ldm.kernels.malloc import freed_memory_kept

        freed_memory_kept().__enter__()  # as the training loop does, here for as long as the process lives
        step = training.ours(lora, self.peer.dtype == "bf16", self.case.training)
        return lambda k: step()
