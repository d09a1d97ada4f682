"""The pipeline: a model that draws when it is called, with diffusers' argument names.

    request -> prepare (ldm/pipeline/job.py) -> Job -> draw (ldm/pipeline/sample.py) -> images

Nothing here changes after construction, so threads may share a pipeline.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.checkpoint import embedded
from ldm.control import take_controls
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.solvers import Solver
from ldm.errors import NoSuchName, UserError
from ldm.memory.sizes import parse_size
from ldm.pipeline.callback import Callback, Watch, check_names
from ldm.pipeline.drawing import Drawing
from ldm.pipeline.inputs import (
    Inputs,
    Result,
    as_image,
    as_image_prompts,
    as_latents,
    check_output_type,
    count_images,
    one_each,
    own_generators,
    scaled_loras,
    seeds_of,
)
from ldm.pipeline.model.diffusers_names import (
    assignment,
    lookup,
    refuse_arguments,
    refuse_loading,
    refuse_modules,
)
from ldm.request import NOTED, Request
from ldm.runtime import choose


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
    max_memory: str | int | None = None,
    torch_dtype: str | torch.dtype | None = None,
    **others: Any,
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
        max_memory: the most that this process, or its share of a GPU, may take: "6GiB", "6000MiB", bytes.
            Weights are read when they are used; each drawing is made in the quickest way that fits.
        torch_dtype: diffusers' name of dtype.
        others: what diffusers' loaders take and changes nothing here: safety_checker=None, ...

    Raises:
        UserError: naming the file that is missing or damaged, or the argument, and what to do.
    """
    refuse_loading(others, LOAD_ARGUMENTS)
    refuse_modules(unet=unet, vae=vae, text_encoder=text_encoder, text_encoder_2=text_encoder_2)
    if None not in (dtype, torch_dtype) and dtype != torch_dtype:
        raise UserError(f"dtype {dtype} and torch_dtype {torch_dtype} are one argument: give dtype alone")
    dtype = torch_dtype if dtype is None else dtype
    runtime, model = choose(device, None if dtype == "auto" else dtype), embedded() if path is None else path
    return Pipeline.read(
        model,
        runtime,
        None if max_memory is None else parse_size(max_memory),
        revision=revision,
        variant=variant,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        prediction_type=prediction_type,
        ema=ema,
    )


LOAD_ARGUMENTS = tuple(inspect.signature(load).parameters)[:-1]


