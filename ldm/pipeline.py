"""The pipeline: a Request becomes Conditioning, sigmas, Step after Step, and an image.

    request -> resolve (the model's defaults) -> encode (text) -> denoise (U-Net, solver) -> decode (VAE)

The state of a picture lives in sigma space, x = x0 + sigma * noise, in fp32; it is scaled and
cast where the U-Net is called. Nothing here changes after construction, so threads may share a pipeline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.arguments import (
    NOTHING,
    OUTPUT_TYPES,
    Beside,
    Result,
    as_output,
    count_steps,
    one_each,
    own_generators,
    own_seeds,
)
from ldm.checkpoint import Parts, embedded, load_folder, save_folder
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.guidance import CFG, Guidance, Predict
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet
from ldm.pictures import Picture, batches, list_pictures
from ldm.prediction import c_in
from ldm.request import Request
from ldm.runtime import Runtime, choose, finite
from ldm.schedule import Grid, Schedule
from ldm.solvers import Sampler, Solver, Step, resolve_sampler
from ldm.text import TextEncoder

OnStep = Callable[[Step], None]
# (pipeline, step, timestep, {"latents": ...}) -> None or {"latents": ...}
Callback = Callable[["Pipeline", int, float, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class Plan:
    """How to draw: what all pictures of a call share."""

    shape: tuple[int, int, int]  # of one picture's latents [C, h, w]
    at_once: int  # pictures in a batch
    grid: Grid
    sampler: Sampler
    options: Mapping[str, float]  # of the solver
    guidance: Guidance


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Pipeline:
    """The pipeline in a diffusers folder, or the embedded model if no path is given.

    Args:
        path: a folder with model_index.json, unet/, vae/, text_encoder/, tokenizer/ and scheduler/.
        device: "cuda", "cuda:1", "mps" or "cpu"; by default the best there is.
        dtype: "bf16", "fp16" or "fp32"; by default what the device is fast in.

    Raises:
        UserError: naming the file that is missing or damaged, and what to do.
    """
    runtime = choose(device, dtype)
    folder = embedded() if path is None else Path(path)
    return Pipeline.from_parts(load_folder(folder, runtime), runtime, folder.resolve().name)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A model that draws. Made by `ldm.load`."""

    parts: Parts
    schedule: Schedule
    runtime: Runtime
    name: str

    @classmethod
    def from_parts(cls, parts: Parts, runtime: Runtime | None = None, name: str = "model") -> Pipeline:
        """A pipeline of modules that are already where `runtime` says (by default: where the U-Net is)."""
        if runtime is None:
            weight = next(parts.unet.parameters())
            runtime = Runtime(weight.device, weight.dtype)
        return cls(parts, Schedule.from_config(dict(parts.scheduler)), runtime, name)

    @property
    def unet(self) -> UNet:
        return self.parts.unet

    @property
    def vae(self) -> AutoencoderKL | AutoencoderTiny:
        return self.parts.vae

    @cached_property
    def model_hash(self) -> str | None:
        """The first 10 hex digits of the SHA-256 of the U-Net's file; None for parts made in memory."""
        if self.parts.weights is None:
            return None
        with self.parts.weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:10]

    @property
    def text(self) -> TextEncoder:
        return TextEncoder(self.parts.tokenizer, self.parts.text_encoder)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `ldm.load` and diffusers open, all of it or nothing."""
        save_folder(Path(folder), self.parts, dtype)

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words that the model has never seen; none where the model does not list its words."""
        return self.parts.unknown_words(prompt)

    # --- drawing -----------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        sampler: str | Solver | None = None,
        spacing: str | None = None,
        guidance: Guidance | None = None,
    ) -> Result:
        """Draw. Names and meanings are those of diffusers; None is the model's default.

        Args:
            prompt: one text or several; "" draws without one.
            seed: picture k is drawn with seed + k; a list gives each its own; None starts at a random one.
            latents: [images, C, h, w] unit noise, instead of what the seeds give.
            sampler: a name in any spelling, or a function like those in `ldm.solvers`.
            spacing: where the sampler's steps lie ("karras", "trailing", ...).
            guidance: a function like `ldm.guidance.CFG`, instead of guidance_scale and guidance_rescale.
            output_type: "pil" (list), "np" [B, H, W, 3] in 0..1, "pt" [B, 3, H, W] in 0..1, or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) with the latents at
                the network's scale, x / sqrt(sigma^2 + 1); what it returns under "latents" replaces them.

        Raises:
            UserError: naming the argument that is not allowed, its value and what is.
        """
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt {num_images_per_prompt} is not allowed: give at least 1")
        prompts = one_each(prompt, 1 if prompt_embeds is None else len(prompt_embeds), "prompt")
        negatives = one_each(negative_prompt, len(prompts), "negative_prompt")
        count = len(prompts) * num_images_per_prompt
        generators = own_generators(generator, count)
        seeds = own_seeds(seed, generators, count)
        common = Request(
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=None if timesteps is None else tuple(timesteps),
            sigmas=None if sigmas is None else tuple(sigmas),
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            clip_skip=clip_skip,
            sampler=None if callable(sampler) else sampler,
            spacing=spacing,
        )
        requests = [
            common.replace(
                prompt=prompts[p], negative_prompt=negatives[p], seeds=seeds[k : k + num_images_per_prompt]
            )
            for p, k in enumerate(range(0, count, num_images_per_prompt))
        ]
        beside = Beside(
            generators=generators,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            solver=sampler if callable(sampler) else None,
            guidance=guidance,
        )
        on_step = None
        if callback_on_step_end is not None:
            on_step = self._on_step(callback_on_step_end, self.plan(common, beside).grid)
        return self.generate(requests, on_step, output_type, beside)

    def generate(
        self,
        request: Request | Sequence[Request],
        on_step: OnStep | None = None,
        output_type: str = "pil",
        beside: Beside = NOTHING,
    ) -> Result:
        """Draw the pictures of a request, or of several that differ only in prompts and seeds.

        In as many batches as memory suggests; `on_step` sees each step of each. Raises UserError.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type {output_type!r} is not allowed: give {', '.join(OUTPUT_TYPES)}")
        requests = [self.resolve(each) for each in ([request] if isinstance(request, Request) else request)]
        plan, drawn = self.plan(requests[0], beside), []
        for batch in batches(list_pictures(requests, beside, self.text, plan.shape), plan.at_once):
            for step in self._steps(plan, batch):
                if on_step is not None:
                    on_step(step)
            latents = step.x * plan.grid.final_scale
            drawn.append(latents if output_type == "latent" else self.decode(latents))
        return Result(as_output(torch.cat(drawn), output_type), tuple(requests))

    def denoise(self, request: Request, beside: Beside = NOTHING) -> Iterator[Step]:
        """Draw a request's pictures in one batch, step by step. `decode` makes images of `x0` of a Step."""
        request = self.resolve(request)
        plan = self.plan(request, beside)
        return self._steps(plan, list_pictures([request], beside, self.text, plan.shape))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w], as a VAE gives them -> images [B, 3, H, W] in 0..1, fp32."""
        images = finite(self.vae, lambda vae: _decode(vae, latents), "the VAE's decoder")
        return (images / 2 + 0.5).clamp(0, 1)

    def resolve(self, request: Request) -> Request:
        """The request with the model's defaults in place of None. Raises UserError if the model cannot."""
        defaults, factor = self.parts.defaults, self.vae.downscale
        height, width = self._default_size()
        name = request.sampler or defaults.sampler or self.schedule.default_sampler
        sampler, implied = resolve_sampler(name)
        scale, eta = request.guidance_scale, request.eta
        full = request.replace(
            height=request.height or height,
            width=request.width or width,
            guidance_scale=defaults.guidance_scale if scale is None else scale,
            sampler=sampler.name,
            spacing=self._spacing(request, sampler, implied),
            eta=sampler.options.get("eta") if eta is None else eta,
            num_inference_steps=count_steps(request) or defaults.num_inference_steps,
            model=request.model or self.name,
            model_hash=request.model_hash or self.model_hash,
        )
        for side, pixels in (("height", full.height), ("width", full.width)):
            if pixels is not None and pixels % factor:
                raise UserError(
                    f"{side} {pixels} is not allowed: this model draws multiples of {factor} pixels"
                )
        return full

    def plan(self, request: Request, beside: Beside = NOTHING) -> Plan:
        """How a request is drawn. Raises UserError for a grid that this model's schedule does not have."""
        height, width, scale = request.height, request.width, request.guidance_scale
        if height is None or width is None or scale is None or request.sampler is None:
            return self.plan(self.resolve(request), beside)
        sampler, _ = resolve_sampler(beside.solver or request.sampler)
        own = request.timesteps or request.sigmas
        grid = self.schedule.grid(
            None if own else request.num_inference_steps,
            None if own else request.spacing,
            sampler,
            timesteps=request.timesteps,
            sigmas=request.sigmas,
        )
        factor = self.vae.downscale
        return Plan(
            shape=(self.vae.latent_channels, height // factor, width // factor),
            at_once=self.runtime.images_at_once(height, width),
            grid=grid,
            sampler=sampler,
            options={"eta": request.eta} if sampler.takes_eta and request.eta is not None else {},
            # As in diffusers, a scale of at most 1 means no guidance.
            guidance=beside.guidance or CFG(max(scale, 1.0), request.guidance_rescale),
        )

    def _spacing(self, request: Request, sampler: Sampler, implied: str | None) -> str | None:
        """Named in full, so that the request draws the same picture when defaults change."""
        if request.timesteps or request.sigmas:
            return request.spacing
        return self.schedule.spacing_for(sampler, request.spacing or implied or self.parts.defaults.spacing)

    def _default_size(self) -> tuple[int, int]:
        """(height, width) in pixels: what the model was trained on."""
        defaults, side = self.parts.defaults, self.unet.config.sample_size or 64
        height, width = (side, side) if isinstance(side, int) else side
        return defaults.height or height * self.vae.downscale, defaults.width or width * self.vae.downscale

    def _steps(self, plan: Plan, batch: Sequence[Picture]) -> Iterator[Step]:
        """Draw one batch: unit noise, scaled to the first sigma, then whatever the solver does with it."""
        noise = plan.sampler.noise([picture.source for picture in batch])
        given = [picture.latents for picture in batch if picture.latents is not None]
        unit = torch.stack(given) if given else noise.initial(plan.shape)
        x = unit.to(self.runtime.device, torch.float32) * plan.grid.initial_scale
        branches = {
            "cond": Conditioning.cat([picture.cond for picture in batch]),
            "uncond": Conditioning.cat([picture.uncond for picture in batch]),
        }
        denoise = plan.guidance(self._predict(plan.grid, branches), self.schedule.prediction.x0)
        return plan.sampler.solver(denoise, x, plan.grid.sigmas, noise, **plan.options)

    def _predict(self, grid: Grid, branches: Mapping[str, Conditioning]) -> Predict:
        """The U-Net's raw output, fp32, for the branches that a guidance asks for, in one call."""

        def predict(x: Tensor, sigma: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
            tokens = Conditioning.cat([branches[name] for name in names]).tokens
            sample = (x * c_in(sigma)).repeat(len(names), 1, 1, 1)
            timestep = float(grid.t(sigma))
            out = finite(self.unet, lambda unet: _unet(unet, sample, timestep, tokens), "the U-Net")
            return dict(zip(names, out.chunk(len(names)), strict=True))

        return predict

    def _on_step(self, callback: Callback, grid: Grid) -> OnStep:
        def on_step(step: Step) -> None:
            scale = (step.sigma**2 + 1) ** 0.5
            latents = step.x / scale
            answer = callback(self, step.i, float(grid.timesteps[step.i]), {"latents": latents})
            if answer and answer.get("latents", latents) is not latents:
                step.x.copy_(answer["latents"] * scale)

        return on_step


# --- the networks' boundary: casts to their dtype and layout are here and nowhere else ----------------------


def _unet(unet: UNet, sample: Tensor, timestep: float, tokens: Tensor) -> Tensor:
    dtype = unet.conv_in.weight.dtype
    sample = sample.to(dtype, memory_format=torch.channels_last)
    out: Tensor = unet(sample, timestep, tokens.to(dtype))
    return out


def _decode(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
    weight = next(vae.parameters())
    return vae.decode(latents.to(weight.device, weight.dtype, memory_format=torch.channels_last))
