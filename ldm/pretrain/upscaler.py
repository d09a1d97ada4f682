"""Training an upscaler in the layout of Stable Diffusion's, from scenes rendered at two sizes.

The small picture is concatenated with the noisy latents, which have its size, so an autoencoder of factor f
makes an upscaler of factor f. Half of the small pictures are degraded: drawn by another model's autoencoder
from latents a little off, as what that model draws will be. Noise is added to some, of a level that the U-Net
takes as a class label (Ho et al. 2021, "Cascaded Diffusion Models", section 4.2). What is there is drawn
already, so the U-Net reads no text.

At zero terminal SNR one step from pure noise is a regression: the log's `gain_db` says by how many dB it is
nearer to the large render than bicubic interpolation is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import ldm
from ldm.checkpoint import Defaults, Parts, save_folder
from ldm.checkpoint.peers import fresh_text_encoder
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.scheduler_config import noise_levels
from ldm.errors import UserError
from ldm.evaluate.distances import psnr
from ldm.evaluate.reconstruction import to_uint8
from ldm.images.pixels import contact_sheet
from ldm.models import AutoencoderKL, AutoencoderTiny, UNet, build
from ldm.postcards.comparisons.upscaling import bicubic
from ldm.pretrain.data import Pictures, cached, crop_squares, digest_of
from ldm.prompts.tokenizer import CLIPTokenizer
from ldm.runtime import half_dtype, memory_format
from ldm.train.loss import (
    PLAIN_LOSS,
    Levels,
    draw_noise,
    draw_timesteps,
    noisy_latents,
    pixel_losses,
    timestep_probabilities,
    training_target,
)
from ldm.train.recipe import loss_settings
from ldm.train.task import Batch, Task


@dataclass(frozen=True)
class Pairs:
    """The same scenes as large pictures [N, f h, f w, 3] and small ones [N, h, w, 3], clean and degraded."""

    large: Pictures
    clean: Pictures
    degraded: Pictures
    degraded_by: str = ""  # a hash of the autoencoder that did it

    def __len__(self) -> int:
        return len(self.large)


def make_pairs(
    large: Pictures,
    small: Pictures,
    vae: AutoencoderKL | AutoencoderTiny,
    cache: Path,
    latent_noise: float,
) -> Pairs:
    """Pairs of the same scenes. `vae` degrades the small ones, its latents moved by up to `latent_noise`."""
    if large.captions != small.captions:
        raise UserError("the large and the small pictures are not of the same scenes: clear the cache")
    degraded_by = f"{digest_of(vae)} {latent_noise}"
    key = small.digest()
    key.update(degraded_by.encode())
    file = cache / f"degraded-{len(small)}-{key.hexdigest()[:12]}.npy"
    degraded = cached(file, lambda: _degrade(small, vae, latent_noise))
    return Pairs(large, small, replace(small, images=degraded.numpy()), degraded_by)


@torch.no_grad()
def _degrade(pictures: Pictures, vae: AutoencoderKL | AutoencoderTiny, latent_noise: float) -> Tensor:
    """uint8 [N, H, W, 3]; each picture's latents are moved by noise of its own std in 0..latent_noise."""
    rng, parts = torch.Generator().manual_seed(0), []
    for index in torch.split(torch.arange(len(pictures)), 64):
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode_latents(pictures.tensors(index).contiguous(memory_format=torch.channels_last))
            std = latent_noise * torch.rand(len(z), 1, 1, 1, generator=rng)
            y = vae.decode_latents(z + std * torch.randn(z.shape, generator=rng).to(z))
        parts.append(torch.from_numpy(to_uint8((y.float() + 1) / 2)))
    return torch.cat(parts).contiguous()


def rescaled(vae: AutoencoderKL | AutoencoderTiny) -> AutoencoderKL | AutoencoderTiny:
    """The same autoencoder with the factor that diffusers' pipeline works with, whatever a config says."""
    other = build(vae.to_config() | {"scaling_factor": 0.08333})
    other.load_state_dict(vae.state_dict())
    assert isinstance(other, type(vae))
    return other


