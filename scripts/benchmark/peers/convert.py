"""diffusers' and transformers' networks in OpenVINO's format, and a U-Net of 8 bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import openvino
import safetensors
import torch
import transformers
from torch import Tensor, nn

from benchmark.case import Case
from benchmark.inputs import config_of, make_inputs, window_of

CALIBRATION = 4  # calls of the U-Net, at as many noise levels


class UNet(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(
            case.folder, subfolder="unet", torch_dtype=torch.float32
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        tokens: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        out: Tensor = self.unet(sample, timestep, tokens, added_cond_kwargs=added, return_dict=False)[0]
        return out


class Vae(nn.Module):
    """Its decoder, or its encoder up to the mean."""

    def __init__(self, case: Case, decodes: bool) -> None:
        super().__init__()
        kind = getattr(diffusers, config_of(case, "vae")["_class_name"])
        self.vae = kind.from_pretrained(case.folder, subfolder="vae", torch_dtype=torch.float32)
        self.decodes = decodes

    def forward(self, x: Tensor) -> Tensor:
        if self.decodes:
            image: Tensor = self.vae.decode(x, return_dict=False)[0]
            return image
        found = self.vae.encode(x)
        mean: Tensor = found.latents if hasattr(found, "latents") else found.latent_dist.mean
        return mean


class TextEncoder(nn.Module):
    """What pipelines take first (the last layer, or projected pooled text), and the last layer but one."""

    def __init__(self, case: Case, part: str) -> None:
        super().__init__()
        (name,) = config_of(case, part)["architectures"]
        options = {"torch_dtype": torch.float32, "attn_implementation": "eager"}  # what can be traced
        self.encoder = getattr(transformers, name).from_pretrained(case.folder, subfolder=part, **options)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        found = self.encoder(ids, output_hidden_states=True)
        return found[0], found.hidden_states[-2]


def convert(case: Case, file: Path) -> None:
    """Write the part that `file` is named after, with the precision of the model's own files."""
    given, part = make_inputs(case), file.stem
    module: nn.Module
    if part == "unet":
        module, example = UNet(case), unet_arrays(case, 500.0)
    elif part == "vae_decoder":
        module, example = Vae(case, True), (given.latents,)
    elif part == "vae_encoder":
        module, example = Vae(case, False), (given.image,)
    else:
        module, example = TextEncoder(case, part), (np.ones((1, window_of(case)), np.int64),)
    tensors = tuple(torch.from_numpy(each) for each in example)
    with torch.no_grad():
        model = openvino.convert_model(module.eval(), example_input=tensors)
    folder = (
        Path(case.folder) / part.partition("_")[0] if part.startswith("vae") else Path(case.folder) / part
    )
    save(model, file, half=stored_in_half(next(folder.glob("*.safetensors"))))


def quantise(case: Case, plain: Path, file: Path) -> None:
    """Write the U-Net with weights and activations of 8 bits, calibrated on noise at the case's size."""
    import nncf

    levels = np.linspace(950, 50, CALIBRATION)
    samples = [list(unet_arrays(case, float(t))) for t in levels]
    model = openvino.Core().read_model(plain)
    options: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": CALIBRATION}
    save(nncf.quantize(model, nncf.Dataset(samples), **options), file, half=True)


def unet_arrays(case: Case, t: float) -> tuple[Any, ...]:
    """The U-Net's inputs at a timestep, in its own order."""
    given = make_inputs(case)
    extra = [each for each in (given.pooled, given.time_ids) if each is not None]
    return (given.sample, np.array([t], np.float32), given.tokens, *extra)


def stored_in_half(file: Path) -> bool:
    with safetensors.safe_open(file, "pt") as stored:
        return bool(stored.get_slice(next(iter(stored.keys()))).get_dtype() == "F16")


def save(model: Any, file: Path, half: bool) -> None:
    """The weights beside it in a .bin; the .xml last, as it says that all is there."""
    aside = file.with_name(f"aside-{file.name}")
    openvino.save_model(model, aside, compress_to_fp16=half)
    os.replace(aside.with_suffix(".bin"), file.with_suffix(".bin"))
    os.replace(aside, file)
