"""What torch.save has written, read by torch's restricted unpickler: tensors and plain values, never code."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

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


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return UserError(f"{path}: damaged, cut short or no weights of torch ({reason[:80]}); fetch it again")
