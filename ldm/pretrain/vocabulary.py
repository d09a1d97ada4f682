"""A CLIP vocabulary of our own: byte-level BPE learnt from captions, in CLIPTokenizer's files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from ldm.prompts.tokenizer import END, START, WORDS


def train_vocabulary(captions: Iterable[str], merges: int, length: int, folder: Path) -> None:
    """Learn `merges` BPE merges and write vocab.json, merges.txt and tokenizer_config.json to `folder`.

    Ids as in CLIP: 256 bytes, the same 256 ending a word, the merges, then start and end of text. Any text
    can be written with them. `length` is the number of tokens a prompt is padded to.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Pattern(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learnt = json.loads(learner.to_str())["model"]["merges"][:merges]
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in learnt]
    tokens = (
        alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in pairs] + [START, END]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "errors": "replace",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def known_words(captions: Iterable[str], at_least: int = 20) -> list[str]:
    """The words that occur `at_least` times in the captions, sorted: what a model has seen often."""
    counts = Counter(word for caption in captions for word in re.findall(r"[a-z']+", caption.lower()))
    return sorted(word for word, count in counts.items() if count >= at_least)
