"""LoRA: a low-rank change is trained beside a frozen model, and saved for every program that draws with it.

    h = W x + alpha / rank * B A x        Hu et al. 2021, https://arxiv.org/abs/2106.09685, equation 3

The layers are peft's. Each trained part becomes a new tree of modules which shares all frozen tensors with
the old one, so that the old one still draws as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.layers import share
from ldm.adapters.lora import FOLDER_FILES
from ldm.adapters.names import ADAPTABLE, ENCODERS, UNDERSCORED, UNET, Layer
from ldm.checkpoint import Parts
from ldm.checkpoint.io import write_tensors
from ldm.checkpoint.keymap import unet_keys
from ldm.checkpoint.save import family_of_parts
from ldm.diffusion.noise import torch_seed
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.files import whole_folder

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
# With the attention these are all layers of resnets, transformers and resampling, as LyCORIS has it in LoCon.
LOCON = (
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
)
ADAPTER = "default"  # peft's name for a model's only adapter
DIFFUSERS_FILE = FOLDER_FILES[0]
DIFFUSERS_ROLES = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
KOHYA_ROLES = {"down": ".lora_down.weight", "up": ".lora_up.weight", "magnitude": ".dora_scale"}
KOHYA_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


# --- layers ----------------------------------------------------------------------------------------------


def add_lora(
    parts: Parts,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    conv: bool = False,
    dropout: float = 0.0,
    use_dora: bool = False,
    text: bool = False,
    seed: int = 0,
) -> Parts:
    """Parts with LoRA layers in new modules that share all tensors of the given ones.

    The new tensors are fp32 and want a gradient; all others, which the given parts have too, want none. A
    begins as a normal of deviation 1 / rank and B as 0, as in diffusers' train_text_to_image_lora.py: what is
    drawn is the same at first.

    Args:
        rank: r of A [r, in] and B [out, r].
        alpha: the change is scaled by alpha / rank.
        targets: ends of names of linear layers and convolutions, such as "to_k", "attn2.to_k", "ff.net.2".
            Each part takes those that it has, or its default where it has none: to_q, to_k, to_v and to_out.0
            of the U-Net, q_proj, k_proj, v_proj and out_proj of text encoders.
        conv: beside them all other layers of the U-Net's resnets, transformers and resampling (`LOCON`):
            convolutions, time_emb_proj, feed-forward, proj_in and proj_out; none of text encoders. They are
            LoCon's in LyCORIS (Yeh et al. 2023, arXiv 2309.14859).
        dropout: probability by which inputs of A are dropped in training.
        use_dora: learn each weight's magnitude apart from its direction (Liu et al. 2024, arXiv 2402.09353).
        text: train the text encoders too.
        seed: of A.

    Raises:
        UserError: for a target that no trained part has, or that is no linear layer or convolution.
        ModuleNotFoundError: if peft is not installed.
    """
    from peft import LoraConfig

    trained = [UNET, *(part for part in ENCODERS if text and getattr(parts, part) is not None)]
    for part in (UNET, "vae", *ENCODERS):
        if getattr(parts, part) is not None:
            getattr(parts, part).requires_grad_(False)
    chosen = _choose_targets({part: getattr(parts, part) for part in trained}, targets, conv)
    modules: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.default_generator.manual_seed(torch_seed(seed))
        for part in trained:
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]  # says int, divides it
                target_modules=chosen[part],
                lora_dropout=dropout,
                use_dora=use_dora,
                init_lora_weights="gaussian",
            )
            modules[part] = _inject(getattr(parts, part), config)
    return replace(parts, **modules)


def _choose_targets(
    modules: Mapping[str, nn.Module], targets: Sequence[str] | None, conv: bool
) -> dict[str, list[str]]:
    """Names for peft, by part."""
    chosen = {}
    for part, module in modules.items():
        found = [target for target in targets or () if _named(module, target)]
        own = found or (ATTENTION if part == UNET else TEXT_ATTENTION)
        chosen[part] = [*own, *LOCON] if conv and part == UNET else list(own)
    for target in targets or ():
        layers = [layer for module in modules.values() for layer in _named(module, target)]
        if not layers or not all(isinstance(layer, ADAPTABLE) for layer in layers):
            fault = "names more than linear layers and convolutions" if layers else "is in no trained part"
            raise UserError(f"LoRA target {target!r} {fault}; there are {', '.join(_layer_names(modules))}")
    return chosen


def _named(module: nn.Module, target: str) -> list[nn.Module]:
    """What peft takes for a target: modules whose names end with it."""
    return [each for path, each in module.named_modules() if path and f".{path}".endswith(f".{target}")]


def _layer_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """The ends of layers' names: the last word, with the one before a number."""
    names = set()
    for module in modules.values():
        for path, layer in module.named_modules():
            if isinstance(layer, ADAPTABLE):
                before, last = f".{path}".split(".")[-2:]
                names.add(f"{before}.{last}" if last.isdigit() else last)
    return sorted(names)


