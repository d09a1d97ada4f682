"""What a drawing looks like on its way: a cheap picture of the x0 of a Step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.models import VAE
from ldm.pipeline import networks
from ldm.pipeline.model import Model

SMALL_DECODER = 5_000_000  # parameters: the embedded model's has 1 M and SD's 50 M
SIDE, PICTURES = 128, 8  # of what the linear map is fitted to: pixels, and how many
RIDGE = 1e-4  # of the mean square of the latents: channels that say the same share their weight


def decoder(model: Model) -> Callable[[Tensor], Tensor]:
    """Of latents [B, c, h, w] images in 0..1, fp32 on the CPU, for the eye only.

    A small VAE decodes them itself, [B, 3, H, W]; for a large one it is a linear map to [B, 3, h, w], fitted
    to the VAE when this is called: keep what it gives.
    """
    vae = model.vae
    if sum(each.numel() for each in vae.decoder.parameters()) <= SMALL_DECODER:
        return lambda latents: networks.decode(vae, latents).cpu()
    weight = fit(vae)
    return lambda latents: linear(latents.detach().float().cpu(), weight)


def linear(latents: Tensor, weight: Tensor) -> Tensor:
    """[B, c, h, w] -> [B, 3, h, w] in 0..1, by weights [3, c + 1] whose last column is the bias."""
    colours = torch.einsum("kc,bchw->bkhw", weight[:, :-1], latents) + weight[:, -1].view(3, 1, 1)
    return colours.clamp(0, 1)


def fit(vae: VAE) -> Tensor:
    """Weights [3, c + 1] of the linear map nearest to the decoder, by least squares.

    What is fitted is the mean colour of each latent's patch of `samples`, given the latents that the encoder
    makes of them: ``min_W sum |W [z; 1] - rgb|^2``, with a small ridge on all but the bias.
    """
    images = samples()
    with torch.inference_mode():
        latents = networks.encode(vae, images).mean.float().cpu()
        colours = F.interpolate(images, latents.shape[-2:], mode="area")
    z = latents.movedim(1, -1).flatten(0, -2).double()  # [N, c]
    rgb = colours.movedim(1, -1).flatten(0, -2).double()  # [N, 3]
    mean_z, mean_rgb = z.mean(0), rgb.mean(0)
    z, rgb = z - mean_z, rgb - mean_rgb
    ridge = RIDGE * z.square().mean() * len(z) * torch.eye(z.shape[1], dtype=z.dtype)
    weight = torch.linalg.solve(z.T @ z + ridge, z.T @ rgb).T  # [3, c]
    return torch.cat([weight, (mean_rgb - weight @ mean_z)[:, None]], dim=1).float()


def samples() -> Tensor:
    """[PICTURES, 3, SIDE, SIDE] in 0..1: colours that change over all lengths, as those of photographs do.

    Noise of each octave with the same contrast, from a seed: the map is always the same.
    """
    generator = torch.Generator().manual_seed(0)
    images, size = torch.zeros(PICTURES, 3, SIDE, SIDE), 1
    while size <= SIDE // 4:
        noise = torch.randn(PICTURES, 3, size, size, generator=generator)
        images += F.interpolate(noise, (SIDE, SIDE), mode="bicubic" if size > 1 else "nearest")
        size *= 2
    return torch.sigmoid(images)