def new_parts(model: dict[str, Any], vae: AutoencoderKL | AutoencoderTiny, tokenizer: CLIPTokenizer) -> Parts:
    """An upscaler of random weights as the recipe has it. Its text encoder is there for the layout only."""
    unet = build(model["unet"])
    if not isinstance(unet, UNet):
        raise UserError(f"model.unet is a {type(unet).__name__}, no U-Net")
    return Parts(
        unet=unet,
        vae=vae,
        text_encoder=fresh_text_encoder(model["text_config"], tokenizer),
        tokenizer=tokenizer,
        scheduler=model["scheduler"],
        low_res_scheduler=model["low_res_scheduler"],
        max_noise_level=model["max_noise_level"],
        defaults=Defaults(**model["defaults"]),
    )


class UpscalerTask(Task):
    """Trains a pipeline's U-Net; its autoencoder is frozen, and its text encoder is not used.

    loss keys: crop (side of the random square of the small picture, 0 for all of it), degraded (share of the
    small pictures that are), noised (share to which noise is added, up to the model's highest level), pixels
    (weight of the decoded picture's squared error, beside that of the latents, in which not all channels
    count alike for the picture).
    """

    shows_originals = True

    def __init__(self, parts: Parts, train: Pairs, held_out: Pairs, loss: dict[str, float]) -> None:
        super().__init__()
        self.parts, self.unet = parts, parts.unet.requires_grad_()
        self.vae = parts.vae.requires_grad_(False)
        self.schedule = Schedule.from_config(dict(parts.scheduler))
        if self.schedule.prediction is Prediction.EPSILON or self.schedule.alphas_cumprod[-1] > 0:
            raise UserError("an upscaler is trained with v_prediction or sample, and rescale_betas_zero_snr")
        config = self.unet.config
        blocks = (*config.down_block_types, config.mid_block_type or "", *config.up_block_types)
        if any("CrossAttn" in each for each in blocks):
            raise UserError(
                "this trains U-Nets without cross-attention: take DownBlock2D, UNetMidBlock2D and UpBlock2D"
            )
        if (config.num_class_embeds or 0) <= parts.max_noise_level:
            raise UserError(
                f"model.unet.num_class_embeds must be above max_noise_level (got {config.num_class_embeds} "
                f"and {parts.max_noise_level})"
            )
        self.signal = noise_levels(parts.low_res_scheduler or {})[: parts.max_noise_level + 1]
        self.levels = Levels(self.schedule)
        self.train_set, self.held_out = train, held_out
        defaults = {"crop": 64.0, "degraded": 0.5, "noised": 0.5, "pixels": 0.0}
        self.weights = loss_settings(defaults, loss, shares=("degraded", "noised"))
        self.any_t = timestep_probabilities(PLAIN_LOSS, len(self.schedule.alphas_cumprod))
        self.facts = {"model.vae": digest_of(self.vae), "model.degraded": train.degraded_by}

    def batch(self, rng: torch.Generator, size: int, number: int = 0) -> Batch:
        weights, data = self.weights, self.train_set
        index = torch.randint(len(data), (size,), generator=rng)
        level = torch.randint(len(self.signal), (size,), generator=rng)
        level[torch.rand(size, generator=rng) >= weights["noised"]] = 0
        is_degraded = torch.rand(size, generator=rng) < weights["degraded"]
        small = torch.where(_wide(is_degraded), data.degraded.tensors(index), data.clean.tensors(index))
        t = draw_timesteps(self.any_t, size, rng)
        return self._batch(data.large.tensors(index), small, level, t, int(weights["crop"]), rng)

    def _batch(
        self, large: Tensor, small: Tensor, level: Tensor, t: Tensor, crop: int, rng: torch.Generator
    ) -> Batch:
        side = small.shape[-1]
        crop = crop if 0 < crop < side else side
        corners = torch.randint(side - crop + 1, (len(small), 2), generator=rng).tolist()
        factor = self.vae.downscale
        small = crop_squares(small, corners, crop)
        large = crop_squares(
            large, [[factor * start for start in corner] for corner in corners], factor * crop
        )
        signal = _wide(self.signal[level].float())
        small = signal.sqrt() * small + (1 - signal).sqrt() * torch.randn(small.shape, generator=rng)
        noise, _ = draw_noise((len(small), self.vae.latent_channels, crop, crop), PLAIN_LOSS, rng)
        return {"large": large, "small": small, "noise": noise, "level": level, "t": t}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, x0 = self._losses_and_x0(batch)
        loss, weight = losses.mean(), self.weights["pixels"]
        if not weight:
            return loss, {}
        pixels = functional.mse_loss(self.vae.decode_latents(x0).float(), batch["large"])
        return loss + weight * pixels, {"pixels": pixels.detach()}

    def _losses_and_x0(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The squared error of the output, mean over channels [B, h, w]; the clean latents it speaks of."""
        with torch.no_grad():
            large = batch["large"].contiguous(memory_format=memory_format(batch["large"].device))
            x0 = self.vae.encode_latents(large).float()
        noisy = noisy_latents(x0, batch["noise"], batch["t"], self.levels)
        target = training_target(x0, batch["noise"], batch["t"], self.levels)
        answer = self._answer(noisy, batch).float()
        return pixel_losses(answer, target, PLAIN_LOSS), self._predict_x0(answer, noisy, batch["t"])

    def _predict_x0(self, answer: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The clean latents that an answer speaks of: alpha x - sigma v. Pure noise has no sigma for `x0`."""
        if self.schedule.prediction is Prediction.SAMPLE:
            return answer
        return noisy_latents(noisy, -answer, t, self.levels)

    def _answer(self, noisy: Tensor, batch: Batch) -> Tensor:
        sample = torch.cat([noisy, batch["small"]], 1)
        sample = sample.contiguous(memory_format=memory_format(sample.device))
        no_text = sample.new_zeros(len(sample), 1, 1)
        answer: Tensor = self.unet(sample, batch["t"], no_text, class_labels=batch["level"])
        return answer

    def in_one_step(self, batch: Batch) -> Tensor:
        """What is drawn from the noise of a batch of the last t, at once: [B, 3, H, W], about [-1, 1]."""
        answer = self._answer(batch["noise"], batch).float()
        return self.vae.decode_latents(self._predict_x0(answer, batch["noise"], batch["t"])).float()

    def evaluate(self) -> dict[str, float]:
        """Of whole pictures: the loss at all noise levels; a step from pure noise against bicubic, in dB."""
        data, rng = self.held_out, torch.Generator().manual_seed(0)
        last = len(self.schedule.alphas_cumprod) - 1
        index = torch.arange(min(32, len(data)))
        large, clean = data.large.images[: len(index)], data.clean.images[: len(index)]
        total, drawn = 0.0, []
        device = next(self.unet.parameters()).device
        for rows in torch.split(index, 8):
            high, small, level = data.large.tensors(rows), data.clean.tensors(rows), torch.zeros_like(rows)
            spread = torch.linspace(0, last, len(index)).long()[rows]
            any_t, from_noise = (
                self._batch(high, small, level, t, 0, rng) for t in (spread, torch.full_like(rows, last))
            )
            with torch.autocast(device.type, half_dtype(device)):
                losses, _ = self._losses_and_x0(_to(any_t, device))
                total += float(losses.mean((1, 2)).sum())
                drawn.append(self.in_one_step(_to(from_noise, device)).cpu())
        pictures = to_uint8((torch.cat(drawn) + 1) / 2)
        gain = psnr(pictures, large) - psnr(bicubic(clean, large.shape[1]), large)
        return {"held_out_mse": total / len(index), "gain_db": float(gain.mean())}

    def export(self, folder: Path) -> None:
        save_folder(folder, self.parts, torch.bfloat16)

    def picture(self, folder: Path) -> Image.Image:
        """Of four degraded pictures in a row each: bicubic, drawn, rendered."""
        pipe, data, shown = ldm.load(folder), self.held_out, []
        for i in range(min(4, len(data))):
            small, large = data.degraded.images[i], data.large.images[i]
            drawn = pipe("", image=Image.fromarray(small), seed=i).images[0]
            shown += [*map(Image.fromarray, bicubic(small[None], len(large))), drawn, Image.fromarray(large)]
        return contact_sheet(shown, columns=3)


def _wide(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return x[:, None, None, None]


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}
