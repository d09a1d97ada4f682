"""What was trained beside a model, LoRA or its kin, saved for every program that draws with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.lora import FOLDER_FILES
from ldm.adapters.names import ENCODERS, UNDERSCORED, UNET, Layer
from ldm.checkpoint import Parts
from ldm.checkpoint.io import write_tensors
from ldm.checkpoint.keymap import unet_keys
from ldm.checkpoint.save import family_of_parts
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.files import whole_folder
from ldm.finetune.lora import ADAPTER, adapter_layers

DIFFUSERS_FILE = FOLDER_FILES[0]
DIFFUSERS_ROLES = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
KOHYA_ROLES = {"down": ".lora_down.weight", "up": ".lora_up.weight", "magnitude": ".dora_scale"}
KOHYA_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


def save_lora(parts: Parts, folder: Path, name: str, dtype: torch.dtype | None = None) -> None:
    """Write what `add_lora` added and training changed, in files of a new `folder`; all or nothing.

    `<name>.safetensors` has the names of kohya's sd-scripts and of LyCORIS, which other programs read: of the
    original U-Net for SDXL, with alpha beside each layer. `pytorch_lora_weights.safetensors` has those of
    diffusers, which reads LoRA alone.

    Args:
        folder: replaced as a whole.
        dtype: of A and B, by default fp32. Alphas and DoRA's magnitudes scale whole weights: they stay fp32.

    Raises:
        UserError: if there is NaN or Inf, if `name` cannot be a file's, or if `folder` cannot be written to.
    """
    if name in ("", Path(DIFFUSERS_FILE).stem) or name != Path(name).name:
        raise UserError(f"a LoRA cannot be called {name!r}: give it the name of a file, without a folder")
    layers = _tensors(parts, dtype)
    with whole_folder(folder) as aside:
        if all("down" in roles for roles in layers.values()):
            write_tensors(aside / DIFFUSERS_FILE, _to_diffusers(layers), metadata=_diffusers_metadata(parts))
        write_tensors(
            aside / f"{name}.safetensors", _to_kohya(parts, layers), metadata=_kohya_metadata(parts, name)
        )


def _tensors(parts: Parts, dtype: torch.dtype | None) -> dict[Layer, dict[str, Tensor]]:
    """The trained tensors of each layer by role, and its alpha."""
    found = {}
    for part in (UNET, *ENCODERS):
        for path, layer in adapter_layers(getattr(parts, part) or nn.Module()):
            tensors = _lora(layer, dtype) if hasattr(layer, "lora_A") else _lycoris(layer, dtype)
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise UserError(
                    f"the LoRA of {part}.{path} has NaN or Inf, so nothing is saved: "
                    "train with a lower learning rate"
                )
            found[Layer(part, path)] = tensors
    return found


def _lora(layer: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = {
        "down": layer.lora_A[ADAPTER].weight.to(dtype),
        "up": layer.lora_B[ADAPTER].weight.to(dtype),
        "alpha": torch.tensor(float(layer.lora_alpha[ADAPTER])),
    }
    if layer.use_dora[ADAPTER]:
        tensors["magnitude"] = layer.lora_magnitude_vector[ADAPTER].weight
    return tensors


def _lycoris(layer: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """peft's LoHa and LoKr have LyCORIS's names. Of a LoKr of two whole matrices it reads no scale."""
    found = {role: getattr(layer, role) for role in layer.adapter_layer_names}
    tensors = {role: each[ADAPTER] for role, each in found.items() if ADAPTER in each}
    if tensors.keys() == {"lokr_w1", "lokr_w2"}:
        tensors["lokr_w1"] = tensors["lokr_w1"] * layer.scaling[ADAPTER]
    tensors = {role: tensor.to(dtype) for role, tensor in tensors.items()}
    return tensors | {"alpha": torch.tensor(float(layer.alpha[ADAPTER]))}


def _to_diffusers(layers: Mapping[Layer, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, roles in layers.items():
        stem = f"{layer.part}.{layer.path}"
        for role, ending in DIFFUSERS_ROLES.items():
            if role in roles:
                # transformers, by which diffusers 0.42 reads these parts, leaves out magnitudes without it.
                weight = ".weight" if role == "magnitude" and layer.part in ENCODERS else ""
                tensors[f"{stem}{ending}{weight}"] = roles[role]
    return tensors


def _to_kohya(parts: Parts, layers: Mapping[Layer, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    xl = parts.text_encoder_2 is not None
    tensors: dict[str, Tensor] = {}
    for layer, roles in layers.items():
        path = layer.path
        if layer.part == UNET and xl:
            (key,) = unet_keys(parts.unet.config, [f"{path}.weight"])
            path = key.original.removesuffix(".weight")
        stem = UNDERSCORED[layer.part][-1 if xl else 0] + path.replace(".", "_")
        tensors |= {stem + KOHYA_ROLES.get(role, f".{role}"): tensor for role, tensor in roles.items()}
        if "magnitude" in roles:  # one for each output, in the shape of the weight, as in LyCORIS
            ones = [1] * (roles["down"].ndim - 1)
            tensors[f"{stem}.dora_scale"] = roles["magnitude"].reshape(-1, *ones)
    return tensors


def _configs(parts: Parts) -> dict[str, dict[str, Any]]:
    """peft's config of each part that is trained."""
    modules = {part: getattr(parts, part) for part in (UNET, *ENCODERS)}
    return {
        part: module.peft_config[ADAPTER].to_dict()
        for part, module in modules.items()
        if hasattr(module, "peft_config")
    }


def _diffusers_metadata(parts: Parts) -> dict[str, str]:
    """As `save_lora_weights` of diffusers writes it: peft's configs, each key after its part's name."""
    settings = {f"{part}.{key}": v for part, config in _configs(parts).items() for key, v in config.items()}
    return {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True, default=sorted)}


def _kohya_metadata(parts: Parts, name: str) -> dict[str, str]:
    """What other programs tell the family by, and show."""
    config, family = next(iter(_configs(parts).values())), family_of_parts(parts)
    version = KOHYA_VERSIONS.get(family, family)
    if family in ("sd1", "sd2") and Schedule.from_config(dict(parts.scheduler)).prediction.value[0] == "v":
        version += "_v"
    kind = str(getattr(config["peft_type"], "value", config["peft_type"])).lower()
    module = {"ss_network_module": "networks.lora"}
    if kind != "lora":
        module = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps({"algo": kind})}
    return {
        "ss_output_name": name,
        "ss_base_model_version": version,
        "ss_v2": str(family == "sd2"),
        **module,
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(config["lora_alpha" if kind == "lora" else "alpha"]),
    }
