"""CLIP's own vocabulary, which comes with the package: single files hold no tokenizer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
SIZE = 49408
MERGES = SIZE - 2 * 256 - 2  # the file has more of them than CLIP uses


def make_tokenizer(config: Mapping[str, Any]) -> Any:
    """transformers' CLIPTokenizer: with CLIP's vocabulary, or with another.

    Args:
        config: as `describe_tokenizer` gives it; "pad_token" is enough for CLIP's vocabulary. CLIP pads with
            its end token, OpenCLIP (SD 2, the second encoder of XL) with "!", which is id 0.
    """
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    vocabulary, merges = bpe()
    values = {"vocab": vocabulary, "merges": merges, "model_max_length": 77, **config}
    values["merges"] = [tuple(pair) for pair in values["merges"]]
    tokenizer: Any = CLIPTokenizer(**values)
    return tokenizer


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Vocabulary, merges, special tokens and length of a CLIPTokenizer, in what JSON can hold."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    special = {name: str(getattr(tokenizer, name)) for name in SPECIAL}
    length = {"model_max_length": tokenizer.model_max_length}
    return {"vocab": model["vocab"], "merges": merges, **special, **length}


@cache
def bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token, and merges in the order of their rank (Radford et al. 2021, section 2.4).

    The ids count the 256 bytes, the bytes at the end of a word, the merges, and the start and end of a text.
    """
    lines = gzip.decompress(FILE.read_bytes()).decode("utf-8").splitlines()[1 : MERGES + 1]
    merges = [(first, second) for first, second in map(str.split, lines)]
    letters = _letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _letters() -> list[str]:
    """A character for each byte, in CLIP's order: printable bytes as they are, then others from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
