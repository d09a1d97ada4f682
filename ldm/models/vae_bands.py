"""A VAE at any size in the memory that there is, exactly.

Where the whole network does not fit for all pictures at once, it works on fewer; where it does not fit for
one, over bands of rows (`ldm.models.bands`). All ways give the same up to the rounding of sums.

Tiles that are decoded apart and blended are wrong at their seams and elsewhere too, since every GroupNorm
looks at the whole picture, and so does the attention in the middle. Here each GroupNorm has the statistics
of the whole map, and the attention, at an eighth of the size, sees all of it. One feature map is in memory at
a time, that between two resnets; as it is read band by band it is given back, while the next one grows. What
lies within a resnet is held too where memory allows it, or else made twice: for the statistics, and again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.kernels.malloc import freed_memory_given_back
from ldm.models.bands import Convolved, Enlarged, Layer, Normed, Pointwise, Stored, stored
from ldm.models.layers import ResnetBlock
from ldm.models.vae import VAE, AutoencoderTiny, LatentDist, TinyBlock

T = TypeVar("T")

# Bytes at the peak for each of a VAE's widest features at full size (scripts/measure_vae_memory.py).
DECODE_BYTES = {2: 10.0, 4: 13.0}  # by those of a number
ENCODE_BYTES = {2: 8.0, 4: 10.5}
# Of the free memory, what is not used: others use some meanwhile, and an allocator never gets all.
MARGIN = 0.2


def decode(vae: VAE, latents: Tensor, free: float) -> Tensor:
    """`vae.decode_latents` in `free` bytes: scaled latents [B, c, h, w] -> images [B, 3, H, W]."""
    pixels = latents.shape[2] * latents.shape[3] * vae.downscale**2
    at_once, keep = _at_once(vae, pixels, DECODE_BYTES, free), _keep(latents, free)
    return torch.cat(_parts(latents, at_once, vae.decode_latents, partial(decode_bands, vae, keep=keep)))


def encode(vae: VAE, images: Tensor, free: float) -> LatentDist:
    """`vae.encode` in `free` bytes: [B, 3, H, W] in [-1, 1] -> the Gaussian over unscaled latents."""
    at_once = _at_once(vae, images.shape[2] * images.shape[3], ENCODE_BYTES, free)
    parts = _parts(images, at_once, vae.encode, partial(encode_bands, vae, keep=_keep(images, free)))
    return LatentDist(torch.cat([each.mean for each in parts]), torch.cat([each.std for each in parts]))


def _parts(x: Tensor, at_once: int, whole: Callable[[Tensor], T], by_bands: Callable[[Tensor], T]) -> list[T]:
    """What becomes of a batch; where a card's memory runs out against all expectation, over bands too."""
    if at_once:
        try:
            return [whole(part) for part in torch.split(x, at_once)]
        except torch.OutOfMemoryError:
            pass  # handled below, as an error that is being handled keeps what its frames hold
    with freed_memory_given_back():
        return [by_bands(part) for part in torch.split(x, 1)]


def _at_once(vae: VAE, pixels: int, bytes_each: dict[int, float], free: float) -> int:
    """Pictures that the whole network takes at once: 0 where not one fits."""
    if vae.over_bands is not None:
        return 0 if vae.over_bands else 2**62
    size = next(vae.parameters()).element_size()
    return int(free * (1 - MARGIN) / (bytes_each[size] * vae.full_size_channels * pixels))


def _keep(x: Tensor, free: float) -> int:
    """Numbers of a map up to which it is held: two are at a time, and a third of memory is for the rest."""
    return int(free * (1 - MARGIN) / 3 / x.element_size())


def decode_bands(vae: VAE, latents: Tensor, keep: int = 0) -> Tensor:
    """`vae.decode_latents` over bands: scaled latents [B, c, h, w] -> images [B, 3, H, W], about [-1, 1].

    Args:
        keep: numbers of a map within a resnet up to which it is held, instead of made twice.
    """
    z = latents / vae.scaling_factor + vae.shift_factor
    if isinstance(vae, AutoencoderTiny):
        return _tiny(Stored([torch.tanh(z / 3) * 3]), vae.decoder.layers) * 2 - 1
    z = z if vae.post_quant_conv is None else vae.post_quant_conv(z)
    decoder = vae.decoder
    x = _middle(Stored([decoder.conv_in(z)]), decoder.mid_block, keep)
    for level in decoder.up_blocks:
        x = _level(x, level, keep)
    return stored(Convolved(Normed(x, decoder.conv_norm_out), decoder.conv_out)).whole()


def encode_bands(vae: VAE, images: Tensor, keep: int = 0) -> LatentDist:
    """`vae.encode` over bands: [B, 3, H, W] in [-1, 1] -> the Gaussian over unscaled latents."""
    if isinstance(vae, AutoencoderTiny):
        latents = _tiny(Stored([(images + 1) / 2]), vae.encoder.layers)
        return LatentDist(latents, torch.zeros_like(latents))
    encoder = vae.encoder
    x: Layer = Convolved(Stored([images]), encoder.conv_in)
    for level in encoder.down_blocks:
        x = _level(x, level, keep)
    x = _middle(x, encoder.mid_block, keep)
    return vae.distribution(stored(Convolved(Normed(x, encoder.conv_norm_out), encoder.conv_out)).whole())


def _middle(x: Layer, middle: Any, keep: int) -> Layer:
    """Resnet, attention to the whole map, resnet."""
    first, second = middle.resnets
    x = _resnet(x, first, keep)
    for attention in middle.attentions:
        x = Stored([attention(x.whole())])
    return _resnet(x, second, keep)


def _level(x: Layer, level: Any, keep: int) -> Layer:
    """The resnets of a level, and its change of size, which is made as it is needed."""
    for block in level.resnets:
        x = _resnet(x, block, keep)
    for down in level.downsamplers:
        x = Convolved(x, down.conv, down.pad_right_bottom)
    for up in level.upsamplers:
        x = Convolved(Enlarged(x), up.conv)
    return x


def _resnet(x: Layer, block: ResnetBlock, keep: int) -> Stored:
    x = stored(x) if x.numbers <= keep else x
    h: Layer = Convolved(Normed(x, block.norm1), block.conv1)
    h = stored(h, release=False) if h.numbers <= keep else h  # x is read again for the skip
    h = Convolved(Normed(h, block.norm2), block.conv2)
    skip = x if block.conv_shortcut is None else Convolved(x, block.conv_shortcut)
    return stored(Pointwise(lambda a, b: (a + b) / block.scale, h, skip))


def _tiny(x: Layer, layers: nn.Sequential) -> Tensor:
    """The layers of a tiny autoencoder, which has no norms: [B, C, H, W]."""
    for layer in layers:
        match layer:
            case TinyBlock():
                x = stored(Pointwise(lambda a, b: F.relu(a + b), _in_turn(x, layer.conv), x))
            case nn.Upsample(scale_factor=float(factor)):
                x = Enlarged(x, int(factor))
            case _:
                x = _in_turn(x, [layer])
    return stored(x).whole()


def _in_turn(x: Layer, layers: Any) -> Layer:
    """Convolutions and activations."""
    for each in layers:
        x = Convolved(x, each) if isinstance(each, nn.Conv2d) else Pointwise(each, x)
    return x
