"""The `parameters` text of a picture, in the form that other tools show, write and paste back."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ldm.diffusion.samplers import SAMPLERS
from ldm.images.enlarging import LABELS, enlarger_name
from ldm.prompts.tags import write_tag
from ldm.request import Request
from ldm.version import __version__


def format_parameters(request: Request) -> str:
    """The text that other tools show and paste back: prompt, negative prompt, one line of settings.

    A value holding a comma, colon or newline is JSON-quoted. Fields that are None are left out.
    """
    grid_given = request.timesteps or request.sigmas
    values = {
        "Steps": len(grid_given) if grid_given else request.num_inference_steps,
        "Sampler": request.sampler and SAMPLERS[request.sampler].label,
        "Schedule type": request.spacing and _spacing_label(request.spacing),
        "CFG scale": request.guidance_scale,
        "Seed": request.seeds[0],
        "Size": f"{request.width}x{request.height}" if request.width and request.height else None,
        "Model hash": request.model_hash,
        "Model": request.model,
        "Hires upscaler": request.upscaling.model if request.upscaling else None,
        **_more_pixels(request),
        "Variation seed": request.variation_seed,
        "Variation seed strength": request.variation_strength,
        "Seed resize from": "x".join(map(str, request.seed_resize[::-1])) if request.seed_resize else None,
        "ENSD": request.noise_seed_delta,
        "RNG": "NV" if request.noise == "gpu" else "CPU",
        "Clip skip": None if not request.clip_skip else request.clip_skip + 1,  # there, 1 skips no layer
        "CFG rescale": request.guidance_rescale or None,
        "Guidance method": request.guidance,
        "Denoising strength": request.hires.strength if request.hires else request.strength,
        "Target prompt": request.target_prompt,
        "Eta": request.eta,
        "Prompt grammar": None if request.prompt_grammar == "a1111" else request.prompt_grammar,
        "Version": f"ldm {__version__}",
    }
    settings = ", ".join(f"{key}: {_quoted(value)}" for key, value in values.items() if value is not None)
    negative = f"Negative prompt: {request.negative_prompt}\n" if request.negative_prompt else ""
    tags = "".join(f" {write_tag(use.name, use.weight, use.text_weight)}" for use in request.loras or ())
    return f"{request.prompt}{tags}\n{negative}{settings}"


def parse_parameters(text: str) -> Request:
    """The request that a `parameters` text describes, written by `ldm` or by any other tool.

    Settings that `ldm` does not know are passed over. Raises UserError on values it cannot draw with.
    """
    prompt, negative, found = split_parameters(text)
    settings = dict(reversed(found))  # of a key, the first counts: what others add comes later
    fields: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    for key, name in _FIELDS.items():
        if key in settings:
            fields[name] = settings[key]
    if fields.get("spacing") == "Automatic":
        del fields["spacing"]
    if "Seed" in settings:
        fields["seeds"] = (settings["Seed"],)
    if "Size" in settings:
        fields["width"], _, fields["height"] = settings["Size"].partition("x")
    fields |= _read_more_pixels(settings)
    if "Seed resize from" in settings:
        width, _, height = settings["Seed resize from"].partition("x")
        fields["seed_resize"] = (height, width) if width.isdecimal() and height.isdecimal() else None
    if fields.get("variation_strength") is None:
        fields.pop("variation_seed", None)
    # AUTOMATIC1111 and Forge write "v1.10.1" and "f2.0": CUDA's noise, unless they say so.
    drawn_by = "NV" if re.match(r"[vf]\d", settings.get("Version", "")) else "CPU"
    fields["noise"] = "gpu" if settings.get("RNG", drawn_by) in ("NV", "GPU") else None
    if "Clip skip" in settings:
        skipped = settings["Clip skip"]
        fields["clip_skip"] = max(0, int(skipped) - 1) if re.fullmatch(r"\d{1,4}", skipped) else skipped
    return Request(**fields)


def _more_pixels(request: Request) -> dict[str, Any]:
    """Settings of a second pass, a refiner and seamless pictures, as A1111 has them.

    Its steps of the second pass are those that are drawn: ours are of the grid that its strength cuts.
    """
    values: dict[str, Any] = {"Tiling": True if request.tiling == "xy" else request.tiling}
    if request.refining is not None:
        values |= {"Refiner": request.refining.model, "Refiner switch at": request.refiner_switch_at}
    if (hires := request.hires) is None:
        return values
    sampler, name, scale = hires.sampler, request.hires_upscaler or "latent", request.hires_scale
    return values | {
        "Hires upscale": scale,
        "Hires resize": None if scale else f"{hires.width}x{hires.height}",
        "Hires steps": hires.num_steps or None,
        "Hires upscaler": LABELS.get(name, name),
        "Hires sampler": SAMPLERS[sampler].label if sampler not in (None, request.sampler) else None,
        "Hires prompt": hires.prompt or None,
    }


def _read_more_pixels(settings: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a Request of the same settings, but for a refiner, which is another model."""
    fields: dict[str, Any] = {}
    if "Tiling" in settings:
        tiling = settings["Tiling"]
        fields["tiling"] = {"true": "xy", "false": None}.get(tiling.lower(), tiling)
    if not {"Hires upscale", "Hires resize"} & settings.keys():
        return fields
    width, _, height = settings.get("Hires resize", "").partition("x")
    strength, same = settings.get("Denoising strength", "0.7"), ("Use same sampler", "")
    names = {"prompt": "Hires prompt", "sampler": "Hires sampler"}
    hires = {name: settings[key] for name, key in names.items() if settings.get(key, "") not in same}
    steps = settings.get("Hires steps", "0")
    steps = settings.get("Steps", "0") if steps == "0" else steps
    with contextlib.suppress(ValueError, ZeroDivisionError):
        hires["num_inference_steps"] = str(math.ceil(round(int(steps) / float(strength), 6)))
    hires |= {"strength": strength} | ({"height": height, "width": width} if height else {})
    upscaler = settings.get("Hires upscaler")
    return fields | {
        "hires_scale": settings.get("Hires upscale"),
        "hires_upscaler": upscaler and (enlarger_name(upscaler) or upscaler),
        "hires": Request(**hires),
    }


