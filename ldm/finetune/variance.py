"""A U-Net that says a mean only, widened to say its variance too."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ldm.adapters.layers import share
from ldm.checkpoint import Parts
from ldm.diffusion.schedule import Schedule


def widen_output(parts: Parts) -> Parts:
    """Parts whose U-Net gives as many channels again, of its variance; those of one that does are returned.

    The new channels have weights of 0 and say, by their bias, the variance that the model was drawn with: -1
    is fixed_small, 1 fixed_large (Nichol and Dhariwal 2021, equation 15). So it draws as before, by DDPM too.
    """
    if parts.learns_variance:
        return parts
    was = Schedule.from_config(dict(parts.scheduler)).variance
    unet, old = share(parts.unet), parts.unet.conv_out
    unet.config = replace(parts.unet.config, out_channels=2 * old.out_channels)
    unet.conv_out.out_channels = unet.config.out_channels
    for name, said in (("weight", 0.0), ("bias", 1.0 if was == "fixed_large" else -1.0)):
        tensor = old.get_parameter(name)
        wide = torch.cat([tensor.detach(), torch.full_like(tensor, said)])
        setattr(unet.conv_out, name, nn.Parameter(wide, tensor.requires_grad))
    scheduler = {**parts.scheduler, "variance_type": "learned_range"}
    # The U-Net is no longer that of a file.
    return replace(parts, unet=unet, scheduler=scheduler, weights=None)
