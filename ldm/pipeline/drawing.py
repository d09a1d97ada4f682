"""A model that draws requests: as a whole, step by step, or half of the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ldm.checkpoint import save_model
from ldm.diffusion.solvers import Step
from ldm.errors import UserError
from ldm.images.pixels import to_pil
from ldm.models import LatentDist
from ldm.pipeline import networks
from ldm.pipeline.callback import Watch
from ldm.pipeline.deciding.prepare import prepare
from ldm.pipeline.inputs import (
    NOTHING,
    Inputs,
    Result,
    as_output,
    check_output_type,
    found_in,
    requests_of,
)
from ldm.pipeline.job import Batch, Job, Picture
from ldm.pipeline.model import Model
from ldm.pipeline.sample import OnStep, draw_batch, draw_latents, sample
from ldm.pipeline.steering.maps import AttentionMaps, record_all
from ldm.request import Request


class Drawing(Model):
    """From requests to pictures. `ldm.pipeline.pipeline` gives it a call of diffusers' arguments."""

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
        return self._draw(job, lambda batch: on_step, output_type)

    def _draw(self, job: Job, watch: Callable[[Batch], OnStep | None], output_type: str) -> Result:
        """Draw a job, each batch with a watcher of its own, until one of them stops."""
        drawn, pictures = list[Tensor](), list[Picture]()
        for batch in job.batches:
            on_step = watch(batch)
            if output_type == "latent":
                images, told = draw_latents(job, batch, on_step), batch
            else:
                images, told = draw_batch(job, batch, on_step)
            drawn.append(images)
            pictures += told
            if isinstance(on_step, Watch) and on_step.stopped:
                break
        requests = requests_of(job, pictures)
        if output_type == "latent":
            requests = tuple(
                each.replace(upscaling=None, watermark=None, transparent=None) for each in requests
            )
        return Result(as_output(torch.cat(drawn), output_type), requests, found_in(pictures))

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

    def attention_maps(
        self, request: Request, layers: Sequence[str] = (), inputs: Inputs = NOTHING
    ) -> AttentionMaps:
        """Which places of its pictures each word of a request's prompt drew, and the pictures.

        `layers` are those that are looked at ("mid", "up.1"), by default all. Raises UserError.
        """

        def draw(job: Job, batch: Batch) -> tuple[list[Image], Batch]:
            drawn = draw_batch(job, batch)
            return to_pil(drawn.images), drawn.batch

        return record_all(self.prepare(request, inputs), draw, layers)

    def encode(self, images: Tensor) -> LatentDist:
        """Images [B, 3, H, W] in 0..1 -> the Gaussian over latents that the VAE makes of them, fp32."""
        return networks.encode(self.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w], as `encode` gives them -> images [B, 3, H, W] in 0..1, fp32."""
        return networks.decode(self.vae, latents)

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

    def save_pretrained(self, path: str | Path, safe_serialization: bool = True, **options: Any) -> None:
        """diffusers' name of `save`, to a folder."""
        variant = options.pop("variant", None)
        if not safe_serialization or variant is not None:
            raise UserError("save_pretrained writes safetensors without a variant: leave the argument out")
        self.save(path, **options)

    def set_progress_bar_config(self, **_: object) -> None:
        """Nothing to set: Python draws no bar."""
