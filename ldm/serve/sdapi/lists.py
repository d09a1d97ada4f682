"""What AUTOMATIC1111's programs ask first: samplers, models, options."""

from __future__ import annotations

from typing import Any

from ldm.diffusion.samplers import SAMPLERS, SPACINGS
from ldm.errors import UserError
from ldm.images.enlarging import LABELS, LATENT
from ldm.request.fields import short
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
CHANGED = ("sd_model_checkpoint", "CLIP_stop_at_last_layers", "eta_noise_seed_delta")


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


def upscalers() -> list[dict[str, Any]]:
    empty = {"model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
    pixels = [label for name, label in LABELS.items() if name not in LATENT]
    return [{"name": name, **empty} for name in ("None", *pixels)]


def latent_upscale_modes() -> list[dict[str, Any]]:
    return [{"name": LABELS[name]} for name in LATENT]


def changed_options(service: Service, options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options with those given; most are taken and mean nothing here. Raises UserError."""
    if given.get("sd_vae", "None") not in NO_VAE:
        raise UserError(
            f"sd_vae {short(given['sd_vae'])} is not allowed: the server was started with its VAE"
        )
    asked = given.get("sd_model_checkpoint")
    changes = {name: given[name] for name in CHANGED if name in given}
    if asked:
        # As programs do, in any capitals, and with the hash that a title may end in.
        names = {squash(name): name for name in service.shelf.places}
        plain = str(asked).partition(" [")[0].removesuffix(".safetensors")
        changes["sd_model_checkpoint"] = service.shelf.name_of(names.get(squash(plain), plain))
    return {**options, **changes}
