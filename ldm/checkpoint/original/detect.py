"""The configs of a single file's parts, and how its U-Net predicts.

`families/*.yaml` has the published configs; shapes correct them wherever they tell, so that a file of
another size loads too. What neither tells is guessed, and `Detected.notes` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ldm.checkpoint.original.sections import Single, prefixes
from ldm.checkpoint.original.shapes import shape_of
from ldm.checkpoint.parts import Defaults
from ldm.errors import UserError
from ldm.models.kind import Kind

Config = Mapping[str, Any]

TITLES = {
    Kind.INPAINT: " inpainting",
    Kind.PIX2PIX: " instruct-pix2pix",
    Kind.DEPTH: " depth",
}  # after the family's name
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
OPTIONS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "max_noise_level")
OWN = "ldm.config"  # the key in the header under which we write what a folder has beside tensors


@dataclass(frozen=True)
class Detected:
    """What a single file is."""

    title: str  # for people
    configs: Mapping[str, Config]  # by part, schedulers and tokenizers among them
    defaults: Defaults
    options: Mapping[str, Any]  # those of OPTIONS that the family has
    words: frozenset[str]
    notes: tuple[str, ...]  # what was guessed


def detect(file: Single, given: Mapping[str, Any], prediction_type: str | None = None) -> Detected:
    """What is in a single file.

    Args:
        given: what is known: whole configs by part, "options", "defaults", "words". Believed over shapes.
        prediction_type: "epsilon" or "v_prediction", believed over all else.

    Raises:
        UserError: naming the tensor that is missing, or the number of input channels that no family has.
    """
    base = family_configs(file.family)
    configs = {part: _config(file, part, base[part], given.get(part, {})) for part in prefixes(file.family)}
    for name in ("tokenizer", "tokenizer_2", "low_res_scheduler"):
        if name in base:
            configs[name] = dict(given.get(name) or base[name])
    unet = configs["unet"]
    channels = unet.setdefault("in_channels", 4)  # as in diffusers
    kind = _kind(channels, configs["vae"].get("latent_channels", 4))
    usual = _kind(base["unet"]["in_channels"], base["vae"].get("latent_channels", 4))
    if channels != base["unet"]["in_channels"] and kind not in {usual, *TITLES}:
        raise UserError(f"{file.path}: no model that can be read has {channels!r} input channels")
    configs["scheduler"], notes = _scheduler(file, unet, kind, given.get("scheduler", {}), prediction_type)
    if file.family == "sd2" and configs["scheduler"]["prediction_type"] == "epsilon" and "unet" not in given:
        unet["sample_size"] = 64  # SD 2 base draws 512 x 512 pixels
    defaults = Defaults(**given.get("defaults", {}))
    if not given.get("scheduler") and (few := _few_steps(file)):
        configs["scheduler"] |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
        defaults = Defaults(num_inference_steps=4, guidance_scale=1.0)
        if few == "Turbo":
            unet["sample_size"] = 64  # both draw 512 x 512 pixels
        notes.append(f"by its name a {few} model: 4 steps with trailing spacing, no guidance")
    options = {key: base[key] for key in OPTIONS if key in base} | given.get("options", {})
    title = " LCM" if unet.get("time_cond_proj_dim") else TITLES.get(kind, "") if kind else ""
    return Detected(
        base["name"] + title, configs, defaults, options, frozenset(given.get("words", ())), tuple(notes)
    )


def _kind(in_channels: Any, latent_channels: int) -> Kind | None:
    try:
        return Kind.of(in_channels, latent_channels)
    except (TypeError, ValueError):
        return None


@cache
def family_configs(family: str) -> dict[str, Any]:
    """The published configs of a family."""
    import yaml

    path = Path(__file__).parent / "families" / f"{family}.yaml"
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def own_configs(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What we wrote into the file's header beside its tensors; {} in other files. Raises UserError."""
    try:
        value = json.loads(metadata.get(OWN, "{}"))
    except ValueError:
        value = None
    if not isinstance(value, dict) or not _is_ours(value):
        raise UserError(f"{path}: the header's {OWN} is damaged; convert the model again")
    return value