def split_parameters(text: str) -> tuple[str, str | None, list[tuple[str, str]]]:
    """Prompt, negative prompt and settings as written, whether `ldm` could draw them or not.

    Settings are (key, value); a piece without a key has "". They reach from a line that begins with
    "Steps: 20" to the end, maybe over several lines: some tools wrap them, or add lines of their own. A text
    without them is all prompt. Takes any text, in linear time.
    """
    text = text.replace("\r\n", "\n")
    start, settings = _find_settings(text.rstrip())
    head = text if not settings else text[:start].removesuffix("\n")
    prompt, _, negative = f"\n{head}".partition("\nNegative prompt:")
    return prompt.removeprefix("\n"), negative.strip() or None, settings


def _find_settings(text: str) -> tuple[int, list[tuple[str, str]]]:
    """Where the settings begin, and what they are; none if the text has no line of them."""
    found = _FIRST.search(text)
    while found is not None:
        settings, again = _scan(text, found.start())
        if again is None:
            return found.start(), settings
        found = _FIRST.search(text, again)
    # In another order of settings, the last line has them all.
    last = text.rfind("\n") + 1
    settings, _ = _scan(text, last)
    return last, settings if any(key == "Steps" and value for key, value in settings) else []


def _scan(text: str, position: int) -> tuple[list[tuple[str, str]], int | None]:
    """The settings from `position` to the end; or where a line shows that they only begin later."""
    settings, first = list[tuple[str, str]](), position
    while position < len(text):
        if position > first and text[position - 1] == "\n" and _LATER.match(text, position):
            return settings, position
        key = _KEY.match(text, position)
        position = position if key is None else key.end()
        quoted = _QUOTED.match(text, position) if key else None
        found = quoted or _PLAIN.match(text, position)
        assert found is not None  # it matches nothing, too
        value = _unquoted(found[0]) if quoted else found[0].strip()
        if key or value:
            settings.append((key[1].rstrip() if key else "", value))
        position = found.end() + 1
    return settings, None


# Possessive (*+): what was read once is not read again.
_FIRST = re.compile(r"^Steps:[ \t]*+\d++[ \t]*+(?:,|$)", re.MULTILINE)
_LATER = re.compile(r"Steps:[ \t]*+\d++[ \t]*+(?:[,\n]|\Z)|Negative prompt:")
_KEY = re.compile(r'[ \t]*+(\w[^,:"\n]*+):[ \t]*+')
_QUOTED = re.compile(r'"(?:\\.|[^\\"])*+"[ \t]*+(?=[,\n]|\Z)', re.DOTALL)
_PLAIN = re.compile(r"[^,\n]*+")
_FIELDS = {
    "Steps": "num_inference_steps",
    "Sampler": "sampler",
    "Schedule type": "spacing",
    "CFG scale": "guidance_scale",
    "CFG rescale": "guidance_rescale",
    "Guidance method": "guidance",
    "Eta": "eta",
    "Prompt grammar": "prompt_grammar",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
    "ENSD": "noise_seed_delta",
    "Model": "model",
    "Model hash": "model_hash",
}
_SPACING_LABELS = {"ays": "Align Your Steps", "sgm_uniform": "SGM Uniform", "lcm": "LCM"}


def _spacing_label(spacing: str) -> str:
    return _SPACING_LABELS.get(spacing, spacing.capitalize())


def _quoted(value: str | float) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _unquoted(text: str) -> str:
    with contextlib.suppress(ValueError):
        return str(json.loads(text, strict=False))  # others leave newlines as they are
    return text.strip()
