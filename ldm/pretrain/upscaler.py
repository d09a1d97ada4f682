"""Training an upscaler in the layout of Stable Diffusion's, from scenes rendered at two sizes.

The small picture is concatenated with the noisy latents, which have its size, so an autoencoder of factor f
makes an upscaler of factor f. Half of the small pictures are worn: drawn by another model's autoencoder from
latents a little off, as what that model draws will be. Noise is added to some, of a level that the U-Net is
told (Ho et al. 2021, "Cascaded Diffusion Models", section 4.2). What is there is drawn already, so the U-Net
reads no text.

At zero terminal SNR one step from pure noise is a regression: the log's `gain_db` says by how many dB it is
nearer to the large render than bicubic interpolation is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import ldm
from ldm.checkpoint import Parts, save_folder
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.scheduler_config import noise_levels
from ldm.errors import UserError
from ldm.evaluate.distances import psnr
from ldm.images.pixels import contact_sheet
from ldm.models import AutoencoderKL, AutoencoderTiny
from ldm.postcards.scoring.sources import to_uint8
from ldm.postcards.scoring.upscaling import bicubic
from ldm.pretrain.data import Pictures, cached, cut, digest_of
from ldm.pretrain.unet import PLAIN
from ldm.train.loss import (
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
    """The same scenes as large pictures [N, f h, f w, 3] and as small ones [N, h, w, 3], clean and worn."""

    large: Pictures
    clean: Pictures
    worn: Pictures
    worn_by: str = ""  # a hash of the autoencoder that did it

    def __len__(self) -> int:
        return len(self.large)


def make_pairs(
    large: Pictures,
    small: Pictures,
    vae: AutoencoderKL | AutoencoderTiny,
    cache: Path,
    wear: float,
) -> Pairs:
    """Pairs of the same scenes; `vae` wears the small ones, with noise of up to `wear` on its latents."""
    if large.captions != small.captions:
        raise UserError("the large and the small pictures are not of the same scenes: clear the cache")
    worn_by = f"{digest_of(vae)} {wear}"
    key = small.digest()
    key.update(worn_by.encode())
    file = cache / f"worn-{len(small)}-{key.hexdigest()[:12]}.npy"
    worn = cached(file, lambda: _wear(small, vae, wear))
    return Pairs(large, small, replace(small, images=worn.numpy()), worn_by)


@torch.no_grad()
def _wear(pictures: Pictures, vae: AutoencoderKL | AutoencoderTiny, wear: float) -> Tensor:
    """uint8 [N, H, W, 3]; each picture's latents are moved by noise of a standard deviation in 0..wear."""
    rng, parts = torch.Generator().manual_seed(0), []
    for index in torch.split(torch.arange(len(pictures)), 64):
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode_latents(pictures.tensors(index).contiguous(memory_format=torch.channels_last))
            std = wear * torch.rand(len(z), 1, 1, 1, generator=rng)
            y = vae.decode_latents(z + std * torch.randn(z.shape, generator=rng).to(z))
        parts.append(torch.from_numpy(to_uint8((y.float() + 1) / 2)))
    return torch.cat(parts).contiguous()


