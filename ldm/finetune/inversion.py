"""Textual inversion: learning a new word's token embeddings, and nothing else (Gal et al. 2022).

https://arxiv.org/abs/2208.01618, equation 2: v* = argmin_v E || eps - eps_theta(x_t, t, c(y; v)) ||^2, where
the captions y hold the word and v are its rows in the text encoder's table of token embeddings.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.inversion import WORD, XL_KEYS, add_tokens, pool_at_end, taken_token
from ldm.adapters.layers import share
from ldm.adapters.names import ENCODERS
from ldm.checkpoint import Parts
from ldm.checkpoint.io import write_tensors
from ldm.checkpoint.parts import TOKENIZERS
from ldm.errors import UserError
from ldm.files import whole_file
from ldm.models.clip import CLIPTextModel
from ldm.prompts.text_encoder import Clip, spell_out
from ldm.prompts.tokenizer import CLIPTokenizer

FILE = "learned_embeds.safetensors"  # the name that diffusers looks for


class LearntWord(nn.Module):
    """A table of token embeddings, which is shared and frozen, and beside it the rows being learnt, in fp32.

    An optimiser is given `learnt` alone: neither gradients nor weight decay can reach the other words.
    """

    def __init__(self, table: nn.Module, rows: Tensor, first: int) -> None:
        """`rows` [n, D] are those of the ids from `first` on, whatever the table has there."""
        super().__init__()
        # The table comes first: a text encoder's dtype is taken to be that of its first parameter.
        self.table = table
        self.learnt = nn.Embedding.from_pretrained(rows.float(), freeze=False)  # type: ignore[no-untyped-call]
        self.first = first

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N] ids -> [B, N, D], in the table's dtype."""
        row = ids - self.first
        is_new = (row >= 0) & (row < self.learnt.num_embeddings)
        known: Tensor = self.table(ids.masked_fill(is_new, 0))
        learnt: Tensor = self.learnt(row.masked_fill(~is_new, 0))
        return torch.where(is_new[..., None], learnt.to(known.dtype), known)


def add_word(parts: Parts, *, word: str, initial: str, vectors: int = 1) -> Parts:
    """Parts that know a new word, whose token embeddings are all that its text encoders have to train.

    The text encoders share all tensors with the old ones, which are frozen; their token embedding is a
    `LearntWord`. To be called when the parts are on their device and in their dtype.

    Args:
        word: as it is written in prompts, such as "<cat>".
        initial: what it means at first, such as "cat": its tokens' embeddings, over and over.
        vectors: how many token embeddings n it has.

    Raises:
        UserError: for a word that cannot be new, and for what it cannot begin with.
    """
    changed: dict[str, Any] = {}
    for encoder, tokenizer in zip(ENCODERS, TOKENIZERS, strict=True):
        clip = Clip(getattr(parts, tokenizer), getattr(parts, encoder))
        if clip.model is not None:
            _check_word(word, vectors, clip)
            rows = _initial_rows(initial, vectors, clip, parts)
            changed[tokenizer] = extended = copy.deepcopy(clip.tokenizer)
            add_tokens(extended, word, vectors)
            changed[encoder] = _learn(clip.model, rows, extended)
    return replace(parts, **changed)


def _check_word(word: str, vectors: int, clip: Clip) -> None:
    """Raises UserError for a word that cannot be added."""
    if not word or any(character.isspace() for character in word):
        raise UserError(f"the word to learn is {word!r}: give one without blanks, such as <cat>")
    if not 1 <= vectors <= clip.window - 2:
        raise UserError(f"{vectors} vectors are not allowed: a word has 1 to {clip.window - 2}")
    taken = taken_token(clip.tokenizer, word, vectors)
    if taken is None and len(clip.tokenizer.ids(word)) < 2:  # as "cat", which is stored as "cat</w>"
        taken = word
    if taken is not None:
        new = f"<my-{word.strip('<>')}>"
        raise UserError(f"the model has {taken!r} already: give a word that is new to it, such as {new}")


def _initial_rows(initial: str, vectors: int, clip: Clip, parts: Parts) -> Tensor:
    """[n, D]: the embeddings of the tokens of `initial`, over and over. Raises UserError."""
    ids = [
        i for spelt in spell_out(clip.tokenizer.ids(initial), clip.tokenizer.get_added_vocab()) for i in spelt
    ]
    begins = f"the new word cannot begin as {initial!r}"
    if not ids:
        raise UserError(f'{begins}: give what it is close to in meaning, such as "cat"')
    if clip.tokenizer.unk_token_id in ids or parts.unknown_words(initial):
        raise UserError(f"{begins}: the model does not know that; give a word that it knows")
    if len(ids) > vectors:
        many = f"{begins}: that is {len(ids)} tokens and the word has {vectors}"
        raise UserError(f"{many}; give it {len(ids)} vectors, or a shorter beginning")
    table = clip.model.get_input_embeddings()
    repeated = torch.tensor([ids[i % len(ids)] for i in range(vectors)])
    with torch.no_grad():
        rows: Tensor = table(repeated.to(next(clip.model.parameters()).device))
    return rows


def _learn(model: CLIPTextModel, rows: Tensor, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text encoder that shares all tensors of `model`, frozen, and learns `rows` of the last tokens."""
    learning = share(model).requires_grad_(False)
    first = len(tokenizer) - len(rows)
    learning.set_input_embeddings(LearntWord(learning.get_input_embeddings(), rows, first))
    pool_at_end(learning, tokenizer.eos_token_id, max(learning.config.vocab_size, len(tokenizer)))
    return learning


# --- on disk ---------------------------------------------------------------------------------------------


def save_word(parts: Parts, folder: Path) -> Path:
    """Write what `add_word`'s parts have learnt to `folder`, whole or not at all; returns the file.

    `learned_embeds.safetensors` as diffusers has it: {word: [n, D]}, or for SDXL {"clip_l": [n, D],
    "clip_g": [n, D']} as `load_textual_inversion` is commonly given it, with the word in the header. fp32.

    Raises:
        UserError: if it cannot be written.
    """
    encoders = {part: model for part in ENCODERS if (model := getattr(parts, part)) is not None}
    tables: dict[str, LearntWord] = {part: model.get_input_embeddings() for part, model in encoders.items()}
    part, table = next(iter(tables.items()))
    tokenizer = getattr(parts, part.replace("text_encoder", "tokenizer"))
    (word,) = tokenizer.convert_ids_to_tokens([table.first])
    keys = {word: part} if len(tables) == 1 else XL_KEYS
    with whole_file(path := folder / FILE) as aside:
        rows = {key: tables[part].learnt.weight for key, part in keys.items()}
        write_tensors(aside, rows, torch.float32, {WORD: word})
    return path
