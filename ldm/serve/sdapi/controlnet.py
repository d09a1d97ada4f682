"""`/controlnet`: what programs ask sd-webui-controlnet before they send units, and its preprocessors."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body

from ldm.errors import UserError
from ldm.images.opening import open_picture, to_mask
from ldm.preprocess import PREPROCESSORS
from ldm.serve.sdapi.units import (
    AT_ANY_SIZE,
    RESOLUTION,
    RESOLUTIONS,
    SLIDERS,
    encoded,
    keep,
    made,
    module_named,
    options_of,
    resolution_of,
)
from ldm.serve.service import Service

Given = Annotated[dict[str, Any], Body()]
VERSION = 3  # of that API
READS = "ip-adapter-auto"
MODULES = ("none", *(name for name, each in PREPROCESSORS.items() if not each.map), READS)
# Its kinds of control: our preprocessors of each, the first one's default, and what models' names hold.
TYPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Canny": (("canny", "invert"), ("canny",)),
    "Depth": ((), ("depth",)),
    "IP-Adapter": ((READS,), ("ip-adapter", "ip_adapter", "ipadapter")),
    "Inpaint": (("inpaint",), ("inpaint",)),
    "Lineart": (("lineart", "lineart_xdog", "invert"), ("lineart",)),
    "MLSD": (("invert",), ("mlsd",)),
    "NormalMap": ((), ("normal",)),
    "OpenPose": ((), ("openpose", "densepose")),
    "Scribble": (("scribble_xdog", "invert"), ("scribble", "sketch")),
    "Segmentation": ((), ("seg",)),
    "SoftEdge": (("softedge",), ("softedge",)),
    "T2I-Adapter": (("color",), ("t2i_adapter", "t2iadapter", "t2ia")),
    "Tile": (("tile_resample", "blur_gaussian"), ("tile", "blur")),
}


def controlnet_router(service: Service) -> APIRouter:
    """`/controlnet`. Programs take it for the sign that there are ControlNets."""
    router = APIRouter(prefix="/controlnet", tags=["AUTOMATIC1111"])

    @router.get("/version", summary="Of this API")
    def version() -> dict[str, int]:
        return {"version": VERSION}

    @router.get("/model_list", summary="ControlNets and IP-Adapters")
    def model_list() -> dict[str, list[str]]:
        return {"model_list": titles(service)}

    @router.get("/module_list", summary="Preprocessors")
    def module_list() -> dict[str, Any]:
        return {"module_list": list(MODULES), "module_detail": {name: detail(name) for name in MODULES}}

    @router.get("/control_types", summary="Preprocessors and models by what they show")
    def control_types() -> dict[str, Any]:
        return {"control_types": types(titles(service))}

    @router.get("/settings", summary="How many units a drawing may have")
    def settings() -> dict[str, int]:
        return {"control_net_unit_count": service.limits.parts}

    @router.post("/detect", summary="Control pictures of pictures")
    def detect(given: Given) -> dict[str, Any]:
        return {"images": detected(service, given), "info": "Success"}

    return router


def titles(service: Service) -> list[str]:
    """Names of the server's networks, files with the hash that AUTOMATIC1111 puts behind."""
    return [
        f"{name} [{model_hash(path)}]" if path.is_file() else name
        for name, path in service.shelf.networks.items()
    ]


def model_hash(path: Path) -> str:
    """AUTOMATIC1111's old one, of 64 KiB from the first MiB on."""
    with path.open("rb") as file:
        file.seek(2**20)
        return hashlib.sha256(file.read(2**16)).hexdigest()[:8]


def detail(name: str) -> dict[str, Any]:
    """The sliders of a preprocessor, the resolution's first."""
    if name in ("none", READS, *AT_ANY_SIZE):
        return {"model_free": True, "sliders": []}
    low, high = RESOLUTIONS
    sliders = [{"name": "Resolution", "value": RESOLUTION, "min": low, "max": high, "step": 8}]
    options = PREPROCESSORS[name].options
    for option, least, most in SLIDERS.get(name, ()):
        step = 1 if most > 64 else 0.01
        bounds = {"value": options[option].default, "min": least, "max": most, "step": step}
        sliders.append({"name": option.capitalize(), **bounds})
    return {"model_free": True, "sliders": sliders}


def types(models: list[str]) -> dict[str, Any]:
    found = {"All": _type(list(MODULES[1:]), models, "none", "None")}
    for kind, (modules, words) in TYPES.items():
        own = [each for each in models if any(word in each.lower() for word in words)]
        found[kind] = _type([*modules], own, next(iter(modules), "none"), next(iter(own), "None"))
    return found


def _type(modules: list[str], models: list[str], module: str, model: str) -> dict[str, Any]:
    listed = {"module_list": ["none", *modules], "model_list": ["None", *models]}
    return {**listed, "default_option": module, "default_model": model}


def detected(service: Service, given: Mapping[str, Any]) -> list[str]:
    """Base64 PNGs of what a preprocessor makes of pictures. Raises UserError, naming the field."""
    module = module_named(given.get("controlnet_module"))
    images = given.get("controlnet_input_images") or given.get("controlnet_images") or []
    if not isinstance(images, list) or not images:
        raise UserError("controlnet_input_images is not allowed to be empty: give base64 of pictures")
    service.limits.count(len(images), "controlnet_input_images")
    masks = given.get("controlnet_masks") or []
    is_masked = module is not None and PREPROCESSORS[module].masked
    if is_masked and len(masks) != len(images):
        raise UserError(f"controlnet_masks is not allowed so: {module} needs one for each picture")
    options = options_of(
        module or "", given.get("controlnet_threshold_a"), given.get("controlnet_threshold_b")
    )
    resolution = resolution_of(given.get("controlnet_processor_res"))
    found = []
    for k, each in enumerate(images):
        image = open_picture(service.store.folder / keep(service, each, "image"))
        mask = _mask(service, masks[k], image.size) if is_masked else None
        picture = image if module is None else made(image, module, options, resolution, mask)
        found.append(base64.b64encode(encoded(picture)).decode())
    return found


def _mask(service: Service, given: Any, size: tuple[int, int]) -> Any:
    """[H, W] in 0..1, as large as a picture of (width, height)."""
    mask = open_picture(service.store.folder / keep(service, given, "mask"), None, to_mask).resize(size)
    return np.asarray(mask, dtype=np.float32) / np.float32(255)