def _is_ours(value: Mapping[str, Any]) -> bool:
    """Whether it holds what we write and nothing else, as far as the configs' own readers do not see it."""
    defaults, options, words = (value.get(name, {}) for name in ("defaults", "options", "words"))
    return (
        all(isinstance(value[name], list if name == "words" else dict) for name in value)
        and all(isinstance(word, str) for word in words)
        and defaults.keys() <= {each.name for each in fields(Defaults)}
        and options.keys() <= {*OPTIONS}
        and all(isinstance(each, int) for each in options.values())
    )


def _config(file: Single, part: str, base: Config, given: Config) -> dict[str, Any]:
    if given or part not in file.sections:
        return dict(given or base)
    try:
        return {**base, **shape_of(part, file.sections[part], base)}
    except KeyError as error:
        name = prefixes(file.family)[part] + str(error.args[0])
        raise UserError(f"{file.path}: tensor {name} is missing; is the file complete?") from None
    except IndexError:
        raise UserError(f"{file.path}: tensors of its {part} have shapes of no such model") from None


# --- how the U-Net predicts ------------------------------------------------------------------------------


def _scheduler(
    file: Single, unet: Config, kind: Kind | None, given: Config, asked: str | None
) -> tuple[dict[str, Any], list[str]]:
    """scheduler_config.json, and what was guessed for it."""
    config, notes = dict(given or family_configs(file.family)["scheduler"]), []
    if not given and unet.get("time_cond_proj_dim"):
        config |= {"_class_name": "LCMScheduler", "original_inference_steps": 50, "set_alpha_to_one": True}
        config["steps_offset"] = 0
    elif not given and kind is Kind.PIX2PIX:
        config["_class_name"] = "EulerAncestralDiscreteScheduler"
    prediction = asked or _stated(file) or given.get("prediction_type")
    if prediction is None:
        prediction, note = _guessed(file, kind)
        notes.append(note)
    config["prediction_type"] = prediction
    if "ztsnr" in file.loose or file.metadata.get("ss_zero_terminal_snr") == "True":
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if config["_class_name"] == "PNDMScheduler":  # in diffusers it has no such schedule
            config["_class_name"] = "DDIMScheduler"
    return config, notes


def _stated(file: Single) -> str | None:
    """The prediction type by the mark that NoobAI XL began, or by Stability's ModelSpec."""
    if "v_pred" in file.loose:
        return "v_prediction"
    prediction = PREDICTIONS.get(file.metadata.get("modelspec.prediction_type", ""))
    return prediction or ARCHITECTURES.get(file.metadata.get("modelspec.architecture", ""))


def _guessed(file: Single, kind: Kind | None) -> tuple[str, str]:
    """The likely prediction type, and what to say of it.

    SD 2 base and SD 2 for 768 pixels have the same tensors. ComfyUI tells them apart by one bias, which
    spreads wider in the v-models; nobody has said why, so it is a guess as well. Without it, 768 is what most
    files are.
    """
    guess, why = family_configs(file.family)["prediction_type"], "as in nearly all such files"
    if file.family == "sd2":
        bias = file.sections.get("unet", {}).get("output_blocks.11.1.transformer_blocks.0.norm1.bias")
        if kind is not Kind.TEXT:
            guess = "epsilon"
        elif bias is not None:
            guess = "v_prediction" if bias.float().std(unbiased=False) > 0.09 else "epsilon"
            why = "from the spread of one bias"
    other = "epsilon" if guess == "v_prediction" else "v_prediction"
    return guess, (
        f"the prediction type is not in the file: {guess} is assumed, {why} "
        f"(say --prediction-type {other} if pictures come out as noise)"
    )


def _few_steps(file: Single) -> str | None:
    """Turbo and Lightning models have the tensors of others: only a name can tell."""
    name = f"{file.path.stem} {file.metadata.get('modelspec.title', '')}".lower()
    return next((word.capitalize() for word in ("turbo", "lightning") if word in name), None)
