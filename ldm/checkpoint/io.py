"""Files of a model folder, read strictly and written whole: every damage is one line that names the file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import UserError

M = TypeVar("M", bound=nn.Module)

LFS_POINTER = b"version https://git-lfs"
VARIANTS = ("", ".fp16")  # diffusers' names: model.safetensors, model.fp16.safetensors


def read_bytes(path: Path, limit: int = -1) -> bytes:
    """The file, or its first `limit` bytes. Raises UserError if it is missing or an LFS pointer."""
    try:
        with path.open("rb") as file:
            content = file.read(limit)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is the download complete?") from None
    if content.startswith(LFS_POINTER):
        raise UserError(f"{path}: only a Git LFS pointer, not the file itself; run `git lfs pull` there")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is missing or holds anything else."""
    try:
        value = json.loads(read_bytes(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(value).__name__}; fetch it again")
    return value


def find_weights(folder: Path, stem: str) -> Path:
    """`stem`.safetensors or its fp16 variant in `folder`. Raises UserError that says what is there."""
    for variant in VARIANTS:
        if (path := folder / f"{stem}{variant}.safetensors").exists():
            return path
    others = sorted(each.name for each in folder.glob("*") if each.suffix in (".bin", ".safetensors"))
    found = f"; found only {', '.join(others)}" if others else ""
    raise UserError(f"{folder / stem}.safetensors: no such file{found}; fetch the model as safetensors")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped rather than copied. Raises UserError if it is damaged."""
    read_bytes(path, limit=len(LFS_POINTER))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged or cut short ({reason}); fetch it again") from None


def fill(module: M, tensors: Mapping[str, Tensor], path: Path) -> M:
    """Give a module on the meta device its tensors, read from `path`. Raises UserError naming faulty ones."""
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    misshaped = [
        f"{name} is {list(tensors[name].shape)}, config.json says {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    faults = [
        *_named("missing", missing),
        *_named("not of this model", extra),
        *_named("of the wrong shape", misshaped),
    ]
    if faults:
        raise UserError(
            f"{path}: tensors {'; '.join(faults)}.\nWeights and config.json belong to different models."
        )
    module.load_state_dict(tensors, assign=True)
    return module


def _named(fault: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return [f"{fault}: {', '.join(names[:2])}{more}"]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """A safetensors file that diffusers and transformers accept; floats in `dtype` if it is given."""
    plain = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(plain, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which replaces `folder` once all is written; on an error nothing changes."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        aside.chmod(0o755)
        yield aside
        _flush(path for path in aside.rglob("*") if path.is_file())
        _replace(folder, aside)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(folder: Path, new: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = folder.rename(new.with_name(f"{new.name}.old"))
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _flush(paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as file, contextlib.suppress(OSError):
            os.fsync(file.fileno())
