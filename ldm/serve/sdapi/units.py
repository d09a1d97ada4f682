"""Units of sd-webui-controlnet, as AUTOMATIC1111's programs send them, read as controls and image prompts.

Names, defaults and bounds are those of its `ControlNetUnit` (internal_controlnet/args.py) and of the API
before, with their other spellings. Where its way with a picture has no equal in a `ControlUse` (a
preprocessor at another resolution than what is drawn, "Resize and Fill"), the picture is made here and kept
as an upload.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.images.opening import open_picture
from ldm.preprocess import find, preprocess
from ldm.request.fields import short
from ldm.serve.service import Service
from ldm.serve.uploads import decode_base64
from ldm.spelling import squash

IP_ADAPTER = "ip-adapter"
RESOLUTION, RESOLUTIONS = 512, (64, 2048)  # processor_res: what stands for another, and what is taken
# threshold_a, threshold_b by preprocessor: which option each is, and what is taken; else its default.
SLIDERS: Mapping[str, tuple[tuple[str, float, float], ...]] = {
    "canny": (("low", 1, 255), ("high", 1, 255)),
    "scribble_xdog": (("threshold", 1, 64),),
    "blur_gaussian": (("sigma", 0.1, 64),),
    "tile_resample": (("rate", 1, 8),),
}
MOST = 2**24  # pixels that a preprocessor sees
AT_ANY_SIZE = ("invert", "inpaint")  # which look at no neighbours
SPELLINGS = {
    "input_image": "image",
    "mask_image": "mask",
    "guidance": "guidance_end",
    "guessmode": "control_mode",
    "guess_mode": "control_mode",
}
RESIZE = {
    **dict.fromkeys(("0", "justresize", "resize"), "stretch"),
    **dict.fromkeys(("1", "cropandresize", "innerfitscaletofit", "scaletofitinnerfit"), "crop"),
    **dict.fromkeys(("2", "resizeandfill", "outerfitshrinktofit", "envelopeouterfit"), "fill"),
}
KINDS = {
    "softedge": "scribble",
    "hardedge": "canny",
    "normalmap": "normal",
    "segmentation": "segment",
    "unknown": None,
}  # union_control_type; the others are ours
CANNOT = ("advanced_weighting", "ipadapter_input", "loopback", "batch_images", "animatediff_batch")
BOTH = ("both", "hiresfixoptionboth", "none", "0")  # hr_option: in both passes


def units_in(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The enabled units of txt2img or img2img, with today's names of their fields. Raises UserError."""
    scripts = given.get("alwayson_scripts")
    found: Any = []
    for name, script in scripts.items() if isinstance(scripts, dict) else ():
        if name.lower() == "controlnet" and script:
            found = script.get("args") or [] if isinstance(script, dict) else script
    if not isinstance(found, list):
        raise UserError("controlnet is not allowed so: args must be a list of units")
    units = [_named(each) for each in found if isinstance(each, dict)]
    return [each for each in units if each.get("enabled", True)]


