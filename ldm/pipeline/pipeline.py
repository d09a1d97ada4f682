"""The pipeline: a model that draws when it is called, with diffusers' argument names.

    request -> prepare (ldm/pipeline/job.py) -> Job -> draw (ldm/pipeline/sample.py) -> images

Nothing here changes after construction, so threads may share a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ldm.checkpoint import embedded, load_parts, save_model
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.solvers import Solver, Step
from ldm.errors import UserError
from ldm.images.fitting import InMemory
from ldm.models import LatentDist
from ldm.pipeline import networks
from ldm.pipeline.inputs import (
    NOTHING,
    Inputs,
    Result,
    as_output,
    check_output_type,
    one_each,
    own_generators,
)
from ldm.pipeline.job import Job, prepare
from ldm.pipeline.model import Model
from ldm.pipeline.resolve import check_upscaler
from ldm.pipeline.sample import OnStep, draw_batch, draw_latents, sample
from ldm.request import Request, consecutive_seeds
from ldm.runtime import choose

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


class Pipeline(Model):
    """A model that draws. Made by `ldm.load`."""

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
            sampler: a name in any spelling, or a function like those in `ldm/diffusion/solvers.py`.
            spacing: where the sampler's steps lie ("karras", "trailing", ...).
            guidance: a function like `ldm.diffusion.guidance.CFG`, in place of guidance_scale and _rescale.
            image: to draw from: a path, a PIL image, or [3, H, W] in 0..1; resized as in diffusers.
            mask_image: white where an inpainting model draws anew, or where it has transparent parts, what is
                not; the rest keeps the image's own pixels.
            strength: the share of the steps that is drawn, from the image with as much noise.
            output_type: "pil" (list), "np" [B, H, W, 3] in 0..1, "pt" [B, 3, H, W] in 0..1, or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) with the latents at
                the network's scale, x / sqrt(sigma^2 + 1); what it returns under "latents" replaces them.

        Raises:
            UserError: naming the argument that is not allowed, its value and what is.
        """
        each = num_images_per_prompt
        if each < 1:
            raise UserError(f"num_images_per_prompt {each} is not allowed: give at least 1")
        prompts = one_each(prompt, 1 if prompt_embeds is None else len(prompt_embeds), "prompt")
        count = len(prompts) * each
        generators = own_generators(generator, count)
        seeds = _seeds(seed, generators, count)
        image_file, image = _file_or_memory(image)
        mask_file, mask_image = _file_or_memory(mask_image)
        shared = Request(
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
            image=image_file,
            mask_image=mask_file,
            strength=strength,
            image_guidance_scale=image_guidance_scale,
            noise_level=noise_level,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            negative_original_size=negative_original_size,
            negative_crops_coords_top_left=negative_crops_coords_top_left,
            negative_target_size=negative_target_size,
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
        )
        inputs = Inputs(
            generators=generators,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            image=image,
            mask_image=mask_image,
            solver=sampler if callable(sampler) else None,
            guidance=guidance,
        )
        texts = zip(
            prompts,
            one_each(negative_prompt, len(prompts), "negative_prompt"),
            one_each(prompt_2, len(prompts), "prompt_2"),
            one_each(negative_prompt_2, len(prompts), "negative_prompt_2"),
            strict=True,
        )
        requests = [
            shared.replace(
                prompt=text or "",
                negative_prompt=negative,
                prompt_2=text_2,
                negative_prompt_2=negative_2,
                seeds=seeds[p * each : (p + 1) * each],
            )
            for p, (text, negative, text_2, negative_2) in enumerate(texts)
        ]
        check_output_type(output_type)
        job = self.prepare(requests, inputs)
        on_step = None if callback_on_step_end is None else self._on_step(callback_on_step_end, job)
        return self.draw(job, on_step, output_type)

    def prepare(
        self,
        request: Request | Sequence[Request],
        inputs: Inputs = NOTHING,
        batch_size: int | None = None,
    ) -> Job:
        """How a request is drawn, or several that differ only in texts and seeds: a value, decided once.

        Args:
            inputs: what no request can hold: tensors, generators, functions.
            batch_size: the most pictures to draw at once; by default as many as memory suggests.

        Raises:
            UserError: naming the argument that is not allowed, its value and what is.
        """
        return prepare(self, request, inputs, batch_size)

    def draw(self, job: Job, on_step: OnStep | None = None, output_type: str = "pil") -> Result:
        """Draw a job; `on_step` sees each step of each batch. Raises UserError for an unknown output type."""
        check_output_type(output_type)
        drawn = draw_latents if output_type == "latent" else draw_batch
        images = torch.cat([drawn(job, batch, on_step) for batch in job.batches])
        requests = job.requests
        if output_type == "latent":
            requests = tuple(each.replace(upscaling=None) for each in requests)
        return Result(as_output(images, output_type), requests)

    def generate(
        self,
        request: Request | Sequence[Request],
        on_step: OnStep | None = None,
        output_type: str = "pil",
        inputs: Inputs = NOTHING,
    ) -> Result:
        """Draw the pictures of a request, or of several that differ only in texts and seeds.

        In as many batches as memory suggests; `on_step` sees each step of each. Raises UserError.
        """
        check_output_type(output_type)
        return self.draw(self.prepare(request, inputs), on_step, output_type)

    def denoise(self, request: Request, inputs: Inputs = NOTHING) -> Iterator[Step]:
        """Draw a request's pictures in one batch, step by step. `decode` makes images of `x0` of a Step."""
        job = self.prepare(request, inputs)
        return sample(job, job.pictures)

    def resolve(self, request: Request, inputs: Inputs = NOTHING) -> Request:
        """The request with the model's defaults in place of None. Raises UserError if the model cannot."""
        return self.prepare(request, inputs).request

    def encode(self, images: Tensor) -> LatentDist:
        """Images [B, 3, H, W] in 0..1 -> the Gaussian over latents that the VAE makes of them, fp32."""
        return networks.encode(self.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w], as `encode` gives them -> images [B, 3, H, W] in 0..1, fp32."""
        return networks.decode(self.vae, latents)

    def with_upscaler(self, upscaler: Pipeline | str | Path) -> Self:
        """This pipeline with another that enlarges each finished picture, with its prompt and seed.

        As that other would enlarge the picture's PNG: a request's `upscaling` says how, in what is not its
        default. Latents and `denoise` stay small.

        Raises:
            UserError: if it is no upscaler.
        """
        if not isinstance(upscaler, Pipeline):
            upscaler = load(upscaler, device=self.runtime.device, dtype=self.runtime.dtype)
        check_upscaler(upscaler.parts, upscaler.name)
        return replace(self, upscaler=upscaler)

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

    def _on_step(self, callback: Callback, job: Job) -> OnStep:
        def on_step(step: Step) -> None:
            scale = (step.sigma**2 + 1) ** 0.5
            latents = step.x / scale
            answer = callback(self, step.i, float(job.grid.timesteps[step.i]), {"latents": latents})
            if answer and answer.get("latents", latents) is not latents:
                step.x.copy_(answer["latents"] * scale)

        return on_step


def _file_or_memory(image: str | Path | InMemory | None) -> tuple[str | None, InMemory | None]:
    """What a request can hold of an image, its path, and what it cannot."""
    return (str(image), None) if isinstance(image, str | Path) else (None, image)


def _seeds(
    seed: int | Sequence[int] | None, generators: Sequence[torch.Generator] | None, count: int
) -> tuple[int, ...]:
    """One per picture."""
    if generators is not None:
        return tuple(each.initial_seed() % 2**32 for each in generators)  # all of it that they take in
    seeds = consecutive_seeds(seed, count)
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} pictures: give one, or one per picture")
    return seeds
