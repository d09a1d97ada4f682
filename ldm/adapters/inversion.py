"""Textual inversion: new words, each of one or several learnt token embeddings (Gal et al. 2022).

https://arxiv.org/abs/2208.01618. A word of n vectors has n tokens, `<cat>`, `<cat>_1`, ..., as in diffusers;
in a prompt it is written once, and `ldm.prompts.text_encoder` reads all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.layers import share
from ldm.adapters.names import ENCODERS, TEXT, TEXT_2
from ldm.checkpoint import Parts
from ldm.checkpoint.fill import is_finite, widen
from ldm.checkpoint.io import read_bytes, read_metadata, read_tensors
from ldm.checkpoint.pickles import check_whole, read_pickle
from ldm.errors import UserError
from ldm.files import sha256
from ldm.memory.residence import awake
from ldm.models.clip import CLIPTextModel
from ldm.prompts.tokenizer import CLIPTokenizer

XL_KEYS = {"clip_l": TEXT, "clip_g": TEXT_2}
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's second encoder"}
# Keys that are no words: those of A1111, of the paper's own code, and of ComfyUI for each text encoder.
NAMELESS = ("emb_params", "string_to_param.*", "*", "clip_l", "clip_g", "clip_h")
WORD = "word"  # in the header of our SDXL files, whose keys say nothing of it


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word and its vectors [n, D]: one tensor, or SDXL's two by text encoder."""

    path: Path
    sha256: str
    name: str
    vectors: Mapping[str, Tensor]  # {"": one} or {"text_encoder": ..., "text_encoder_2": ...}
    bundled: bool = False  # in the file of a LoRA

    def __str__(self) -> str:
        count = len(next(iter(self.vectors.values())))
        return f"{self.path.name}: {count} vector{'s' * (count > 1)}, written {self.name} in prompts"


def read_embedding(path: str | Path, name: str | None = None) -> Embedding:
    """A textual inversion in the format of diffusers, of AUTOMATIC1111, or SDXL's `clip_l` and `clip_g`.

    Args:
        path: .safetensors, or .pt or .bin, which are read without running code.
        name: what to write in prompts; by default the word in diffusers' files, the file's name for others.

    Raises:
        UserError: if the file is missing, damaged, holds code or NaN, or is no textual inversion.
    """
    path = Path(path).expanduser()
    if path.is_dir():  # as training writes it
        path = path / "learned_embeds.safetensors"
    read_bytes(path, limit=32)
    state = path.stat()
    word, vectors = _read(path, state.st_mtime_ns, state.st_size)
    word = name or word or path.stem
    if not word.strip() or word != word.strip():
        raise UserError(f"{path}: {word!r} is no word; choose a name: --embedding name=file")
    return Embedding(path, sha256(path), word, vectors)


@lru_cache(maxsize=32)
def _read(path: Path, _mtime_ns: int, _size: int) -> tuple[str | None, Mapping[str, Tensor]]:
    content = _content(path)
    if isinstance(content, dict) and "string_to_param" in content:  # AUTOMATIC1111, and the paper's own code
        params = content["string_to_param"]
        content = dict(params.items()) if isinstance(params, dict | nn.ParameterDict) else {}
    if isinstance(content, Tensor):
        content = {"*": content}
    if isinstance(content, dict) and content.keys() == XL_KEYS.keys():
        return read_metadata(path).get(WORD), _vectors(content, path)[1]
    return _vectors(content, path)


def read_bundled(path: Path, name: str, content: Mapping[str, Tensor]) -> Embedding:
    """The word `name` in a LoRA's file; its tensors are called as in a file of its own. Raises UserError."""
    return Embedding(path, sha256(path), name, _vectors(content, path)[1], bundled=True)


def _vectors(content: Any, path: Path) -> tuple[str | None, Mapping[str, Tensor]]:
    """A word, if the keys tell it, and its vectors [n, D] by text encoder."""
    word = None
    if isinstance(content, dict) and len(content) == 1:
        ((key, tensor),) = content.items()
        word = key if isinstance(key, str) and key not in NAMELESS else None
        content = {"": tensor}
    elif isinstance(content, dict) and content.keys() == XL_KEYS.keys():
        content = {part: content[key] for key, part in XL_KEYS.items()}
    else:
        raise UserError(f"{path}: not a textual inversion: one tensor, or clip_l and clip_g, are expected")
    vectors = {part: _rows(tensor, path) for part, tensor in content.items()}
    if len({len(rows) for rows in vectors.values()}) > 1:
        raise UserError(f"{path}: clip_l and clip_g have different numbers of vectors; fetch it again")
    return word, vectors