def _inject(module: nn.Module, config: Any) -> nn.Module:
    from peft import inject_adapter_in_model

    adapted = share(module)
    inject_adapter_in_model(config, adapted, ADAPTER)
    for _, layer in _lora_layers(adapted):
        # peft gives its tensors the dtype of the layer below.
        layer.lora_A.float()
        layer.lora_B.float()
        if config.use_dora:
            _measure(layer)
        elif hasattr(layer, "_cast_input_dtype"):  # private to peft: without it the same, but slower
            layer._cast_input_dtype = _cast
    return adapted.train(module.training)


@torch.no_grad()
def _measure(layer: Any) -> None:
    """DoRA's magnitudes in fp32: rounded ones would change the model at once."""
    layer.lora_magnitude_vector[ADAPTER].update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=layer.lora_A[ADAPTER].weight,
        lora_B=layer.lora_B[ADAPTER].weight,
        scaling=layer.scaling[ADAPTER],
    )


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """peft's cast of a layer's input to the dtype of A; under autocast, which would cast it back, none."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, LoraLayer))


# --- files -----------------------------------------------------------------------------------------------


def save_lora(parts: Parts, folder: Path, name: str, dtype: torch.dtype | None = None) -> None:
    """Write what `add_lora` added and training changed, in two files of a new `folder`; all or nothing.

    `pytorch_lora_weights.safetensors` has the names of diffusers, `<name>.safetensors` those of kohya's
    sd-scripts, which other programs read: of the original U-Net for SDXL, with alpha beside each layer.

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
        write_tensors(aside / DIFFUSERS_FILE, _to_diffusers(layers), metadata=_diffusers_metadata(parts))
        write_tensors(
            aside / f"{name}.safetensors", _to_kohya(parts, layers), metadata=_kohya_metadata(parts, name)
        )


def _tensors(parts: Parts, dtype: torch.dtype | None) -> dict[Layer, dict[str, Tensor]]:
    """The trained tensors of each layer by role, and its alpha."""
    found = {}
    for part in (UNET, *ENCODERS):
        for path, layer in _lora_layers(getattr(parts, part) or nn.Module()):
            tensors = {
                "down": layer.lora_A[ADAPTER].weight.to(dtype),
                "up": layer.lora_B[ADAPTER].weight.to(dtype),
                "alpha": torch.tensor(float(layer.lora_alpha[ADAPTER])),
            }
            if layer.use_dora[ADAPTER]:
                tensors["magnitude"] = layer.lora_magnitude_vector[ADAPTER].weight
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise UserError(
                    f"the LoRA of {part}.{path} has NaN or Inf, so nothing is saved: "
                    "train with a lower learning rate"
                )
            found[Layer(part, path)] = tensors
    return found


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
    config, family = _configs(parts)[UNET], family_of_parts(parts)
    version = KOHYA_VERSIONS.get(family, family)
    if family in ("sd1", "sd2") and Schedule.from_config(dict(parts.scheduler)).prediction.value[0] == "v":
        version += "_v"
    return {
        "ss_output_name": name,
        "ss_base_model_version": version,
        "ss_v2": str(family == "sd2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config["r"]),
        "ss_network_alpha": str(config["lora_alpha"]),
    }
