"""The `parameters` text of a picture, in the form that other tools show, write and paste back."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from ldm.diffusion.samplers import SAMPLERS
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
        "Clip skip": None if not request.clip_skip else request.clip_skip + 1,  # there, 1 skips no layer
        "CFG rescale": request.guidance_rescale or None,
        "Denoising strength": request.strength,
        "Eta": request.eta,
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
    head, _, last = text.rstrip().rpartition("\n")
    settings = {key: _unquoted(value) for key, value in _SETTING.findall(last)}
    if "Steps" not in settings:
        head, settings = text, {}
    prompt, _, negative = f"\n{head}".partition("\nNegative prompt:")
    fields: dict[str, Any] = {
        "prompt": prompt.removeprefix("\n"),
        "negative_prompt": negative.strip() or None,
    }
    for key, name in _FIELDS.items():
        if key in settings:
            fields[name] = settings[key]
    if fields.get("spacing") == "Automatic":
        del fields["spacing"]
    if "Seed" in settings:
        fields["seeds"] = (settings["Seed"],)
    if "Size" in settings:
        fields["width"], _, fields["height"] = settings["Size"].partition("x")
    if settings.get("Clip skip", "").isdecimal():
        fields["clip_skip"] = max(0, int(settings["Clip skip"]) - 1)
    return Request(**fields)


_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_FIELDS = {
    "Steps": "num_inference_steps",
    "Sampler": "sampler",
    "Schedule type": "spacing",
    "CFG scale": "guidance_scale",
    "CFG rescale": "guidance_rescale",
    "Eta": "eta",
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
    if text.startswith('"'):
        with contextlib.suppress(ValueError):
            return str(json.loads(text))
    return text.strip()
