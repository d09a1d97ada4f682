"""A model, and what gives another one: devices, adapters, networks beside it.

Nothing changes after construction: each gives a new model, which shares the tensors of the old one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from ldm.adapters import (
    Adapted,
    Lora,
    LoraFile,
    adapt,
    read_embedding,
    read_image_prompt,
    read_lora,
    wanted_loras,
)
from ldm.adapters.seamless import seamless
from ldm.checkpoint.beside.classifier import read_classifier
from ldm.checkpoint.beside.safety import read_checker
from ldm.checkpoint.folder import load_vae
from ldm.checkpoint.parts import STEMS, changed_part, check_fit, check_refiner, check_upscaler
from ldm.checkpoint.source import find_adapter, find_part
from ldm.checkpoint.weights import find_weights
from ldm.control import Reader
from ldm.errors import UserError
from ldm.memory.residence import asleep
from ldm.models import UNet
from ldm.pipeline.model.loaded import Loaded
from ldm.pipeline.model.moving import move, move_parts, read_target
from ldm.request import ImagePromptUse, Request
from ldm.runtime import choose


@dataclass(frozen=True, eq=False)
class Model(Loaded):
    """`ldm.load` gives one with a call of diffusers' arguments."""

    # The last model that a request's LoRAs asked for, and the last seamless one, so that the next request
    # need not build it again.
    _recent: dict[str, tuple[Any, Self]] = field(default_factory=dict, init=False, repr=False)

    # --- elsewhere: each gives a new model that shares what is the same with this one ----------------------

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """This model on another device or in another dtype: `.to("cuda")`, `.to("cpu", torch.bfloat16)`.

        Adapters go along. Networks that are there already are shared. Raises UserError.
        """
        device, dtype = read_target(*args, **kwargs)
        if self.max_memory is not None:
            raise UserError("max_memory is of one device and dtype: load the model there")
        runtime = choose(self.device if device is None else device, dtype or self.dtype)
        parts = move_parts(self.base.parts, runtime, cast=dtype is not None)
        upscaler = None if self.upscaler is None else self.upscaler.to(*args, **kwargs)
        classifier = self.classifier
        if classifier is not None:
            classifier = replace(classifier, network=move(classifier.network, runtime.device, None))
        refiner = None if self.refiner is None else self.refiner.to(*args, **kwargs)
        checker = None if self.safety_checker is None else self.safety_checker.to(runtime.device)
        changed: dict[str, Any] = {"upscaler": upscaler, "refiner": refiner, "classifier": classifier}
        changed["safety_checker"] = checker
        prompts = tuple(
            replace(file, network=move(file.network, runtime.device, runtime.dtype))
            for file in self.adapted.image_prompts
        )
        adapted, alone = replace(self.adapted, image_prompts=prompts), Adapted(image_prompts=prompts)
        moved = replace(self, parts=parts, runtime=runtime, adapted=alone, **changed)
        return moved if self.adapted.original is None else moved._with(adapted)

    def cuda(self, device: int | str | torch.device = "cuda") -> Self:
        """This model on a GPU. Raises UserError if there is none."""
        return self.to(device)

    def compiled(self, **options: Any) -> Self:
        """This model with a U-Net that torch.compile makes quicker, at its first steps slower.

        It shares all tensors. Adapters go before: `with_lora` and `to` give a model that is not compiled.

        Args:
            options: of `torch.compile`, such as mode="max-autotune".
        """
        unet = move(self.unet, self.device, None)
        unet.compile(**options)
        return replace(self, parts=replace(self.parts, unet=unet))

    def with_vae_tiling(self, always: bool | None = True) -> Self:
        """This model with a VAE that always works over bands of rows, never (False), or by itself (None).

        By itself it does where the whole would not fit into the free memory. Unlike diffusers' tiling it is
        exact up to rounding (`ldm.models.vae_bands`); it takes less memory, and up to twice the time.
        """
        vae, original = move(self.vae, self.device, None), self.adapted.original
        vae.over_bands = always
        adapted = self.adapted
        if original is not None:
            adapted = replace(adapted, original=replace(original, vae=vae))
        return replace(self, parts=replace(self.parts, vae=vae), adapted=adapted)

    def with_vae(self, place: str | Path) -> Self:
        """This model with another VAE, as `ldm.load(..., vae=place)`; it shares all else with this one.

        Raises:
            UserError: if it is damaged, or has other latents than the U-Net draws.
        """
        path, old = find_part(place, "vae"), self.parts
        with nullcontext() if self.max_memory is None else asleep(self.device):
            vae = load_vae(path, old.vae.to_config(), self.runtime)
        file = find_weights(path, STEMS["vae"]) if path.is_dir() else path
        parts = replace(old, vae=vae, changes=changed_part(old.changes, "vae", file))
        check_fit(parts, {"unet": Path(self.name), "vae": path})
        adapted, original = self.adapted, self.adapted.original
        if original is not None:
            adapted = replace(adapted, original=replace(original, vae=vae, changes=parts.changes))
        return replace(self, parts=parts, adapted=adapted)

    # --- adapters: each gives a new model that shares the tensors of this one ------------------------------

    def with_lora(
        self,
        file: str | Path | LoraFile,
        weight: float = 1.0,
        text_weight: float | None = None,
        *,
        weight_name: str | None = None,
    ) -> Self:
        """This model with a LoRA (or LoHa, LoKr, DoRA) beside those it has; its name is the file's.

        Args:
            file: in the names of diffusers, peft or kohya, a folder that has one, or a hub name; one that is
                there already gets the new weight.
            weight: on the U-Net; 0 is none, 1 as trained.
            text_weight: on the text encoders; by default the same.
            weight_name: of several files of a folder or hub name, the one that is meant.

        Raises:
            UserError: if the file is damaged, or does not belong to this model wholly: says which and why.
        """
        read = file if isinstance(file, LoraFile) else read_lora(find_adapter(file, weight_name))
        lora = Lora(read, read.name, weight, weight if text_weight is None else text_weight)
        others = {each.name: each for each in self.adapted.loras}
        if lora.name in others and others[lora.name].file.sha256 != read.sha256:
            raise UserError(f"{read.path} and {others[lora.name].file.path} have one name: rename one")
        return self._with(replace(self.adapted, loras=tuple({**others, lora.name: lora}.values())))

    def with_embedding(self, file: str | Path, name: str | None = None) -> Self:
        """This model with a textual inversion, written as `name` in prompts. Raises UserError.

        Args:
            file: or a folder that has one, or a hub name.
        """
        words = (*self.adapted.embeddings, read_embedding(find_adapter(file), name))
        return self._with(replace(self.adapted, embeddings=words))

    def with_ip_adapter(
        self,
        file: str | Path,
        image_encoder: str | Path | None = None,
        *,
        weight_name: str | None = None,
        scale: float | Mapping[str, Any] = 1.0,
    ) -> Self:
        """This model with an IP-Adapter beside those it has: it draws from pictures as from texts.

        The U-Net stays as it is, and `base` is without.

        Args:
            file: in the layout that is published, a folder that has one, or a hub name.
            image_encoder: the folder of its CLIPVisionModelWithProjection, where it is not beside the file.
            weight_name: of several files of a folder or hub name, the one that is meant.
            scale: 0 is none; or by blocks, as diffusers has it: {"up": {"block_0": [0, 1, 0]}}.

        Raises:
            UserError: if the file is damaged, or made for another family: says which and why.
        """
        use = ImagePromptUse(adapter=str(file), scale=scale)
        read = read_image_prompt(file, self.unet, self.runtime, weight_name, use.scale, image_encoder)
        prompts = (*self.adapted.image_prompts, read)
        return replace(self, adapted=replace(self.adapted, image_prompts=prompts))

    def with_classifier(self, folder: str | Path) -> Self:
        """This model with a classifier of its noisy latents, used where a request names one of its classes.

        Args:
            folder: what scripts/train_classifier.py exports; or "postcard-classifier", the embedded model's.

        Raises:
            UserError: if it is damaged, or knows the latents of another model.
        """
        return replace(self, classifier=read_classifier(folder, self.vae, self.device))

    def with_safety_checker(self, place: str | Path | None = None) -> Self:
        """This model with a checker of finished pictures: what it flags is black, and a Result says so.

        Latents are not checked, nor what callbacks and previews see on the way.

        Args:
            place: a folder with diffusers' StableDiffusionSafetyChecker, a pipeline folder or hub name that
                has one, or "open-nsfw" (`ldm[safety]`); by default that of this model's own folder.

        Raises:
            UserError: where there is none, or it is damaged.
        """
        return replace(self, safety_checker=read_checker(place, self.parts.weights, self.device))

    def with_controlnet(self, *models: str | Path) -> Self:
        """This model with ControlNets, T2I-Adapters or LLLites, which a call with a `control_image` means.

        Of folders, files or hub names. Raises UserError for one that is damaged, or of another family.
        """
        made = replace(self, controlnets=tuple(map(str, models)))
        for each in made.controlnets:
            made.controls.get(each)
        return made

    @property
    def controls(self) -> Reader:
        """What reads networks for `control`, and keeps the last."""
        return Reader(self.shelf, self.unet, self.runtime, self.sleeps)

    def with_upscaler(self, upscaler: Self | str | Path) -> Self:
        """This model with another that enlarges each finished picture, with its prompt and seed.

        As that other would enlarge the picture's PNG: a request's `upscaling` says how, in what is not its
        default. Latents and `denoise` stay small.

        Raises:
            UserError: if it is no upscaler.
        """
        other = self._other(upscaler)
        check_upscaler(other.parts, other.name)
        return replace(self, upscaler=other)

    def with_refiner(self, refiner: Self | str | Path) -> Self:
        """This model with another that draws the last steps of each picture, as SDXL's refiner does.

        It goes on from the latents at a request's `refiner_switch_at`, by default 0.8: a request's
        `refining` says how, in what is not as in the first.

        Raises:
            UserError: if it draws from something else than text, or has other latents.
        """
        other = self._other(refiner)
        check_refiner(other.parts, other.name, self.parts)
        return replace(self, refiner=other)

    def _other(self, model: Self | str | Path) -> Self:
        if isinstance(model, str | Path):
            return self.read(model, self.runtime, self.max_memory)
        return model

    @cached_property
    def alone(self) -> Self:
        """This model without those that go on from what it draws."""
        if self.upscaler is None and self.refiner is None:
            return self
        return replace(self, upscaler=None, refiner=None)

    def fuse(self) -> Self:
        """The same pictures, up to rounding, with LoRAs in the weights: faster, but those are copies."""
        return self if self.adapted.fused else self._with(replace(self.adapted, fused=True))

    def unfuse(self) -> Self:
        """The inverse: weights are the very tensors of `base` again, and LoRAs are computed beside them."""
        return self._with(replace(self.adapted, fused=False)) if self.adapted.fused else self

    @property
    def base(self) -> Self:
        """This model without adapters: the tensors that were loaded."""
        original = self.adapted.original
        if original is None and not self.adapted.image_prompts:
            return self
        return replace(self, parts=original or self.parts, adapted=Adapted())

    def for_request(self, request: Request) -> Self:
        """This model as a request wants it: with LoRAs, found among its own or in `lora_dir`; seamless."""
        adapted = self._for_loras(request) if request.loras else self
        return adapted if request.tiling is None else adapted.seamless(request.tiling)

    def _for_loras(self, request: Request) -> Self:
        loras = wanted_loras(request, self.adapted.loras, self.lora_dir)
        wanted = replace(self.adapted, loras=loras)
        if wanted.uses == self.adapted.uses:
            return self
        uses, made = self._recent.get("last", ((), self))
        if uses != wanted.uses:
            made = self._with(wanted)
            self._recent["last"] = wanted.uses, made  # one assignment: threads may share a model
        return made

    def seamless(self, axes: str) -> Self:
        """This model with networks for which its edges along `axes` ("x", "y", "xy") are neighbours.

        They share all tensors with this one's.
        """
        kept, made = self._recent.get("seamless", ("", self))
        if kept != axes:
            unet, vae = seamless(self.unet, axes), seamless(self.vae, axes)
            vae.over_bands = False  # bands end at the picture's edges
            made = replace(self, parts=replace(self.parts, unet=unet, vae=vae))
            self._recent["seamless"] = axes, made  # one assignment, as above
        return made

    def with_unet(self, key: object, read: Callable[[], UNet]) -> Self:
        """This model with another U-Net, which is read where the last one was not of an equal `key`."""
        kept, made = self._recent.get("unet", (None, self))
        if kept != key:
            made = replace(self, parts=replace(self.parts, unet=read()))
            self._recent["unet"] = key, made  # one assignment, as above
        return made

    def _with(self, adapted: Adapted) -> Self:
        parts, adapted = adapt(self.base.parts, adapted)  # reads weights where they change, asleep or not
        return replace(self, parts=parts, adapted=adapted)