def _content(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        return read_tensors(path)
    with torch.serialization.safe_globals([nn.ParameterDict]):  # of the paper's own code
        return read_pickle(path)


def _rows(tensor: Any, path: Path) -> Tensor:
    """[D] or [n, D] -> [n, D]."""
    if not isinstance(tensor, Tensor) or tensor.ndim not in (1, 2) or not tensor.is_floating_point():
        raise UserError(f"{path}: not a textual inversion: it should hold vectors [n, width]")
    check_whole("*", tensor, path)
    tensor = widen(tensor)
    if not is_finite(tensor) or not tensor.numel():
        raise UserError(f"{path}: its vectors are empty or hold NaN; this file is damaged, fetch it again")
    rows: Tensor = tensor.detach().reshape(-1, tensor.shape[-1])
    return rows


# --- giving them to a model ------------------------------------------------------------------------------


def add_words(parts: Parts, embeddings: Sequence[Embedding]) -> Parts:
    """Parts with copies of the tokenizers that know the words; the text encoders share all other tensors.

    Raises:
        UserError: for vectors of another family's width, and for a word that the model has already.
    """
    changed: dict[str, Any] = {}
    for encoder, tokenizer in zip(ENCODERS, ("tokenizer", "tokenizer_2"), strict=True):
        model = getattr(parts, encoder)
        if model is not None and embeddings:
            rows = [_fitting(each, encoder, parts) for each in embeddings]
            changed[tokenizer] = _add_tokens(getattr(parts, tokenizer), embeddings)
            changed[encoder] = _add_rows(model, torch.cat(rows), changed[tokenizer])
    return replace(parts, **changed)


def _fitting(embedding: Embedding, encoder: str, parts: Parts) -> Tensor:
    """The vectors for one text encoder."""
    wanted = {name: _width(getattr(parts, name)) for name in ENCODERS if getattr(parts, name) is not None}
    given = {name: rows.shape[1] for name, rows in embedding.vectors.items()}
    vectors = embedding.vectors.get(encoder, embedding.vectors.get("") if len(wanted) == 1 else None)
    if vectors is None or vectors.shape[1] != wanted[encoder] or len(given) > len(wanted):
        raise UserError(
            f"{embedding.path}: vectors of width {_family(given)}; this model takes {_family(wanted)}.\n"
            "A textual inversion works only with the family that it was trained on."
        )
    return vectors


def _family(widths: Mapping[str, int]) -> str:
    numbers = " and ".join(map(str, widths.values()))
    name = "SDXL" if len(widths) == 2 else WIDTHS.get(next(iter(widths.values())))
    return f"{numbers} ({name})" if name else numbers


def _width(model: CLIPTextModel) -> int:
    return int(model.config.hidden_size)


def _add_tokens(tokenizer: CLIPTokenizer, embeddings: Sequence[Embedding]) -> CLIPTokenizer:
    extended = copy.deepcopy(tokenizer)
    for each in embeddings:
        count = len(next(iter(each.vectors.values())))
        if taken := taken_token(extended, each.name, count):
            within = f"rename the tensors bundle_emb.{each.name}.* in the file"
            way_out = within if each.bundled else "choose a name: --embedding name=file"
            raise UserError(f"{each.path}: the model has {taken!r} already; {way_out}")
        add_tokens(extended, each.name, count)
    return extended


def taken_token(tokenizer: CLIPTokenizer, name: str, count: int) -> str | None:
    """The first of the tokens of a word of `count` vectors that a tokenizer has already."""
    known = tokenizer.get_vocab()
    # The last would be read as one more vector.
    return next((token for token in (*_tokens(name, count), f"{name}_{count}") if token in known), None)


def add_tokens(tokenizer: CLIPTokenizer, name: str, count: int) -> None:
    """Teach a tokenizer, in place, the tokens of a word of `count` vectors."""
    # "ed" must not be found in "red".
    tokenizer.add_tokens(_tokens(name, count), single_word=name[0].isalnum() and name[-1].isalnum())


def _tokens(name: str, count: int) -> list[str]:
    return [name, *(f"{name}_{i}" for i in range(1, count))]


def _add_rows(model: CLIPTextModel, rows: Tensor, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text encoder that shares all tensors of `model` but the token embedding, which is longer."""
    extended = share(model)
    old = extended.get_input_embeddings()
    # Rows beyond the tokenizer's words are padding of the matrix: new ones go where their tokens say.
    first = len(tokenizer) - len(rows)
    with awake(old.weight):
        weight = torch.cat([old.weight[:first], rows.to(old.weight), old.weight[first + len(rows) :]])
    frozen = not old.weight.requires_grad
    new = nn.Embedding.from_pretrained(weight, frozen)  # type: ignore[no-untyped-call]
    extended.set_input_embeddings(new)
    pool_at_end(extended, tokenizer.eos_token_id, len(weight))
    return extended


def pool_at_end(model: CLIPTextModel, end: int, rows: int) -> None:
    """Say how many `rows` its table has now, and pool at `end`.

    Where a config says `eos_token_id` 2, text is pooled at the highest id, which is now a new word's.
    """
    model.config = replace(model.config, vocab_size=rows, eos_token_id=end)