class UpscalerTask(Task):
    """Trains a pipeline's U-Net; its autoencoder is frozen, and its text encoder is not used.

    loss keys: crop (side of the random square of the small picture, 0 for all of it), worn (share of the
    small pictures that are), noised (share to which noise is added, up to the model's highest level), pixels
    (weight of the decoded picture's squared error, beside that of the latents, in which not all channels
    count alike for the picture).
    """

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
        self.train_set, self.held_out = train, held_out
        defaults = {"crop": 64.0, "worn": 0.5, "noised": 0.5, "pixels": 0.0}
        self.weights = loss_settings(defaults, loss, shares=("worn", "noised"))
        self.any_t = timestep_probabilities(PLAIN, len(self.schedule.alphas_cumprod))
        self.facts = {"model.vae": digest_of(self.vae), "model.worn": train.worn_by}

    def batch(self, rng: torch.Generator, size: int, number: int = 0) -> Batch:
        weights, data = self.weights, self.train_set
        index = torch.randint(len(data), (size,), generator=rng)
        level = torch.randint(len(self.signal), (size,), generator=rng)
        level[torch.rand(size, generator=rng) >= weights["noised"]] = 0
        is_worn = torch.rand(size, generator=rng) < weights["worn"]
        small = torch.where(_wide(is_worn), data.worn.tensors(index), data.clean.tensors(index))
        t = draw_timesteps(self.any_t, size, rng)
        return self._batch(data.large.tensors(index), small, level, t, int(weights["crop"]), rng)

    def _batch(
        self, large: Tensor, small: Tensor, level: Tensor, t: Tensor, crop: int, rng: torch.Generator
    ) -> Batch:
        side = small.shape[-1]
        crop = crop if 0 < crop < side else side
        corners = torch.randint(side - crop + 1, (len(small), 2), generator=rng).tolist()
        factor = self.vae.downscale
        small = cut(small, corners, crop)
        large = cut(large, [[factor * start for start in corner] for corner in corners], factor * crop)
        signal = _wide(self.signal[level].float())
        small = signal.sqrt() * small + (1 - signal).sqrt() * torch.randn(small.shape, generator=rng)
        noise, _ = draw_noise((len(small), self.vae.latent_channels, crop, crop), PLAIN, rng)
        return {"large": large, "small": small, "noise": noise, "level": level, "t": t}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        square_error, guess = self._denoise(batch)
        loss, weight = square_error.mean(), self.weights["pixels"]
        if not weight:
            return loss, {}
        pixels = functional.mse_loss(self.vae.decode_latents(guess).float(), batch["large"])
        return loss + weight * pixels, {"pixels": pixels.detach()}

    def _denoise(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The squared error of the output, mean over channels [B, h, w]; the clean latents it speaks of."""
        with torch.no_grad():
            large = batch["large"].contiguous(memory_format=torch.channels_last)
            x0 = self.vae.encode_latents(large).float()
        noisy = noisy_latents(x0, batch["noise"], batch["t"], self.schedule)
        target = training_target(x0, batch["noise"], batch["t"], self.schedule)
        answer = self._answer(noisy, batch).float()
        return pixel_losses(answer, target, PLAIN), self._guess(answer, noisy, batch["t"])

    def _guess(self, answer: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The clean latents that an answer speaks of: alpha x - sigma v. Pure noise has no sigma for `x0`."""
        if self.schedule.prediction is Prediction.SAMPLE:
            return answer
        return noisy_latents(noisy, -answer, t, self.schedule)

    def _answer(self, noisy: Tensor, batch: Batch) -> Tensor:
        sample = torch.cat([noisy, batch["small"]], 1).contiguous(memory_format=torch.channels_last)
        no_text = sample.new_zeros(len(sample), 1, 1)
        answer: Tensor = self.unet(sample, batch["t"], no_text, class_labels=batch["level"])
        return answer

    def in_one_step(self, batch: Batch) -> Tensor:
        """What is drawn from the noise of a batch of the last t, at once: [B, 3, H, W], about [-1, 1]."""
        answer = self._answer(batch["noise"], batch).float()
        return self.vae.decode_latents(self._guess(answer, batch["noise"], batch["t"])).float()

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
            with torch.autocast(device.type, torch.bfloat16):
                square_error, _ = self._denoise(_to(any_t, device))
                total += float(square_error.mean((1, 2)).sum())
                drawn.append(self.in_one_step(_to(from_noise, device)).cpu())
        pictures = to_uint8((torch.cat(drawn) + 1) / 2)
        gain = psnr(pictures, large) - psnr(bicubic(clean, large.shape[1]), large)
        return {"held_out_mse": total / len(index), "gain_db": float(gain.mean())}

    def export(self, folder: Path) -> None:
        save_folder(folder, self.parts, torch.bfloat16)

    def picture(self, folder: Path) -> Image.Image:
        """Of four worn pictures in a row each: bicubic, drawn, rendered."""
        pipe, data, shown = ldm.load(folder), self.held_out, []
        for i in range(min(4, len(data))):
            small, large = data.worn.images[i], data.large.images[i]
            drawn = pipe("", image=Image.fromarray(small), seed=i).images[0]
            shown += [*map(Image.fromarray, bicubic(small[None], len(large))), drawn, Image.fromarray(large)]
        return contact_sheet(shown, columns=3)


def _wide(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return x[:, None, None, None]


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}
