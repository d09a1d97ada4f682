"""Files of a model folder, read strictly and written whole: every damage is one line that names the file."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.checkpoint.fill import fill
from ldm.checkpoint.pickles import check_whole, read_pickle
from ldm.errors import UserError

__all__ = [
    "Later",
    "fill",
    "read_bytes",
    "read_config",
    "read_json",
    "read_metadata",
    "read_tensors",
    "suffix_of",
    "weight_files",
    "write_json",
    "write_tensors",
]

LFS_POINTER = b"version https://git-lfs"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# By their names in a safetensors header.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# --- reading ---------------------------------------------------------------------------------------------


def suffix_of(path: Path) -> str:
    """Of a file's name, in lower case: MODEL.SAFETENSORS is what model.safetensors is."""
    return path.suffix.lower()


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
    """A JSON object. Raises UserError if the file is missing or holds anything else, or a key twice."""
    try:
        value = json.loads(read_bytes(path), object_pairs_hook=_each_once)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(value).__name__}; fetch it again")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """The JSON config of a component. Raises UserError, also where it names Python code to be run with it."""
    config = read_json(path)
    if "auto_map" in config:
        raise UserError(f"{path}: names code of the model's own (auto_map), which is never run")
    return config


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is listed twice")
    return made


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, mapped rather than copied where the format allows; no code is run.

    Args:
        path: .safetensors; .bin, .ckpt, .pt or .pth (a pickle of tensors, as they are or under "state_dict");
            or the .json index of a model that is stored in several such files.

    Raises:
        UserError: naming the file that is damaged, holds code or is not what its name says.
    """
    if suffix_of(path) == ".json":
        return _read_shards(path)
    start = read_bytes(path, limit=max(9, len(LFS_POINTER)))
    if not start:
        raise UserError(f"{path}: empty; fetch it again")
    if suffix_of(path) == ".safetensors":
        if start.startswith((b"PK\x03\x04", b"\x80\x02")):
            raise UserError(f"{path}: a pickle by another name; rename it to .ckpt to have it read as one")
        return _map_safetensors(path)
    if suffix_of(path) not in PICKLES:
        raise UserError(f"{path}: not a file of weights; .safetensors and {', '.join(PICKLES)} are read")
    if start[8:9] == b"{":
        raise UserError(f"{path}: a safetensors file by another name; rename it to .safetensors")
    return _named_tensors(read_pickle(path), path)


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says of it; nothing for other files. Raises UserError."""
    return _open_safetensors(path)[1] if suffix_of(path) == ".safetensors" else {}


def weight_files(path: Path) -> list[Path]:
    """The file itself, or the files that an index names. Raises UserError for one outside its folder."""
    if suffix_of(path) != ".json":
        return [path]
    names = sorted(set(_weight_map(path).values()))
    for name in names:
        if name != PureWindowsPath(name).name or name in ("", "..") or name.endswith(".json"):
            raise UserError(f"{path}: names {name!r}, which is not a file of this folder; fetch it again")
    return [path.parent / name for name in names]


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files of an index, each in the file that the index says and nowhere else."""
    homes, tensors = _weight_map(index), dict[str, Tensor]()
    for path in weight_files(index):
        found = read_tensors(path)
        wanted = {name for name, home in homes.items() if home == path.name}
        for name in sorted(found.keys() ^ wanted):
            where = f"{homes.get(name, 'no file')}, but it is in {path.name}" if name in found else path.name
            lost = "" if name in found else ", where it is not"
            raise UserError(f"{index}: tensor {name} should be in {where}{lost}; fetch the files again")
        tensors |= found
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes or not all(isinstance(home, str) for home in homes.values()):
        raise UserError(f"{index}: has no weight_map that names files; fetch it again")
    return homes


def _open_safetensors(path: Path) -> tuple[mmap.mmap, dict[str, str]]:
    """The mapped file and its metadata, after safetensors has checked sizes and offsets. Raises UserError."""
    read_bytes(path, limit=len(LFS_POINTER))
    try:
        with safe_open(path, framework="pt", device="cpu") as checked:
            metadata = dict(checked.metadata() or {})
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), metadata
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: damaged or cut short ({reason}); fetch it again") from None


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors that are the file's own pages, in its order. Writing to one leaves the file alone."""
    pages, _ = _open_safetensors(path)
    start = 8 + int.from_bytes(pages[:8], "little")
    header = json.loads(pages[8:start])
    header.pop("__metadata__", None)
    content = torch.frombuffer(pages, dtype=torch.uint8)
    content.untyped_storage().pages = pages  # type: ignore[attr-defined]  # for `fill` to let go of them
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(f"{path}: tensor {name} is stored as {entry['dtype']}, which cannot be read")
        begin, end = (start + offset for offset in entry["data_offsets"])
        raw = content[begin:end]
        aligned = raw if begin % dtype.itemsize == 0 else raw.clone()
        tensors[name] = aligned.view(dtype).view(entry["shape"])
    return tensors


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict; a training program's checkpoint has it under "state_dict"."""
    found = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {
        name: value.detach()
        for name, value in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise UserError(f"{path}: holds no named tensors, so it is not a model's weights")
    for name, tensor in tensors.items():
        check_whole(name, tensor, path)
    return tensors


# --- writing ---------------------------------------------------------------------------------------------


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written, so that never more than one need be in memory."""

    like: Tensor  # of its shape and dtype, on any device
    make: Callable[[], Tensor]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | Later],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file that diffusers and transformers accept; floats in `dtype` if it is given.

    One tensor after the other is made, cast and written: safetensors' own `save_file` wants all at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    written, end = {}, 0
    # Wide dtypes first, as safetensors has it: then each tensor begins at a multiple of its own width.
    for name in sorted(tensors, key=lambda name: (-_written_dtype(tensors[name], dtype).itemsize, name)):
        each = tensors[name]
        like = each.like if isinstance(each, Later) else each
        written[name] = wanted = _written_dtype(each, dtype)
        begin, end = end, end + like.numel() * wanted.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[wanted],
            "shape": list(like.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, wanted in written.items():
            each = tensors[name]
            made = (each.make() if isinstance(each, Later) else each).detach()
            ready = made.to("cpu", wanted).contiguous()
            file.write(ready.reshape(-1).view(torch.uint8).numpy().data)


def _written_dtype(each: Tensor | Later, dtype: torch.dtype | None) -> torch.dtype:
    like = each.like if isinstance(each, Later) else each
    return dtype if dtype is not None and like.is_floating_point() else like.dtype
