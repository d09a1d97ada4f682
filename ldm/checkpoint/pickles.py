"""What torch.save has written, read by torch's restricted unpickler: tensors and plain values, never code."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

# What training programs put beside the weights. Their classes are not needed: these names become `Ignored`.
BYSTANDERS = (
    "_codecs.encode",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


class Ignored:
    """Stands where an object was that has nothing to do with weights."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_pickle(path: Path) -> Any:
    """What is in the file: tensors (mapped where the format allows), and dicts, lists and numbers with them.

    Raises:
        UserError: if the file holds code, which is not run, or is damaged.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # the format since torch 1.6
    if is_zip:
        _refuse_compressed(path)
    stand_ins = [(Ignored, name) for name in BYSTANDERS]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]  # its type lacks pairs
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise _damaged(path, error) from None
        raise UserError(
            f"{path}: holds code ({code[1]}), which was not run.\n"
            "Get the model as safetensors, or convert it with the program that wrote it, if you trust that."
        ) from None
    except Exception as error:  # torch raises whatever it likes at damaged files
        raise _damaged(path, error) from None


def check_whole(name: str, tensor: Tensor, path: Path) -> None:
    """Raises UserError for a tensor that is no plain array with all of its numbers in the file.

    One that repeats a number (stride 0) would let a file of a few bytes fill the memory.
    """
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or _is_repeated(tensor):
        raise UserError(f"{path}: tensor {name} is sparse, packed or without its numbers; it cannot be read")


def _is_repeated(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes()


def _refuse_compressed(path: Path) -> None:
    """torch never compresses: a few bytes that swell to gigabytes are none of its files. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as content:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in content.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from None
    if packed:
        raise UserError(f"{path}: a compressed archive, not a file that torch has written; unpack it first")


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return UserError(f"{path}: damaged, cut short or no weights of torch ({reason[:80]}); fetch it again")
