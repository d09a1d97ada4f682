"""What the VAE and the text encoders make of pictures and captions, kept on disk from run to run.

    <folder>/4f/4f0c...safetensors   `mean` and `std` of a picture's latents, or `tokens`, `pooled` of a text
    <folder>/1200-4f0c....tar        many such files, where `pack` has put them: WebDataset shards

An entry's name is a hash of all that it follows from: the picture's bytes, the crop, the network's weights
and config, the dtype. So it is never stale: change one of them, and another entry is looked for. It also
holds that description and a checksum; one that is damaged in any way is made again. Entries are written aside
and renamed, so several processes may share a folder, and a killed one leaves nothing half.

Latents are kept as mean and standard deviation, scaled as the U-Net has them: each epoch draws its own.

The last bits of what a network gives may depend on how many pictures or texts it is given at once. So that
number is fixed, and a short batch is filled up: an entry is the same to the bit whatever else was missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from ldm.checkpoint.io import write_tensors
from ldm.dataset.buckets import Crop, apply_crop
from ldm.dataset.shards import Place
from ldm.errors import UserError, reason
from ldm.files import temporary_file, whole_file
from ldm.models import VAE, LatentDist
from ldm.models.conditioning import Conditioning
from ldm.pipeline.networks import encode
from ldm.prompts.text_encoder import Clip, TextEncoder
from ldm.runtime import local_cores

if TYPE_CHECKING:
    from ldm.dataset.findings import Example

FORMAT = 1  # to be raised when `apply_crop` changes, or what an entry holds
LEFT_BEHIND = 3600  # seconds after which an unfinished file is a killed process's
SHARD_BYTES = 2**30
PIXELS_AT_ONCE = 2**16  # one picture of 256 x 256, and of larger ones: a GPU is busy, and a CPU is fastest
TEXTS_AT_ONCE = 8

Cropped: TypeAlias = "tuple[Example, Crop]"
Entry = dict[str, Tensor]
T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]

# --- entries on disk -------------------------------------------------------------------------------------


class Store:
    """Entries in a folder. Raises UserError where the folder cannot be written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for unfinished in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):  # another process may tidy up too
                if unfinished.stat().st_mtime < time.time() - LEFT_BEHIND:
                    unfinished.unlink()

    @cached_property
    def packed(self) -> dict[str, Place]:
        """Where the entries of shards are, by name. Shards that cannot be read hold none."""
        places = {}
        for shard in sorted(self.folder.glob("*.tar")):
            with contextlib.suppress(OSError, tarfile.TarError), tarfile.open(shard, "r:") as tar:
                for entry in tar:
                    places[entry.name] = Place(str(shard), entry.offset_data, entry.size)
        return places

    def path(self, of: str) -> Path:
        """Where the entry that follows from `of` is, if it is in no shard."""
        key = hashlib.sha256(of.encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def _bytes(self, of: str) -> bytes:
        """Of the entry as it lies there. Raises OSError or UserError."""
        path = self.path(of)
        place = None if path.exists() else self.packed.get(path.name)
        return path.read_bytes() if place is None else place.read()

    def pack(self) -> int:
        """Put the files of entries into shards of about `SHARD_BYTES`. Returns how many there were.

        An entry is at all times in a file or in a shard. By one process alone.
        """
        files = sorted(self.folder.glob("??/*.safetensors"))
        for number, size, group in _shares(files):
            name = self.folder / f"{number:05d}-{size}-{group[0].stem[:16]}.tar"
            with whole_file(name) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
                for path in group:
                    tar.add(path, path.name, recursive=False, filter=_of_nobody)
            for path in group:
                path.unlink()
            for folder in {path.parent for path in group}:
                with contextlib.suppress(OSError):  # it is not empty yet
                    folder.rmdir()
        self.__dict__.pop("packed", None)
        return len(files)

    def read(self, of: str, shapes: Shapes, dtype: torch.dtype) -> Entry | None:
        """The entry, or None if there is none, or none that is sound and has these shapes and dtype."""
        try:
            raw = self._bytes(of)
            entry = load(raw)
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        except (OSError, UserError, SafetensorError, ValueError, KeyError):
            return None
        fits = {name: tuple(tensor.shape) for name, tensor in entry.items()} == dict(shapes)
        sound = fits and header == {"format": "pt", "of": of, "sha256": _checksum(entry)}
        sound = sound and all(t.dtype is dtype and bool(t.isfinite().all()) for t in entry.values())
        return entry if sound else None

    def write(self, of: str, entry: Entry) -> None:
        """Keep an entry, in place of any that is there."""
        path = self.path(of)
        try:
            with temporary_file(
                path
            ) as temporary:  # not `whole_file`: a cache can be made again, and is checked
                write_tensors(temporary, entry, metadata={"of": of, "sha256": _checksum(entry)})
                temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write to the cache {self.folder}: {reason(error)}") from None


def _shares(files: Sequence[Path]) -> Iterator[tuple[int, int, list[Path]]]:
    """(how many shares before, bytes, files) of each share of about `SHARD_BYTES`."""
    group: list[Path] = []
    size, number = 0, 0
    for path in files:
        group.append(path)
        size += path.stat().st_size
        if size >= SHARD_BYTES or path is files[-1]:
            yield number, size, group
            group, size, number = [], 0, number + 1


def _of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """So that the bytes of a shard follow from its entries."""
    return entry.replace(mtime=0, mode=0o644, uid=0, gid=0, uname="", gname="", deep=False)


def _checksum(entry: Entry) -> str:
    digest = hashlib.sha256()
    for name in sorted(entry):
        digest.update(_bytes(entry[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """A tensor's values in row-major order, whatever its strides and wherever it is."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def module_digest(module: nn.Module, config: Mapping[str, Any]) -> str:
    """SHA-256, 64 hex digits, of a network: its config, and its tensors' names, dtypes, shapes and values."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _describe(**of: Any) -> str:
    return json.dumps({"format": FORMAT, **of}, sort_keys=True)


def _batches(items: Iterable[T], kind: Callable[[T], Any], at_once: Callable[[T], int]) -> Iterator[list[T]]:
    """Batches of up to `at_once` items, each of one kind."""
    for _, same in groupby(sorted(items, key=kind), kind):
        group = list(same)
        step = at_once(group[0])
        yield from (group[first : first + step] for first in range(0, len(group), step))


def _filled(items: Sequence[T], count: int) -> list[T]:
    """As many as `count`, the last one over and over."""
    return [*items, *[items[-1]] * (count - len(items))]


# --- latents ---------------------------------------------------------------------------------------------


class LatentCache:
    """The latents of pictures, made by `vae` in its own dtype, in which they are kept too."""

    def __init__(self, folder: Path, vae: VAE) -> None:
        self.store, self.vae = Store(folder), vae
        self.dtype = next(vae.parameters()).dtype
        self.digest = module_digest(vae, vae.to_config())

    def read(self, crops: Sequence[Cropped]) -> LatentDist:
        """Mean and std, fp32 [B, c, h, w] each, of crops of one size; what is not there or damaged is made.

        Raises UserError where a picture cannot be read.
        """
        entries = [self._load(*each) or self._make([each], [open_and_crop(*each)])[0] for each in crops]
        mean, std = (torch.stack([entry[name] for entry in entries]).float() for name in ("mean", "std"))
        return LatentDist(mean, std)

    def fill(self, crops: Iterable[Cropped], done: Callable[[int], object] = lambda count: None) -> int:
        """Make what is not there or damaged, in batches; `done` is told the size of each. Returns how many.

        Pictures are read while the ones before are encoded. Several processes each take a share of `crops`.
        """
        missing = [each for each in crops if self._load(*each) is None]
        made = 0
        batches = _batches(missing, lambda each: each[1].size, lambda each: _at_once(each[1].size))
        for batch, pictures in _opened(batches):
            made += len(self._make(batch, pictures))
            done(len(batch))
        return made

    def _make(self, crops: Sequence[Cropped], pictures: Sequence[Tensor]) -> list[Entry]:
        images = torch.stack(_filled(pictures, _at_once(crops[0][1].size)))
        encoded = encode(self.vae, images / 2 + 0.5)
        both = torch.stack([encoded.mean, encoded.std], 1).to("cpu", self.dtype)
        entries = [{"mean": mean.clone(), "std": std.clone()} for mean, std in both]
        for each, entry in zip(crops, entries, strict=False):  # the rest only filled up
            self.store.write(self._of(*each), entry)
        return entries[: len(crops)]

    def _load(self, example: Example, crop: Crop) -> Entry | None:
        shape = (self.vae.latent_channels, *(side // self.vae.downscale for side in crop.size))
        return self.store.read(self._of(example, crop), {"mean": shape, "std": shape}, self.dtype)

    def _of(self, example: Example, crop: Crop) -> str:
        return _describe(picture=example.digest, vae=self.digest, crop=asdict(crop), dtype=str(self.dtype))


def _at_once(size: tuple[int, int]) -> int:
    return max(1, PIXELS_AT_ONCE // (size[0] * size[1]))


def open_and_crop(example: Example, crop: Crop) -> Tensor:
    """What `crop` shows of an example's picture: float32 [3, H, W] in -1..1. Raises UserError, naming it."""
    image = example.open()
    try:
        return apply_crop(image, crop)
    except UserError as error:
        raise UserError(f"{example.path}: {error}") from None


def _opened(batches: Iterable[list[Cropped]]) -> Iterator[tuple[list[Cropped], list[Tensor]]]:
    """Each batch with its pictures, those of the next being read in the meantime."""
    with ThreadPoolExecutor(local_cores() + 4) as pool:
        coming: deque[tuple[list[Cropped], list[Future[Tensor]]]] = deque()
        for batch in batches:
            coming.append((batch, [pool.submit(open_and_crop, *each) for each in batch]))
            if len(coming) > 1:
                ready, pictures = coming.popleft()
                yield ready, [picture.result() for picture in pictures]
        for ready, pictures in coming:
            yield ready, [picture.result() for picture in pictures]


# --- texts -----------------------------------------------------------------------------------------------


class TextCache:
    """The embeddings of texts, made by one or two encoders, kept in the dtype that they were made in.

    Each text is kept in as many windows as it needs itself. Windows are encoded by themselves, so those that
    a longer text in the same batch asks for are the embedding of the empty text.
    """

    def __init__(self, folder: Path, encoder: TextEncoder, clip_skip: int | None = None) -> None:
        self.store, self.encoder, self.clip_skip = Store(folder), encoder, clip_skip or 0
        self.dtype = next(encoder.clips[0].model.parameters()).dtype
        self.digests = [_text_digest(clip) for clip in encoder.clips]

    def read(self, texts: Sequence[str]) -> Conditioning:
        """Tokens [B, windows * N, D] and pooled text [B, P], fp32 on the CPU, as `TextEncoder.encode` gives.

        What is not there or damaged is made.
        """
        entries = [self._load(text) or self._make([text])[0] for text in texts]
        longest = max(len(entry["tokens"]) for entry in entries)
        rows = [entry["tokens"] for entry in entries]
        if any(len(row) < longest for row in rows):
            empty = self.read([""]).tokens[0].to(self.dtype)
            rows = [torch.cat([row, *[empty] * ((longest - len(row)) // len(empty))]) for row in rows]
        pooled = torch.stack([entry["pooled"] for entry in entries]).float() if self.encoder.pools else None
        return Conditioning(torch.stack(rows).float(), pooled)

    def fill(self, texts: Iterable[str], done: Callable[[int], object] = lambda count: None) -> int:
        """Make what is not there or damaged, in batches; `done` hears the size of each. Returns how many."""
        missing = [text for text in dict.fromkeys(texts) if self._load(text) is None]
        for batch in _batches(missing, self._windows, lambda _: TEXTS_AT_ONCE):
            done(len(self._make(batch)))
        return len(missing)

    def _windows(self, text: str) -> int:
        return max(clip.count_windows(text) for clip in self.encoder.clips)

    def _make(self, texts: Sequence[str]) -> list[Entry]:
        read = self.encoder.encode(_filled(texts, TEXTS_AT_ONCE), self.clip_skip, self._windows(texts[0]))
        columns = {"tokens": read.tokens} | ({} if read.pooled is None else {"pooled": read.pooled})
        kept = {name: column.to("cpu", self.dtype) for name, column in columns.items()}
        entries = [{name: column[i].clone() for name, column in kept.items()} for i in range(len(texts))]
        for text, entry in zip(texts, entries, strict=True):
            self.store.write(self._of(text), entry)
        return entries

    def _load(self, text: str) -> Entry | None:
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": (self._windows(text) * self.encoder.window, self.encoder.width)
        }
        if self.encoder.pools:
            shapes["pooled"] = (int(self.encoder.clips[-1].model.config.projection_dim),)
        return self.store.read(self._of(text), shapes, self.dtype)

    def _of(self, text: str) -> str:
        # The ids hold all that a tokenizer does, learnt words included.
        ids = [clip.tokenise(text, self._windows(text)).tolist() for clip in self.encoder.clips]
        return _describe(
            text=text, ids=ids, encoders=self.digests, clip_skip=self.clip_skip, dtype=str(self.dtype)
        )


def _text_digest(clip: Clip) -> str:
    """Of the encoder, and of what its config says beyond the shapes of its tensors."""
    names = ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id")
    return module_digest(clip.model, {name: getattr(clip.model.config, name) for name in names})
