"""diffusers: its own pipeline, as its documentation has it used."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from benchmark.case import NEGATIVE, Case
from benchmark.inputs import TIMESTEP, make_inputs
from benchmark.peers.base import Opened, OpenedPipeline, Peer, Run, prompt_of, without_gradients


class Diffusers(Peer):
    library: ClassVar[str] = "diffusers"
    modules: ClassVar[dict[str, str]] = {"diffusers": "diffusers"}
    rows: ClassVar[tuple[str, ...]] = (
        "unet", "decode", "encode", "text", "picture", "batch", "cold", "load", "lora", "full",
    )  # fmt: skip

    def start(self, case: Case) -> Opened:
        return OpenedDiffusers(case, self)


def with_sampler(pipe: Any) -> Any:
    """The pipeline with the sampler of all peers, DPM++ 2M, on the grid that the model's config asks for."""
    from diffusers import DPMSolverMultistepScheduler

    options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class OpenedDiffusers(OpenedPipeline):
    def __init__(self, case: Case, peer: Peer) -> None:
        super().__init__(case, peer)
        import torch
        from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

        _ = StableDiffusionPipeline, StableDiffusionXLPipeline  # imported, not first when they are loaded
        self.read: Any = DiffusionPipeline.from_pretrained
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.float32}
        self.dtype = kinds[peer.dtype]

    @cached_property
    def pipe(self) -> Any:
        import torch

        pipe = self.read(self.case.folder, torch_dtype=self.dtype).to(self.case.device)
        pipe = with_sampler(pipe)
        if self.peer.compiled:
            options: dict[str, Any] = {}
            if self.case.device != "cpu":  # as diffusers' documentation on speed has it
                options = {"mode": "max-autotune", "fullgraph": True}
            for part in (pipe.unet, pipe.vae):
                part.to(memory_format=torch.channels_last)
            pipe.unet = torch.compile(pipe.unet, **options)
            pipe.vae.decode = torch.compile(pipe.vae.decode, **options)
            pipe.vae.encode = torch.compile(pipe.vae.encode, **options)
        return pipe

    @cached_property
    def inputs(self) -> Any:
        """`Inputs` as tensors on the device, in the dtype of the networks."""
        import torch

        given = {name: value for name, value in vars(make_inputs(self.case)).items() if value is not None}
        return {
            name: torch.from_numpy(value).to(self.case.device, self.dtype) for name, value in given.items()
        }

    def load(self) -> float | None:
        modules = [part for part in self.pipe.components.values() if hasattr(part, "parameters")]
        parameters = (p for module in modules for p in module.parameters())
        return float(sum(p.numel() * p.element_size() for p in parameters)) / 2**20

    def unet(self) -> Run:
        import torch

        given, unet = self.inputs, self.pipe.unet
        added = None
        if "pooled" in given:
            added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
        timestep = torch.tensor(TIMESTEP, device=self.case.device)

        def call(k: int) -> Any:
            return unet(
                given["sample"],
                timestep,
                encoder_hidden_states=given["tokens"],
                added_cond_kwargs=added,
                return_dict=False,
            )[0]

        return without_gradients(call)

    def decode(self) -> Run:
        given, vae = self.inputs, self.pipe.vae
        scale = vae.config.scaling_factor

        def call(k: int) -> Any:
            image = vae.decode(given["latents"] / scale, return_dict=False)[0]
            return (image / 2 + 0.5).clamp(0, 1)

        return without_gradients(call)

    def encode(self) -> Run:
        given, vae = self.inputs, self.pipe.vae
        scale = vae.config.scaling_factor

        def call(k: int) -> Any:
            found = vae.encode(given["image"] * 2 - 1)
            return (found.latents if hasattr(found, "latents") else found.latent_dist.mode()) * scale

        return without_gradients(call)

    def text(self) -> Run:
        import torch

        pipe, device = self.pipe, self.case.device

        def call(k: int) -> Any:
            prompt, negative, *_ = pipe.encode_prompt(
                prompt_of(k),
                device=device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=NEGATIVE,
            )
            return torch.cat([prompt, negative])

        return without_gradients(call)

    def _step(self, lora: bool) -> Run:
        """In fp32 the scripts' own defaults, in bf16 all that makes them quicker (`benchmark.training`)."""
        from benchmark import training

        step = training.theirs(lora, self.peer.dtype == "fp32", self.case.training)
        return lambda k: step()
