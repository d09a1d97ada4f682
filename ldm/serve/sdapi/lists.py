"""What AUTOMATIC1111's programs ask first: samplers, models, options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ldm.diffusion.samplers import SAMPLERS, SPACINGS
from ldm.images.enlarging import LABELS, LATENT
from ldm.serve.models import WITH
from ldm.serve.service import Service
from ldm.spelling import squash

NO_VAE = ("Automatic", "None", "", None)
OPTIONS: dict[str, Any] = {
    "sd_vae": "Automatic",
    "CLIP_stop_at_last_layers": 1,
    "eta_noise_seed_delta": 0,
    "samples_format": "png",
    "randn_source": "CPU",
    "samples_save": True,
}
CHANGED = ("sd_model_checkpoint", "sd_vae", "CLIP_stop_at_last_layers", "eta_noise_seed_delta")


def samplers() -> list[dict[str, Any]]:
    return [
        {"name": each.label, "aliases": [each.name, *each.aliases], "options": {}}
        for each in SAMPLERS.values()
    ]


def schedulers() -> list[dict[str, Any]]:
    names = ["automatic", *SPACINGS]
    empty = {"aliases": None, "default_rho": -1, "need_inner_model": False}
    return [{"name": name, "label": name.replace("_", " ").title(), **empty} for name in names]


def models(service: Service) -> list[dict[str, Any]]:
    """Names alone: where they lie is nobody's business."""
    empty = {"hash": None, "sha256": None, "config": None}
    return [
        {"title": name, "model_name": name, "filename": f"{name}.safetensors", **empty}
        for name in service.shelf.places
    ]


def loras(service: Service) -> list[dict[str, Any]]:
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in service.shelf.loras]


def vaes(service: Service) -> list[dict[str, Any]]:
    return [{"model_name": name, "filename": f"{name}.safetensors"} for name in service.shelf.vaes]


def scripts(service: Service) -> dict[str, list[str]]:
    """Programs look here for ControlNet, by the names of its two scripts."""
    found = [] if service.shelf.control_dir is None else ["controlnet", "controlnet m2m"]
    return {"txt2img": found, "img2img": found}


def styles(service: Service) -> list[dict[str, Any]]:
    return [
        {"name": name, "prompt": style.prompt, "negative_prompt": style.negative_prompt}
        for name, style in service.styles.items()
    ]


def model_named(service: Service, options: Mapping[str, Any]) -> str:
    """The server's name of the model and VAE of some options, which programs write in any capitals, with a
    file's suffix or the hash that a title may end in. Raises UserError.
    """
    shelf, vae = service.shelf, options.get("sd_vae")
    model = _meant(options.get("sd_model_checkpoint") or None, shelf.places)
    return shelf.name_of(model, None if vae in NO_VAE else _meant(vae, shelf.vaes))


def _meant(asked: Any, names: Iterable[str]) -> str | None:
    if asked is None:
        return None
    plain = str(asked).partition(" [")[0].removesuffix(".safetensors")
    return {squash(name): name for name in names}.get(squash(plain), plain)


def upscalers() -> list[dict[str, Any]]:
    empty = {"model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
    pixels = [label for name, label in LABELS.items() if name not in LATENT]
    return [{"name": name, **empty} for name in ("None", *pixels)]


def latent_upscale_modes() -> list[dict[str, Any]]:
    return [{"name": LABELS[name]} for name in LATENT]


def changed_options(service: Service, options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options with those given; most are taken and mean nothing here. Raises UserError."""
    changes = {name: given[name] for name in CHANGED if name in given}
    changed = {**options, **changes}
    model, _, vae = model_named(service, changed).partition(WITH)
    return {**changed, "sd_model_checkpoint": model, "sd_vae": vae or "Automatic"}
