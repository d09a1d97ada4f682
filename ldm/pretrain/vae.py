"""Training the autoencoder: pictures to latents that look like small pictures, and back.

Loss on the reconstruction y of x: L1 + a gradient L1 (crisp edges) + L1 of 2x and 8x pooled pictures (right
colours) + L2. Three things make the latents easy for a U-Net to model:
- their channels are pulled to mean 0 and variance 1, so the scaling factor is 1 (what is left, a hundredth or
  two, stays: mended in the encoder alone it costs 0.9 dB, as the decoder's soft clamp is not linear); some,
  for details, to a smaller variance: they drown in noise earlier, so that a U-Net draws them last;
- noise is added before decoding, so what the picture hardly needs is not stored at great strength;
- on some steps the latents are pooled 2x and must decode to the pooled picture, so a latent is a small image
  (equivariance to scale; Kouzelis et al. 2025, "EQ-VAE").

An autoencoder that is widened from a narrower one keeps that one's channels by a loss: the U-Net that was
trained on them can be widened too, and goes on from what it has learnt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.checkpoint import load_module, save_module
from ldm.checkpoint.source import find_part
from ldm.errors import UserError
from ldm.images.pixels import contact_sheet, to_pil
from ldm.models import AutoencoderKL, AutoencoderTiny, build
from ldm.pretrain.data import Pictures, crop_squares
from ldm.runtime import memory_format
from ldm.train.recipe import loss_settings
from ldm.train.task import Batch, Task


class VAETask(Task):
    """Trains an autoencoder, all of it or (decoder_only) the decoder on frozen latents.

    loss keys: gradient, pooled, l2, moments, noise (std added to latents), pooled_steps (share of steps that
    decode pooled latents), crop (pixels of the random square that is cut from each picture, 0 for all of it:
    a convolutional autoencoder learns as much from a pixel of a crop, and makes four times the steps), keep
    (how far the first channels may leave those of `narrow`), fine_channels (how many of the last ones are for
    details), fine_std (their standard deviation).
    """

    shows_originals = True

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        train: Pictures,
        held_out: Pictures,
        loss: dict[str, float],
        decoder_only: bool,
        narrow: AutoencoderKL | AutoencoderTiny | None = None,
    ) -> None:
        super().__init__()
        if narrow is not None and decoder_only:
            raise UserError(
                "--widen and --decoder_only exclude each other: a frozen encoder keeps its channels"
            )
        self.vae = vae
        self.narrow = None if narrow is None else narrow.requires_grad_(False)
        self.decoder_only = decoder_only
        for name, weight in vae.named_parameters():
            weight.requires_grad_(not (decoder_only and name.startswith(("encoder.", "quant_conv."))))
        self.train_pictures, self.held_out = train, held_out
        defaults = {
            "gradient": 0.4,
            "pooled": 0.5,
            "l2": 1.0,
            "moments": 0.1,
            "noise": 0.1,
            "pooled_steps": 0.3,
        }
        shares = ("pooled_steps",)
        defaults |= {"crop": 0.0, "keep": 1.0, "fine_channels": 0.0, "fine_std": 0.5}
        self.weights = loss_settings(defaults, loss, shares)
        pixels = max(2 * vae.downscale, 16)  # pooled latents are decoded, and pooled 8x compared
        if self.weights["crop"] % pixels:
            raise UserError(f"loss.crop must be a multiple of {pixels} pixels (got {self.weights['crop']:g})")
        fine = self.weights["fine_channels"]
        if fine % 1 or not 0 <= fine <= vae.latent_channels:
            raise UserError(
                "loss.fine_channels must be a whole number from 0 to the "
                f"{vae.latent_channels} latent channels (got {fine:g})"
            )
        self.wanted_std = torch.ones(vae.latent_channels)
        self.wanted_std[vae.latent_channels - int(fine) :] = self.weights["fine_std"]
        self.facts = {"model.decoder_only": decoder_only, "model.widened": narrow is not None}

    def batch(self, rng: torch.Generator, size: int, number: int = 0) -> Batch:
        index = torch.randint(len(self.train_pictures), (size,), generator=rng)
        x = self._crop(self.train_pictures.tensors(index), rng)
        cells = x.shape[-1] // self.vae.downscale
        noise = torch.randn(size, self.vae.latent_channels, cells, cells, generator=rng)
        pooled = torch.rand((), generator=rng) < self.weights["pooled_steps"]
        return {"x": x, "noise": noise, "pooled": pooled}

    def _crop(self, x: Tensor, rng: torch.Generator) -> Tensor:
        side = int(self.weights["crop"])
        if not 0 < side < x.shape[-1]:
            return x
        corners = torch.randint(x.shape[-1] - side + 1, (len(x), 2), generator=rng).tolist()
        return crop_squares(x, corners, side)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch["x"].contiguous(memory_format=memory_format(batch["x"].device))
        with torch.set_grad_enabled(not self.decoder_only):
            z = self.vae.encode_latents(x)
        loss, extra = self._of_latents(z, x)
        noisy = z + self.weights["noise"] * batch["noise"]
        if batch["pooled"] and not self.decoder_only:
            noisy, x = F.avg_pool2d(noisy, 2), F.avg_pool2d(x, 2)
        gap = self.vae.decode_latents(noisy).float() - x
        return loss + self._of_pixels(gap), extra | {"l2": gap.detach().square().mean()}

    def _of_pixels(self, gap: Tensor) -> Tensor:
        w = self.weights
        loss = gap.abs().mean() + w["l2"] * gap.square().mean()
        loss = loss + w["gradient"] * (gap.diff(dim=2).abs().mean() + gap.diff(dim=3).abs().mean())
        return loss + w["pooled"] * (F.avg_pool2d(gap, 2).abs().mean() + F.avg_pool2d(gap, 8).abs().mean())

    def _of_latents(self, z: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean, std = z.float().mean((0, 2, 3)), z.float().std((0, 2, 3))
        moments = mean.square().mean() + (std - self.wanted_std.to(std)).square().mean()
        loss, extra = self.weights["moments"] * moments, {"moments": moments.detach()}
        if self.narrow is not None:
            with torch.no_grad():
                kept = self.narrow.encode_latents(x)
            drift = (z[:, : kept.shape[1]] - kept).float().square().mean()
            loss, extra["drift"] = loss + self.weights["keep"] * drift, drift.detach()
        return loss, extra

    def _reconstruct(self, pictures: Pictures, count: int) -> tuple[Tensor, Tensor]:
        x = pictures.tensors(torch.arange(min(count, len(pictures)))).to(next(self.parameters()).device)
        parts = [self.vae.decode_latents(self.vae.encode_latents(part)) for part in torch.split(x, 32)]
        return x, torch.cat(parts).clamp(-1, 1)

    def evaluate(self) -> dict[str, float]:
        """Mean PSNR in dB on held-out pictures, -10 log10(mse) with pixels in 0..1."""
        x, y = self._reconstruct(self.held_out, 256)
        mse = ((x - y) / 2).square().mean((1, 2, 3))
        return {"held_out_psnr": float((-10 / math.log(10) * mse.log()).mean())}

    def picture(self, folder: Path) -> Image.Image:
        x, y = self._reconstruct(self.held_out, 16)
        pairs = torch.stack([x, y], 1).flatten(0, 1)
        return contact_sheet(to_pil((pairs + 1) / 2), columns=8)

    def export(self, folder: Path) -> None:
        """Write the VAE's folder."""
        save_module(self.vae, folder)


