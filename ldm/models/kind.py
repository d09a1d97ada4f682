"""What a model draws from, told by the channels that its U-Net takes beside its latents."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What a model draws from: by the channels that its U-Net takes beside the c of latents."""

    TEXT = "0"  # and from text and an image that it begins with
    DEPTH = "1"  # as TEXT, with a depth map beside
    UPSCALE = "3"  # a low-resolution picture
    PIX2PIX = "c"  # the latents of a picture to change
    INPAINT = "1 + c"  # a mask, and the latents of the picture without what it covers

    @classmethod
    def of(cls, in_channels: int, latent_channels: int) -> Kind:
        """The kind of a U-Net that takes `in_channels`, with a VAE of `latent_channels`.

        Raises:
            ValueError: for any other number of channels.
        """
        c = latent_channels
        kinds = {0: cls.TEXT, 1: cls.DEPTH, 3: cls.UPSCALE, c: cls.PIX2PIX, c + 1: cls.INPAINT}
        if in_channels - c not in kinds:
            raise ValueError(f"a U-Net of {in_channels} input channels does not fit a VAE of {c}")
        return kinds[in_channels - c]
