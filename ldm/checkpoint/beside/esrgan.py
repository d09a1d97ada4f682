"""Networks that enlarge pictures (ESRGAN and its kin), read by spandrel from safetensors and nothing else."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.io import read_tensors, suffix_of
from ldm.errors import UserError, printable
from ldm.files import check_drawn_with, sha256

# All that spandrel takes from torchvision: for two networks, neither of which enlarges.
_TORCHVISION = {"torchvision.transforms.functional": ("InterpolationMode", "rotate", "normalize")}
_importing = threading.Lock()


@dataclass(frozen=True, eq=False)
class PixelUpscaler:
    """A network that enlarges pictures `scale` times, and which file it was."""

    network: Any  # spandrel's ImageModelDescriptor, fp32
    scale: int
    sha256: str

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] in 0..1 -> [B, 3, scale h, scale w] in 0..1. Raises FloatingPointError."""
        with torch.no_grad():
            large: Tensor = self.network(images.to(self.network.device, torch.float32))
        if not bool(large.isfinite().all()):
            raise FloatingPointError("the upscaler gives NaN or Inf: its weights or its input are damaged")
        return large.to(images)


def read_pixel_upscaler(file: str, device: torch.device, digest: str | None = None) -> PixelUpscaler:
    """The network in a file, fp32 on `device`; the last one is kept for the next drawing.

    Raises:
        UserError: if it is no safetensors file or damaged, if spandrel is not installed or knows no such
            network, if the network does not make colour pictures larger, or the file is not that of `digest`.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{printable(file)}: no such file: give an upscaler's .safetensors file")
    if suffix_of(path) != ".safetensors":
        raise UserError(
            f"{printable(file)}: upscalers are read from .safetensors only: a {path.suffix or 'file'} may "
            "be a pickle, which runs code; get it as safetensors, or convert it where you trust it"
        )
    found = sha256(path)
    check_drawn_with(file, "upscaler", found, digest, "--hires-upscaler")
    return _read(path, found, device)


@lru_cache(maxsize=1)
def _read(path: Path, digest: str, device: torch.device) -> PixelUpscaler:
    tensors, spandrel = read_tensors(path), import_spandrel()
    try:
        network = spandrel.ModelLoader(device=device).load_from_state_dict(tensors)
    except Exception as error:  # each of its networks looks at the tensors in its own way
        raise UserError(
            f"{path}: spandrel knows no upscaler of these tensors ({type(error).__name__})"
        ) from None
    channels = (getattr(network, "input_channels", 0), getattr(network, "output_channels", 0))
    if not isinstance(network, spandrel.ImageModelDescriptor) or network.scale < 2 or channels != (3, 3):
        raise UserError(f"{path}: holds a network that does not make colour pictures larger")
    network.model.float().requires_grad_(False)
    return PixelUpscaler(network.eval(), network.scale, digest)


def import_spandrel() -> Any:
    """spandrel, with or without torchvision. Raises UserError if it is not installed."""
    if importlib.util.find_spec("spandrel") is None:
        raise UserError("upscalers of pixels need spandrel: pip install 'ldm[upscale]'")
    with _importing, _without_torchvision():
        import spandrel
    return spandrel


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """Stand-ins for what is imported of torchvision where that is missing, for the time of an import."""
    if "spandrel" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    made: dict[str, ModuleType] = {}
    for name, members in _TORCHVISION.items():
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            module = ".".join(parts[:k])
            made[module] = ModuleType(module)
            made[module].__spec__ = ModuleSpec(module, None, is_package=k < len(parts))
            made[module].__path__ = []
        for member in members:
            setattr(made[name], member, None)
    sys.modules.update(made)
    try:
        yield
    finally:
        for module in made:
            sys.modules.pop(module, None)
