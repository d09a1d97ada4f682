"""Pictures in and out: tensors and PIL images, PNG files that carry their own request, grids.

A PNG gets two text chunks: `parameters`, in the form that other tools read, and `ldm`, the whole `Request`
as JSON, from which the picture can be drawn again. Files appear complete or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import __version__
from ldm.errors import UserError
from ldm.request import Request
from ldm.solvers import SAMPLERS
from ldm.tags import write_tag

CHUNK = "ldm"
GRID_GAP = 2  # pixels


# --- tensors and images ----------------------------------------------------------------------------------


def to_numpy(images: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[B, 3, H, W] in 0..1 -> float32 [B, H, W, 3] in 0..1. Raises ValueError on NaN and Inf."""
    array: np.ndarray[Any, np.dtype[np.float32]] = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    if not np.isfinite(array).all():
        raise ValueError("the picture holds NaN or Inf, and is not written")
    return array.clip(0, 1)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in 0..1 -> B RGB images, rounded to the nearest of 256 levels, as diffusers does."""
    return [Image.fromarray(array) for array in (to_numpy(images) * 255).round().astype(np.uint8)]


def to_tensor(images: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
    """One or several images of one size -> float32 [B, 3, H, W] in 0..1; alpha is dropped."""
    images = [images] if isinstance(images, Image.Image) else images
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size, side by side, `columns` in each row, with a narrow black gap."""
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    width, height = (side + GRID_GAP for side in images[0].size)
    sheet = Image.new("RGB", (columns * width + GRID_GAP, rows * height + GRID_GAP))
    for k, image in enumerate(images):
        sheet.paste(image, (GRID_GAP + k % columns * width, GRID_GAP + k // columns * height))
    return sheet


# --- the `parameters` text -------------------------------------------------------------------------------


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


# --- files -----------------------------------------------------------------------------------------------


def save_png(image: Image.Image, path: Path, request: Request | None = None) -> Path:
    """Write `path`, replacing what is there, with the request in its text chunks. Raises UserError."""
    with _complete_file(image, path.parent, request) as temporary, _told(path):
        os.replace(temporary, path)
    return path


def save_numbered(image: Image.Image, folder: Path, name: str, request: Request | None = None) -> Path:
    """Write the first free of `name % 0`, `name % 1`, ... after the highest in `folder`, never over another.

    Several processes may write to one folder: each number goes to one of them. Raises UserError.
    """
    with _complete_file(image, folder, request) as temporary, _told(folder):
        number = _next_number(folder, name)
        while not _rename_new(temporary, folder / (name % number)):
            number += 1
    return folder / (name % number)


def read_request(path: str | Path) -> Request:
    """The request of a picture: our own chunk, else the `parameters` text. Raises UserError."""
    chunks = _text_chunks(Path(path))
    if CHUNK in chunks:
        return Request.from_json(chunks[CHUNK])
    if "parameters" in chunks:
        return parse_parameters(chunks["parameters"])
    raise UserError(f"{path} does not say how it was drawn: it has no '{CHUNK}' or 'parameters' text chunk")


def open_image(path: str | Path) -> Image.Image:
    """A picture from a file, decoded, in RGB. Raises UserError."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read the picture {path}: {_reason(error)}") from None


def check_writable(folder: Path) -> None:
    """Raise UserError if no file can be made in `folder` (or the folder itself); leave nothing behind."""
    absent = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    with _told(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        finally:
            for parent in absent:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _text_chunks(path: Path) -> dict[str, str]:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return {str(key): str(value) for key, value in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read {path} as a PNG picture: {_reason(error)}") from None


@contextlib.contextmanager
def _complete_file(image: Image.Image, folder: Path, request: Request | None) -> Iterator[Path]:
    """A finished PNG under a temporary name in `folder`; whatever happens, no such name stays."""
    chunks = PngInfo()
    if request is not None:
        chunks.add_text("parameters", format_parameters(request))
        chunks.add_text(CHUNK, request.to_json())
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".ldm-", suffix=".tmp", dir=folder)
    temporary = Path(name)
    try:
        with _told(folder), os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG", pnginfo=chunks)
            os.fchmod(handle, 0o666 & ~_umask()) if hasattr(os, "fchmod") else None
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _next_number(folder: Path, name: str) -> int:
    shape = re.compile(re.sub(r"%0\d+d", r"(\\d+)", re.escape(name).replace(r"\%", "%")))
    found = (shape.fullmatch(path.name) for path in folder.iterdir())
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _rename_new(temporary: Path, path: Path) -> bool:
    """Give the file its name unless that is taken; True if it was free."""
    link: Callable[[Path, Path], None] = os.link  # unlike rename, it refuses an existing name
    try:
        link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.rename(temporary, path)
    return True


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]
