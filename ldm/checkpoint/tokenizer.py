"""CLIP's tokenizer on disk, in transformers' files; and its own vocabulary, which comes with the package.

vocab.json, merges.txt    ids by token, and pairs in the order in which they are merged
tokenizer.json            both in one, in the format of the `tokenizers` package
tokenizer_config.json     special tokens, `model_max_length`, and tokens added later (textual inversions)
special_tokens_map.json, added_tokens.json    the same in older folders
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ldm.checkpoint.io import read_bytes, read_config, read_json
from ldm.errors import UserError
from ldm.prompts.tokenizer import END, SPECIAL, START, CLIPTokenizer

FILE = Path(__file__).parent / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
UNLIMITED = int(1e30)  # what transformers writes where a config does not say a length


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of vocab.json and merges.txt, or of tokenizer.json. Raises UserError.

    It gives the ids that transformers' CLIPTokenizer gives, which takes vocabulary, merges and added tokens
    of a tokenizer.json, and nothing else.
    """
    vocab, merges, added = _read_vocabulary(folder)
    config = _read_special(folder)
    try:
        if "added_tokens_decoder" in config:
            added = {int(i): AddedToken(**token) for i, token in config["added_tokens_decoder"].items()}
        given = {key: _token(value) for key, value in config.items() if key.endswith("_token")}
        by_name = {token.content: token for token in added.values()}
        named = {
            key: by_name.get(str(getattr(token, "content", token)), token)
            for key, token in given.items()
            if isinstance(token, str | AddedToken)
        }
        more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        return CLIPTokenizer(
            vocab,
            merges,
            **{name: named.pop(name) for name in SPECIAL if name in named},
            model_max_length=int(config.get("model_max_length") or UNLIMITED),
            added=[token for _, token in sorted(added.items())],
            special=[*named.values(), *map(_token, more.values() if isinstance(more, dict) else more)],
        )
    except Exception as error:  # tokenizers raises whatever it likes at odd values
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder}: not the files of a CLIPTokenizer ({reason}); fetch them again") from None


def _read_vocabulary(
    folder: Path,
) -> tuple[Mapping[str, int], Sequence[tuple[str, str]], dict[int, AddedToken]]:
    """Ids by token, merges, and the added tokens of older folders by id. Raises UserError."""
    added = {}
    if (single := folder / "tokenizer.json").exists():
        content = read_json(single)
        model = content.get("model")
        if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys():
            raise UserError(f"{single}: has no vocabulary of byte pairs; fetch it again")
        vocab = model["vocab"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        for token in content.get("added_tokens") or []:
            added[token["id"]] = AddedToken(**{key: flag for key, flag in token.items() if key != "id"})
    else:
        vocab = read_json(folder / "vocab.json")
        pairs = _read_merges(folder / "merges.txt", vocab)
    return vocab, [(pair[0], pair[-1]) for pair in pairs], added


def _read_merges(path: Path, vocab: Mapping[str, int]) -> list[list[str]]:
    """Raises UserError for a merges.txt that is cut short, which would silently give other tokens."""
    lines = read_bytes(path).decode("utf-8", "replace").splitlines()
    made = {line.replace(" ", "") for line in lines}
    long = (token for token in vocab if len(token.removesuffix("</w>")) > 1)
    lost = [token for token in long if token not in made and not token.startswith("<|")]
    if lost:
        raise UserError(
            f"{path}: damaged or cut short ({lost[0]!r} is not made by any merge); fetch it again"
        )
    return [line.split(" ") for line in lines if line and not line.startswith("#version")]


def _read_special(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, and files that are older than its `added_tokens_decoder`."""
    path = folder / "tokenizer_config.json"
    single = (folder / "tokenizer.json").exists()
    config = read_config(path) if path.exists() or not single else {}
    length = config.get("model_max_length", 77)
    if not isinstance(length, int | float) or length < 3:
        raise UserError(f"{path}: model_max_length = {length!r} is not allowed: give at least 3")
    if "added_tokens_decoder" in config:
        return config
    if (older := folder / "special_tokens_map.json").exists():
        config |= {key: _token(value, special=True) for key, value in read_json(older).items()}
    if (older := folder / "added_tokens.json").exists():
        names = {str(getattr(token, "content", token)) for token in config.values()}
        config["added_tokens_decoder"] = {
            i: {"content": token, "normalized": token not in names, "special": token in names}
            for token, i in read_json(older).items()
        }
    return config


def _token(value: Any, **flags: bool) -> Any:
    """A token with its flags, where they are given; other values as they are."""
    if not isinstance(value, dict):
        return value
    return AddedToken(**{key: flag for key, flag in value.items() if key != "__type"} | flags)


def make_tokenizer(config: Mapping[str, Any]) -> CLIPTokenizer:
    """The tokenizer that `CLIPTokenizer.describe` has described; "pad_token" is enough for CLIP's vocabulary.

    CLIP pads with its end token, OpenCLIP (SD 2, the second encoder of XL) with "!", which is id 0.
    """
    vocab, merges = bpe()
    return CLIPTokenizer(**{"vocab": vocab, "merges": merges, **config})


@cache
def bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and merges in the order of their rank (Radford et al. 2021, section 2.4).

    The ids count the 256 bytes, the bytes at the end of a word, the merges, and the start and end of a text.
    """
    lines = gzip.decompress(FILE.read_bytes()).decode("utf-8").splitlines()[1:]
    merges = [(first, second) for first, second in map(str.split, lines)]
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _letters() -> list[str]:
    """A character for each byte, in CLIP's order: printable bytes as they are, then others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