def _named(unit: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {SPELLINGS.get(name, name): value for name, value in unit.items() if value is not None}
    if isinstance(renamed.get("control_mode"), bool):  # guess mode, before there were three
        renamed["control_mode"] = 2 if renamed["control_mode"] else 0
    return renamed


def fields_of_units(
    service: Service, given: Mapping[str, Any], size: tuple[int, int], has_second_pass: bool
) -> dict[str, Any]:
    """`control` and `image_prompts` of a drawing of (height, width). Raises UserError, naming the field."""
    controls, prompts = [], []
    for unit in units_in(given):
        for name in CANNOT:
            if unit.get(name):
                raise UserError(f"controlnet {name} is not allowed: this server cannot do that")
        if has_second_pass and squash(str(unit.get("hr_option", "Both"))) not in BOTH:
            raise UserError("controlnet hr_option is not allowed: here a unit acts in both passes")
        if str(unit.get("module", "none")).lower().startswith(IP_ADAPTER):
            prompts.append(_image_prompt(service, unit))
        else:
            controls.append(_control(service, unit, size))
    named = {"control": controls, "image_prompts": prompts}
    return {name: uses for name, uses in named.items() if uses}


def _control(service: Service, unit: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The fields of a `ControlUse`."""
    use: dict[str, Any] = {"model": network_named(service, unit.get("model"))}
    names = {"weight": "scale", "guidance_start": "start", "guidance_end": "end", "control_mode": "mode"}
    use |= {ours: unit[theirs] for theirs, ours in names.items() if theirs in unit}
    kind = str(unit.get("union_control_type", "Unknown"))
    use["type"] = KINDS.get(squash(kind), kind.lower())
    if unit.get("effective_region_mask"):
        use["mask"] = keep(service, unit["effective_region_mask"], "effective_region_mask")
    mode = RESIZE.get(squash(str(unit.get("resize_mode", 1))))
    if mode is None:
        raise UserError(f"controlnet resize_mode {short(unit['resize_mode'])} is not allowed: 0, 1 or 2")
    use["resize"] = "stretch" if mode == "stretch" else "crop"
    module, options = module_named(unit.get("module")), {}
    if module is not None:
        options = options_of(module, unit.get("threshold_a"), unit.get("threshold_b"))
        use["preprocess"] = ":".join([module, *(f"{name}={value:g}" for name, value in options.items())])
    shown = _shown(service, unit)
    if len(shown) > 1:
        raise UserError("controlnet image is not allowed to be several: only IP-Adapters read more than one")
    for each in shown:  # without one, the picture that is drawn on
        use |= _ready(service, unit, each, (module, options), size, mode == "fill")
    return use


def _ready(
    service: Service,
    unit: Mapping[str, Any],
    place: str,
    making: tuple[str | None, Mapping[str, float]],
    size: tuple[int, int],
    fills: bool,
) -> dict[str, Any]:
    """The picture of a control: as it was given, or made here where ours would be made in another way."""
    module, options = making
    image = open_picture(service.store.folder / place)
    fills = fills and image.width * size[0] != image.height * size[1]
    own = None if unit.get("pixel_perfect") else resolution_of(unit.get("processor_res"))
    is_other = module not in (None, *AT_ANY_SIZE) and own not in (None, min(size))
    if module == "inpaint" or not (fills or is_other):
        return {"image": place}
    if module is not None:
        image = made(image, module, options, own or _fitting(image, size, fills))
    image = filled(image, size) if fills else image
    return {"image": f"uploads/{service.uploads.put(encoded(image))}", "preprocess": None}


def _image_prompt(service: Service, unit: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `ImagePromptUse`."""
    if (unit.get("guidance_start") or 0, unit.get("guidance_end", 1)) != (0, 1):
        raise UserError("controlnet guidance_start and guidance_end are not allowed with an IP-Adapter here")
    shown = _shown(service, unit)
    if not shown:
        raise UserError("controlnet image is not allowed to be absent: an IP-Adapter reads a picture")
    use: dict[str, Any] = {"adapter": network_named(service, unit.get("model"))}
    use["scale"] = unit.get("weight", 1.0)
    use["images"] = shown
    if unit.get("effective_region_mask"):
        use["masks"] = [keep(service, unit["effective_region_mask"], "effective_region_mask")]
    return use


def network_named(service: Service, asked: Any) -> str:
    """The server's name of what a unit calls its model: any capitals, a suffix, a hash. Raises UserError."""
    plain = str(asked or "None").partition(" [")[0].removesuffix(".safetensors")
    if plain == "None":
        raise UserError("controlnet model None is not allowed: a unit needs one of /controlnet/model_list")
    names = service.shelf.networks
    found = {squash(name): name for name in names}.get(squash(plain))
    if found is None:
        raise UserError(
            f"controlnet model {short(plain)} is not allowed: the server has {', '.join(names) or 'none'}"
        )
    return found


def module_named(asked: Any) -> str | None:
    """Our name of a preprocessor, None for none. Raises UserError, which says what comes near."""
    plain = str(asked or "none").partition(" (")[0]  # "invert (from white bg & black line)"
    return None if plain.lower() == "none" else find(plain).name


def options_of(module: str, a: Any = None, b: Any = None) -> dict[str, float]:
    """What the two thresholds of a unit mean: what is beyond the bounds is the default, as there."""
    given = zip(SLIDERS.get(module, ()), (a, b), strict=False)
    found = {
        name: float(value)
        for (name, low, high), value in given
        if isinstance(value, int | float) and low <= value <= high
    }
    if module == "canny":  # OpenCV exchanges thresholds that are the wrong way round
        usual = {name: float(option.default) for name, option in find(module).options.items()}
        both = {**usual, **found}
        if both["low"] > both["high"]:
            return {"low": both["high"], "high": both["low"]}
    return found


def resolution_of(asked: Any) -> int:
    """processor_res, which is 512 where it is not said or beyond the bounds."""
    low, high = RESOLUTIONS
    return int(asked) if isinstance(asked, int | float) and low <= asked <= high else RESOLUTION


# --- pictures --------------------------------------------------------------------------------------------


def made(
    image: Image.Image, module: str, options: Mapping[str, Any], resolution: int, mask: Any = None
) -> Image.Image:
    """What a preprocessor makes of a picture whose shorter side is first made `resolution` pixels.

    Raises UserError where that would be too many, of a long and thin one.
    """
    if module not in AT_ANY_SIZE:
        scale = resolution / min(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        if width * height > MOST:
            raise UserError(f"controlnet processor_res is not allowed: of {width} x {height} pixels")
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return Image.fromarray(preprocess(np.asarray(image.convert("RGB")), module, mask=mask, **options))


def filled(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """All of a picture in the middle of (height, width), the median of its border around it."""
    height, width = size
    scale = min(height / image.height, width / image.width)
    inside = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    small = image.resize(inside, Image.Resampling.LANCZOS)
    pixels = np.asarray(image.convert("RGB"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    whole = Image.new("RGB", (width, height), tuple(np.median(border, axis=0).astype(int).tolist()))
    whole.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
    return whole


def encoded(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def _fitting(image: Image.Image, size: tuple[int, int], is_filled: bool) -> int:
    """Pixels of the shorter side of what covers (height, width), or lies within: "pixel perfect"."""
    scales = size[0] / image.height, size[1] / image.width
    return round((min if is_filled else max)(scales) * min(image.size))


def _shown(service: Service, unit: Mapping[str, Any]) -> list[str]:
    """Where the store has the pictures of a unit, in all ways that they are given. Raises UserError."""
    image, mask = unit.get("image") or None, unit.get("mask") or None
    if isinstance(image, list) and len(image) == 2 and all(isinstance(each, str) for each in image):
        image, mask = image  # [image, mask]
    several: Sequence[Any] = image if isinstance(image, list) else [image] if image else []
    found = [each if isinstance(each, dict) else {"image": each} for each in several]
    if mask or any(each.get("mask") for each in found):
        raise UserError(
            "controlnet mask is not allowed here: effective_region_mask says where a unit acts, the mask of "
            "img2img what is inpainted"
        )
    return [keep(service, each.get("image"), "image") for each in found]


def keep(service: Service, value: Any, name: str) -> str:
    """Where the store has a picture that is given as base64. Raises UserError."""
    what = f"controlnet {name}"
    if not isinstance(value, str):
        raise UserError(f"{what} is not allowed so: it must be base64 of a picture")
    return f"uploads/{service.uploads.put(decode_base64(value, what), what)}"