@torch.no_grad()
def build_vae(config: Mapping[str, Any]) -> AutoencoderKL | AutoencoderTiny:
    """A new VAE of random weights. Raises UserError for another kind of module.

    An AutoencoderKL is all but deterministic (a variance of e^-20, which only weight decay moves), and its
    scaled latents are at first what its last layer gives, whatever the scaling factor (in the upscaler's
    layout 0.08333).
    """
    vae = build(config)
    if isinstance(vae, AutoencoderTiny):
        return vae
    if not isinstance(vae, AutoencoderKL) or vae.quant_conv is None or vae.post_quant_conv is None:
        raise UserError(
            f"model is {config.get('_class_name')}: this trains an AutoencoderTiny, or an AutoencoderKL with "
            "use_quant_conv and use_post_quant_conv"
        )
    bias = vae.quant_conv.get_parameter("bias")
    vae.quant_conv.weight /= vae.scaling_factor
    bias.div_(vae.scaling_factor)
    vae.post_quant_conv.weight *= vae.scaling_factor
    vae.quant_conv.weight[vae.latent_channels :] = 0
    bias[vae.latent_channels :] = -20
    return vae


def load_vae(folder: Path) -> AutoencoderKL | AutoencoderTiny:
    """An exported VAE, or a model folder's, in fp32. Raises UserError for another kind of module."""
    vae = load_module(find_part(folder, "vae"), torch.float32)
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny):
        raise UserError(f"{folder} holds a {type(vae).__name__}; give the folder of an autoencoder")
    return vae
