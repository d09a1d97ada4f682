"""The pipeline: a Request becomes Conditioning, sigmas, Step after Step, and an image.

    request -> resolve (the model's defaults) -> encode (text, image) -> denoise (U-Net) -> decode (VAE)

The state of a picture lives in sigma space, x = x0 + sigma * noise, in fp32; it is scaled and
cast where the U-Net is called. Nothing here changes after construction, so threads may share a pipeline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import networks, tasks
from ldm.adapters import (
    Adapted,
    Lora,
    LoraFile,
    adapt,
    read_embedding,
    read_lora,
    wanted_loras,
)
from ldm.arguments import NOTHING, OUTPUT_TYPES, Beside, Result, as_output, split_call
from ldm.checkpoint import Parts, embedded, load_parts, save_model
from ldm.checkpoint.digest import sha256
from ldm.checkpoint.io import weight_files
from ldm.conditioning import Conditioning
from ldm.errors import UserError
from ldm.guidance import Guidance
from ldm.inputs import InMemory
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet
from ldm.pictures import Picture, batches, list_pictures
from ldm.plan import Plan, make_plan, resolve
from ldm.request import LoraUse, Request
from ldm.runtime import Runtime, choose
from ldm.schedule import Grid, Schedule
from ldm.solvers import Solver, Step
from ldm.tasks import Encoded
from ldm.text import Clip, TextEncoder

OnStep = Callable[[Step], None]
# (pipeline, step, timestep, {"latents": ...}) -> None or {"latents": ...}
Callback = Callable[["Pipeline", int, float, dict[str, Any]], dict[str, Any] | None]


def load(
    path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    text_encoder_2: str | Path | None = None,
    prediction_type: str | None = None,
    ema: bool | None = None,
) -> Pipeline:
    """The pipeline in a diffusers folder, a single file or on the hub; without a path the embedded model.

    Args:
        path: a folder with model_index.json, a .safetensors or .ckpt file, a hub name ("owner/model"), or
            one of those that come with the package: "postcard", "postcard-upscaler".
        device: "cuda", "cuda:1", "mps" or "cpu"; by default the best there is.
        dtype: "bf16", "fp16" or "fp32"; by default what the device is fast in.
        revision: of a model on the hub: a branch, tag or commit.
        variant: of the weights in a folder or on the hub, such as "fp16".
        unet, vae, text_encoder, text_encoder_2: taken from another folder, file or hub name.
        prediction_type: "epsilon" or "v_prediction", where the model does not say it or is wrong.
        ema: of a single file that holds both, the averaged weights (True) or the plain ones (False).

    Raises:
        UserError: naming the file that is missing or damaged, and what to do.
    """
    runtime, model = choose(device, dtype), embedded() if path is None else path
    parts = load_parts(
        model,
        runtime,
        revision=revision,
        variant=variant,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        prediction_type=prediction_type,
        ema=ema,
    )
    place = Path(model).resolve()
    return Pipeline.from_parts(parts, runtime, place.stem if place.is_file() else place.name)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A model that draws. Made by `ldm.load`."""

    parts: Parts
    schedule: Schedule
    runtime: Runtime
    name: str
    adapted: Adapted = field(default_factory=Adapted)  # LoRAs and textual inversions in `parts`
    lora_dir: Path = Path("loras")  # where prompts' <lora:name:weight> are found
    upscaler: Pipeline | None = None  # what enlarges each finished picture
    # The last pipeline that a request's LoRAs asked for, so that its next batch need not build it again.
    _recent: dict[tuple[LoraUse, ...], Pipeline] = field(default_factory=dict, init=False, repr=False)

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
        """The first 10 hex digits of the SHA-256 of the U-Net's file; None for parts made in memory.

        Of that and of what was asked to be other than in the model, where something was: `Parts.changes`.
        """
        if self.parts.weights is None:
            return None
        digest, changes = sha256(*weight_files(self.parts.weights)), self.parts.changes
        if changes:
            told = [f"{what} {sha256(*weight_files(file))}" if file else what for what, file in changes]
            digest = hashlib.sha256("\n".join([digest, *told]).encode()).hexdigest()
        return digest[:10]

    @property
    def text(self) -> TextEncoder:
        parts = self.parts
        pairs = ((parts.tokenizer, parts.text_encoder), (parts.tokenizer_2, parts.text_encoder_2))
        return TextEncoder(tuple(Clip(*pair) for pair in pairs if pair[1] is not None))

    def save(
        self, path: str | Path, dtype: torch.dtype | None = None, max_shard_size: str | None = None
    ) -> None:
        """Write a folder that `ldm.load` and diffusers open, or a `.safetensors` file; all of it or nothing.

        Args:
            dtype: of the weights, by default as they are.
            max_shard_size: "5GB", "500MB": cut larger files of a folder.

        Raises:
            UserError: if `path` cannot be written to, or a single file cannot hold this model.
        """
        save_model(Path(path), self.fuse().parts, dtype, max_shard_size)

    def to_diffusers(self) -> Any:
        """diffusers' pipeline of the class that fits this model, over the same memory."""
        from ldm.checkpoint.peers import to_diffusers

        return to_diffusers(self.fuse().parts)

    def unknown_words(self, prompt: str) -> list[str]:
        """The prompt's words that the model has never seen; none where the model does not list its words."""
        if self.adapted.loras:  # which may have taught it any
            return []
        for embedding in self.adapted.embeddings:
            prompt = prompt.replace(embedding.name, " ")
        return self.parts.unknown_words(prompt)

    # --- adapters: each gives a new pipeline that shares the tensors of this one ---------------------------

    def with_lora(
        self, file: str | Path | LoraFile, weight: float = 1.0, text_weight: float | None = None
    ) -> Pipeline:
        """This pipeline with a LoRA (or LoHa, LoKr, DoRA) beside those it has; its name is the file's.

        Args:
            file: in the names of diffusers, peft or kohya; one that is there already gets the new weight.
            weight: on the U-Net; 0 is none, 1 as trained.
            text_weight: on the text encoders; by default the same.

        Raises:
            UserError: if the file is damaged, or does not belong to this model wholly: says which and why.
        """
        read = file if isinstance(file, LoraFile) else read_lora(file)
        lora = Lora(read, read.name, weight, weight if text_weight is None else text_weight)
        others = {each.name: each for each in self.adapted.loras}
        if lora.name in others and others[lora.name].file.sha256 != read.sha256:
            raise UserError(f"{read.path} and {others[lora.name].file.path} have one name: rename one")
        return self._with(replace(self.adapted, loras=tuple({**others, lora.name: lora}.values())))

    def with_embedding(self, file: str | Path, name: str | None = None) -> Pipeline:
        """This pipeline with a textual inversion, written as `name` in prompts. Raises UserError."""
        words = (*self.adapted.embeddings, read_embedding(file, name))
        return self._with(replace(self.adapted, embeddings=words))

    def fuse(self) -> Pipeline:
        """The same pictures, up to rounding, with LoRAs in the weights: faster, but those are copies."""
        return self if self.adapted.fused else self._with(replace(self.adapted, fused=True))

    def unfuse(self) -> Pipeline:
        """The inverse: weights are the very tensors of `base` again, and LoRAs are computed beside them."""
        return self._with(replace(self.adapted, fused=False)) if self.adapted.fused else self

    @property
    def base(self) -> Pipeline:
        """This pipeline without adapters: the tensors that were loaded."""
        original = self.adapted.original
        return self if original is None else replace(self, parts=original, adapted=Adapted())

    def for_request(self, request: Request) -> Pipeline:
        """This pipeline with the LoRAs that a request names, found among its own or in `lora_dir`."""
        loras = wanted_loras(request, self.adapted.loras, self.lora_dir)
        wanted = replace(self.adapted, loras=loras)
        if wanted.uses == self.adapted.uses:
            return self
        made = self._recent.get(wanted.uses)
        if made is None:
            made = self._with(wanted)
            self._recent.clear()
            self._recent[wanted.uses] = made
        return made

    def _with(self, adapted: Adapted) -> Pipeline:
        parts, adapted = adapt(self.base.parts, adapted)
        return replace(self, parts=parts, adapted=adapted)

    def with_upscaler(self, upscaler: Pipeline | str | Path) -> Pipeline:
        """This pipeline with another that enlarges each finished picture, with its prompt and seed.

        As that other would enlarge the picture's PNG: a request's `upscaling` says how, in what is not its
        default. Latents and `denoise` stay small.

        Raises:
            UserError: if it is no upscaler.
        """
        if not isinstance(upscaler, Pipeline):
            upscaler = load(upscaler, device=self.runtime.device, dtype=self.runtime.dtype)
        tasks.check_upscaler(upscaler.parts, upscaler.name)
        return replace(self, upscaler=upscaler)

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
        image: str | Path | InMemory | None = None,
        mask_image: str | Path | InMemory | None = None,
        strength: float | None = None,
        image_guidance_scale: float | None = None,
        noise_level: int | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] | None = None,
        negative_target_size: tuple[int, int] | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
    ) -> Result:
        """Draw. Names and meanings are those of diffusers; None is the model's default.

        Args:
            prompt: one text or several; "" draws without one.
            height, width: in pixels; by default the image's, if there is one, cut to multiples of 8.
            seed: picture k is drawn with seed + k; a list gives each its own; None starts at a random one.
            latents: [images, C, h, w] unit noise, instead of what the seeds give.
            sampler: a name in any spelling, or a function like those in `ldm.solvers`.
            spacing: where the sampler's steps lie ("karras", "trailing", ...).
            guidance: a function like `ldm.guidance.CFG`, instead of guidance_scale and guidance_rescale.
            image: to draw from: a path, a PIL image, or [3, H, W] in 0..1; resized as in diffusers.
            mask_image: white where an inpainting model draws anew; the rest keeps the image's own pixels.
            strength: the share of the steps that is drawn, from the image with as much noise.
            output_type: "pil" (list), "np" [B, H, W, 3] in 0..1, "pt" [B, 3, H, W] in 0..1, or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) with the latents at
                the network's scale, x / sqrt(sigma^2 + 1); what it returns under "latents" replaces them.

        Raises:
            UserError: naming the argument that is not allowed, its value and what is.
        """
        requests, beside = split_call(locals())
        on_step = None
        if callback_on_step_end is not None:
            on_step = self._on_step(callback_on_step_end, self.plan(requests[0], beside).grid)
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
        asked = [request] if isinstance(request, Request) else request
        requests = [self.resolve(each, beside) for each in asked]
        if len({each.loras for each in requests}) > 1:
            raise UserError("prompts of one call have the same LoRAs: give those with others to another call")
        if (pipe := self.for_request(requests[0])) is not self:
            return pipe.generate(requests, on_step, output_type, beside)
        plan, start = self.plan(requests[0], beside), self._start(requests[0], beside)
        pictures, drawn = list_pictures(requests, beside, self.text, self.parts, plan.shape), []
        for batch in batches(pictures, plan.at_once):
            for step in self._steps(plan, start, batch):
                if on_step is not None:
                    on_step(step)
            latents = step.x * plan.grid.final_scale
            drawn.append(latents if output_type == "latent" else start.finish(self.decode(latents)))
        images = torch.cat(drawn)
        if output_type == "latent":
            requests = [each.replace(upscaling=None) for each in requests]
        elif self.upscaler is not None:
            images = self._enlarge(self.upscaler, images, requests)
        return Result(as_output(images, output_type), tuple(requests))

    @staticmethod
    def _enlarge(upscaler: Pipeline, images: Tensor, requests: Sequence[Request]) -> Tensor:
        """What an upscaler makes of the pictures of resolved requests, [B, 3, H, W] in 0..1, one by one."""
        asked = [
            each.upscaling.replace(prompt=each.prompt, seeds=(seed,))
            for each in requests
            for seed in each.seeds
            if each.upscaling is not None
        ]
        images = (images * 255).round() / 255  # as they are in a PNG
        large = [
            upscaler.generate(request, output_type="pt", beside=Beside(image=image)).images
            for image, request in zip(images, asked, strict=True)
        ]
        return torch.cat(large)

    def denoise(self, request: Request, beside: Beside = NOTHING) -> Iterator[Step]:
        """Draw a request's pictures in one batch, step by step. `decode` makes images of `x0` of a Step."""
        request = self.resolve(request, beside)
        if (pipe := self.for_request(request)) is not self:
            return pipe.denoise(request, beside)
        plan, start = self.plan(request, beside), self._start(request, beside)
        return self._steps(plan, start, list_pictures([request], beside, self.text, self.parts, plan.shape))

    def encode(self, images: Tensor) -> Encoded:
        """Images [B, 3, H, W] in 0..1 -> the Gaussian over latents that the VAE makes of them, fp32."""
        return networks.encode(self.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w], as a VAE gives them -> images [B, 3, H, W] in 0..1, fp32."""
        return networks.decode(self.vae, latents)

    def resolve(self, request: Request, beside: Beside = NOTHING) -> Request:
        """The request with the model's defaults in place of None. Raises UserError if the model cannot."""
        return resolve(self, request, beside)

    def plan(self, request: Request, beside: Beside = NOTHING) -> Plan:
        """How a request is drawn. Raises UserError for a grid that this model's schedule does not have."""
        return make_plan(self, request, beside)

    def _start(self, request: Request, beside: Beside) -> tasks.Start:
        return tasks.start(request, beside, self.parts, self.encode, self.runtime.device)

    def _steps(self, plan: Plan, start: tasks.Start, batch: Sequence[Picture]) -> Iterator[Step]:
        """Draw one batch: the first state, then whatever the solver does with it."""
        noise = plan.sampler.noise([picture.source for picture in batch])
        given = [picture.latents for picture in batch if picture.latents is not None]
        unit = torch.stack(given) if given else None
        x, concat = start.begin(noise, unit, plan.shape, plan.grid, self.runtime.device)
        cond = Conditioning.cat([picture.cond for picture in batch])
        uncond = Conditioning.cat([picture.uncond for picture in batch])
        branches = tasks.branches(cond, uncond, concat, tasks.kind_of(self.parts))
        predict = networks.predict(self.unet, plan.grid, branches)
        denoise = plan.guidance(predict, self.schedule.prediction.x0)
        return plan.sampler.solver(denoise, x, plan.grid.sigmas, noise, **plan.options)

    def _on_step(self, callback: Callback, grid: Grid) -> OnStep:
        def on_step(step: Step) -> None:
            scale = (step.sigma**2 + 1) ** 0.5
            latents = step.x / scale
            answer = callback(self, step.i, float(grid.timesteps[step.i]), {"latents": latents})
            if answer and answer.get("latents", latents) is not latents:
                step.x.copy_(answer["latents"] * scale)

        return on_step