class Pipeline(Drawing):
    """A model that draws. Made by `ldm.load`, which `from_pretrained` and `from_single_file` are too."""

    from_pretrained = staticmethod(load)
    from_single_file = staticmethod(load)

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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Iterable[int] | None = None,
        sampler: str | Solver | None = None,
        spacing: str | None = None,
        guidance: str | Guidance | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        image_guidance_scale: float | None = None,
        target_prompt: str | Sequence[str] | None = None,
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
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Result:
        """Draw. Names and meanings are those of diffusers; None is the model's default.

        Args:
            prompt: one text or several, read by prompt_grammar ("a1111", "comfy", "plain"); "" is none.
            height, width: in pixels; by default the image's, if there is one, cut to multiples of 8.
            seed: picture k is drawn with seed + k; a list gives each its own; None starts at a random one.
            latents: [images, C, h, w] unit noise, instead of what the seeds give.
            sampler: a name in any spelling, or a function like those in `ldm/diffusion/solvers.py`.
            spacing: where the sampler's steps lie ("karras", "trailing", ...).
            guidance: names ("apg:eta=0+interval:0.2,0.8", docs/guidance.md), or a function like
                `ldm.diffusion.guidance.CFG`, in place of guidance_scale and _rescale.
            image: to draw from: a path, a PIL image, an array [H, W, 3] of 8 bits or in 0..1, a tensor
                [3, H, W] in 0..1, or its latents; resized as in diffusers. One, or one for each prompt.
            mask_image: white where the image is drawn anew, or where it has transparent parts, what is not;
                the rest keeps the image's own pixels.
            strength: the share of the steps that is drawn, from the image with as much noise.
            target_prompt: an edit: the image, which `prompt` tells, becomes this; the rest is kept.
                `strength` says how far towards noise it is taken back, mask_image where it may change.
            output_type: "pil" (list), "np" [B, H, W, 3] in 0..1, "pt" [B, 3, H, W] in 0..1, or "latent".
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": ...}) with the latents at
                the network's scale, x / sqrt(sigma^2 + 1). What it returns under a name replaces that from
                the next step on; {"stop": True}, or StopIteration, ends the call with what is drawn so far.
                Several pictures are drawn batch by batch: steps begin at 0 in each, with its rows only.
            callback_on_step_end_tensor_inputs: what it sees: latents, prompt_embeds, negative_prompt_embeds,
                add_text_embeds, negative_pooled_prompt_embeds, add_time_ids, guidance_scale.
            cross_attention_kwargs: {"scale": 0.5} multiplies the weights of the LoRAs; ip_adapter_masks are
                tensors [1, pictures, H, W], one for each IP-Adapter: where its pictures act.
            ip_adapter_image: for each IP-Adapter (`with_ip_adapter`) a picture like `image`, or several.
            ip_adapter_image_embeds: or what its encoder makes of them, [2, pictures, ...]: without, and with.
            return_dict: either value; a Result has `.images` and is a tuple's like, `[0]`.
            others: any other field of a `Request` by its name, but those that the pipeline notes; of the
                controls of with_controlnet diffusers' control_image, controlnet_conditioning_scale, ...

        Raises:
            UserError: naming the argument that is not allowed, its value and what is.
        """
        others, control_images = take_controls(others, self.controlnets, as_image)
        refuse_arguments(
            others.keys() - Request.model_fields.keys(), [*CALL_ARGUMENTS, *Request.model_fields]
        )
        check_output_type(output_type)
        check_names(callback_on_step_end_tensor_inputs)
        each = num_images_per_prompt
        if each < 1:
            raise UserError(f"num_images_per_prompt {each} is not allowed: give at least 1")
        image_latents = as_latents(image, self.vae.latent_channels)
        image_file, image = as_image(image if image_latents is None else None, "image")
        mask_file, mask_image = as_image(mask_image, "mask_image")
        several = 1 if prompt_embeds is None else len(prompt_embeds)
        prompts = one_each(prompt, max(several, count_images(image, mask_image, image_latents)), "prompt")
        count = len(prompts) * each
        generators = own_generators(generator, count)
        seeds = seeds_of(seed, generators, count)
        pictures, shown = as_image_prompts(
            self.adapted.image_prompts, ip_adapter_image, ip_adapter_image_embeds, cross_attention_kwargs
        )
        shared = Request(
            **pictures,
            **others,
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
            guidance=None if callable(guidance) else guidance,
            spacing=spacing,
            image=image_file,
            mask_image=mask_file,
            strength=strength,
            image_guidance_scale=image_guidance_scale,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            negative_original_size=negative_original_size,
            negative_crops_coords_top_left=negative_crops_coords_top_left,
            negative_target_size=negative_target_size,
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
            loras=scaled_loras(self.adapted.uses, cross_attention_kwargs),
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
            control_images=control_images,
            image_latents=image_latents,
            solver=sampler if callable(sampler) else None,
            guidance=guidance if callable(guidance) else None,
            **shown,
        )
        texts = {
            "negative_prompt": negative_prompt,
            "prompt_2": prompt_2,
            "negative_prompt_2": negative_prompt_2,
            "target_prompt": target_prompt,
        }
        columns = {name: one_each(given, len(prompts), name) for name, given in texts.items()}
        requests = [
            shared.replace(
                prompt=text or "",
                seeds=seeds[p * each : (p + 1) * each],
                **{name: column[p] for name, column in columns.items()},
            )
            for p, text in enumerate(prompts)
        ]
        job = self.prepare(requests, inputs)
        if callback_on_step_end is None:
            return self.draw(job, None, output_type)
        callback, names = callback_on_step_end, callback_on_step_end_tensor_inputs
        return self._draw(job, lambda batch: Watch(self, job, batch, callback, names), output_type)

    # --- other names of diffusers -------------------------------------------------------------------------

    if not TYPE_CHECKING:  # which is to know the names that there are

        def __getattr__(self, name: str) -> Any:
            if (line := lookup(name)) is not None:
                raise NoSuchName(line)
            return object.__getattribute__(self, name)  # raises what it raised before

    def __setattr__(self, name: str, value: object) -> None:
        raise assignment(name, value)


CALL_ARGUMENTS = tuple(inspect.signature(Pipeline.__call__).parameters)[1:-1]
# Of a request, what comes by `others`: `seeds` is the call's seed.
FIELDS = tuple(name for name in Request.model_fields if name not in (*NOTED, *CALL_ARGUMENTS, "seeds"))
