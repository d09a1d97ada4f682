"""CLIP's tokenizer: text -> token ids by byte pairs (Radford et al. 2021, section 2.4; Sennrich et al. 2016).

What transformers' CLIPTokenizer makes of the `tokenizers` package, without transformers, which takes seconds
to import. A text is normalised (NFC, any blanks as one, lower case) and split into words; a word's bytes are
merged in the order in which the merges were learnt.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# What is a word (openai/CLIP, simple_tokenizer.py).
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokens(NamedTuple):
    """Ids [N] of a text, or [B, N] of several."""

    input_ids: Any


class CLIPTokenizer:
    """Text -> ids of CLIP's vocabulary, or of another made in its way. Names are those of transformers."""

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        bos_token: str | AddedToken = START,
        eos_token: str | AddedToken = END,
        unk_token: str | AddedToken = END,
        pad_token: str | AddedToken = END,
        model_max_length: int = 77,
        added: Iterable[AddedToken] = (),
        special: Iterable[str | AddedToken] = (),
    ) -> None:
        """
        Args:
            vocab: ids by token; merges: pairs of tokens, in the order of their rank.
            bos_token, eos_token, unk_token, pad_token: start and end of a text, what is not in the
                vocabulary, and padding. CLIP pads with its end, OpenCLIP with "!", which is id 0.
            model_max_length: tokens that the text encoder reads at once, start and end included.
            added: tokens beside the merged ones, in the order of their ids. special: those never divided.
        """
        self.model_max_length = model_max_length
        given = (bos_token, eos_token, unk_token, pad_token)
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = map(_content, given)
        self._backend = _backend(vocab, merges, self.unk_token)
        # In transformers' order, as the first to come has its flags.
        order = (bos_token, eos_token, unk_token, pad_token, *special)
        self._backend.add_tokens(_to_add(list(added), order))
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = (
            self._id(token) for token in (self.bos_token, self.eos_token, self.unk_token, self.pad_token)
        )

    def _id(self, token: str) -> int:
        found: int | None = self._backend.token_to_id(token)
        assert found is not None, token  # it has been added
        return found

    def __len__(self) -> int:
        """Ids that there are."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)
        twin._backend = copy.deepcopy(self._backend, memo)
        return twin

    def ids(self, text: str) -> list[int]:
        """The ids of a text of any length, without start and end."""
        found: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return found

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: Literal["max_length", True, False] = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Literal["pt"] | None = None,
    ) -> Tokens:
        """Start, ids and end of each text, as scripts for diffusers ask for them.

        Args:
            padding: as long as the longest (True), or `max_length`, by default `model_max_length`.
            truncation: cut, before the end, what is longer than that.
            return_tensors: "pt" for a tensor [B, N] in place of lists.
        """
        length = max_length or self.model_max_length
        read = self._backend.encode_batch(
            [text] if isinstance(text, str) else list(text), add_special_tokens=False
        )
        rows = [each.ids[: length - 2] if truncation else each.ids for each in read]
        rows = [[self.bos_token_id, *row, self.eos_token_id] for row in rows]
        if padding:
            to = length if padding == "max_length" else max(map(len, rows))
            rows = [row + [self.pad_token_id] * (to - len(row)) for row in rows]
        if return_tensors:
            return Tokens(torch.tensor(rows))
        return Tokens(rows[0] if isinstance(text, str) else rows)

    def convert_tokens_to_ids(self, token: str) -> int:
        """A token's id, or that of `unk_token`."""
        found: int | None = self._backend.token_to_id(token)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """What stands for each id."""
        return [self._backend.id_to_token(i) or self.unk_token for i in ids]

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, of all."""
        found: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """What has been added to the merged tokens, and the special ones, by id."""
        found: dict[int, AddedToken] = self._backend.get_added_tokens_decoder()
        return dict(sorted(found.items()))

    def get_added_vocab(self) -> dict[str, int]:
        """The same as ids by token."""
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def add_tokens(self, tokens: Iterable[str], single_word: bool = False) -> None:
        """Add tokens in place, with the next ids; `single_word` finds them only as words of their own."""
        self._backend.add_tokens(
            [AddedToken(token, single_word=single_word, normalized=True) for token in tokens]
        )

    def describe(self) -> dict[str, Any]:
        """Vocabulary, merges, special tokens and length, in what JSON can hold; without added tokens."""
        model = json.loads(self._backend.to_str())["model"]
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        own = {name: getattr(self, name) for name in SPECIAL}
        return {"vocab": model["vocab"], "merges": merges, **own, "model_max_length": self.model_max_length}


def _content(token: str | AddedToken) -> str:
    return token if isinstance(token, str) else str(token.content)


def _backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], unk_token: str) -> Tokenizer:
    backend = Tokenizer(
        BPE(
            vocab=dict(vocab),
            merges=[(first, second) for first, second in merges],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=unk_token,
        )
    )
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _to_add(added: list[AddedToken], special: Iterable[str | AddedToken]) -> list[AddedToken]:
    """Tokens in the order of their ids, and with the flags, that transformers gives them."""
    names, known = set(), {token.content for token in added}
    tokens: list[str | AddedToken] = [*added]
    for token in special:
        names.add(_content(token))
        if _content(token) not in known and token not in tokens:
            tokens.append(token)
    ready = [AddedToken(each, special=True) if isinstance(each, str) else each for each in tokens]
    for each in ready:
        each.special = each.special or each.content in names
    return ready
