"""Token ids are those of transformers' CLIPTokenizer, whatever files the tokenizer is stored in."""

import copy
import json

import pytest
from tiny_pipeline import WINDOW, write_tokenizer
from transformers import CLIPTokenizer as Theirs

from ldm.checkpoint import load_tokenizer, save_tokenizer
from ldm.checkpoint.tokenizer import bpe, make_tokenizer
from ldm.prompts.tokenizer import END, START

TEXTS = [
    "",
    "   ",
    "a photo of a cat!",
    "hello!!! world! a_b--c... (x:1.2) [y]",
    "It's 'soft' light, they'RE don't I'D we'll",
    "naïve café cafe\u0301 ß ﬁ İstanbul Ǆ ё",
    "雪の山 東京 नमस्ते العربية עברית ไทย 한국어",
    "🙂👩‍👩‍👧 🇫🇷 ½ ٣ 1234",
    "a\tb\nc  d\u00a0e\u3000f\ufeffx\u200bb\u00ady \x00\x07",
    "x" * 3000 + " Rindfleischetikettierung",
    "<|endoftext|> red <|STARTOFTEXT|><|startoftext|>sea<|endoftext|>boat",
    "a <cat> and <CAT>_1 <dog> Sky skyline sky, <x><y> the red boat",
]


def flags(content, **others):
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": content, **plain, **others}


SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
IN_FULL = {name: flags(token) for name, token in SPECIAL.items()}
TYPED = {name: {"__type": "AddedToken", **token} for name, token in IN_FULL.items()}
ADDED = {"0": flags("!", normalized=False, special=True)}
ADDED |= {"521": flags(START, special=True), "522": flags(END, special=True)}
WORDS = {"523": flags("<cat>"), "524": flags("<cat>_1"), "525": flags("sky", single_word=True)}
# By kind of folder: tokenizer_config.json, and what else there is.
FOLDERS = {
    "plain": (SPECIAL, {}),
    "bare": ({}, {}),
    "sd1": (TYPED | {"pad_token": END}, {"special_tokens_map": IN_FULL | {"pad_token": END}}),
    "sd2": (TYPED | {"pad_token": END}, {"special_tokens_map": IN_FULL | {"pad_token": "!"}}),
    "xl": (SPECIAL | {"pad_token": "!", "added_tokens_decoder": ADDED}, {}),
    "older words": (SPECIAL, {"added_tokens": {"<cat>": 523, "<cat>_1": 524}}),
    "words": (SPECIAL | {"pad_token": "!", "added_tokens_decoder": ADDED | WORDS}, {}),
    "more": (SPECIAL | {"additional_special_tokens": ["<x>", "<y>"]}, {}),
}


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    added = {i: repr(token) for i, token in sorted(theirs.added_tokens_decoder.items())}
    assert {i: repr(token) for i, token in ours.added_tokens_decoder.items()} == added
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, name) == str(getattr(theirs, name))
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")
    for text in TEXTS:
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids, text
    padded = {"padding": "max_length", "truncation": True, "max_length": 20}
    assert ours(TEXTS, **padded).input_ids == theirs(TEXTS, **padded).input_ids
    assert ours(TEXTS[2:5], padding=True).input_ids == theirs(TEXTS[2:5], padding=True).input_ids


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
    write_tokenizer(tmp_path)
    config, others = FOLDERS[request.param]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": WINDOW, **config}
    for name, content in {"tokenizer_config": config, **others}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_ids_are_those_of_transformers(folder):
    ours, theirs = load_tokenizer(folder), Theirs.from_pretrained(folder)
    assert ours.model_max_length == theirs.model_max_length == WINDOW
    assert_same(ours, theirs)
    assert_same(copy.deepcopy(ours), theirs)


def test_what_either_saves_the_other_opens(folder, tmp_path):
    ours, theirs = load_tokenizer(folder), Theirs.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs")  # as tokenizer.json
    assert_same(load_tokenizer(tmp_path / "theirs"), Theirs.from_pretrained(tmp_path / "theirs"))
    (tmp_path / "theirs" / "tokenizer_config.json").unlink()
    alone, wanted = load_tokenizer(tmp_path / "theirs"), Theirs.from_pretrained(tmp_path / "theirs")
    assert all(alone.ids(text) == wanted(text, add_special_tokens=False).input_ids for text in TEXTS)
    save_tokenizer(ours, tmp_path / "ours")
    assert_same(load_tokenizer(tmp_path / "ours"), Theirs.from_pretrained(tmp_path / "ours"))


@pytest.mark.parametrize("pad", [END, "!"])
def test_ids_of_clips_own_vocabulary(pad):
    vocab, merges = bpe()
    theirs = Theirs(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)
    assert_same(make_tokenizer({"pad_token": pad}), theirs)


def test_words_added_to_a_copy_are_not_in_the_first(folder):
    ours = load_tokenizer(folder)
    size, changed = len(ours), copy.deepcopy(ours)
    changed.add_tokens(["<mill>", "<mill>_1"], single_word=False)
    assert (len(ours), len(changed)) == (size, size + 2)
    assert changed.ids("a <mill> at sea")[1] == size
    assert size not in ours.ids("a <mill> at sea")
