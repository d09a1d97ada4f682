"""CLIP's vocabulary as it comes with the package."""

import pytest

from ldm.checkpoint.tokenizer import bpe, make_tokenizer

# Ids that OpenAI's CLIP gives: its own examples, and those in the tests of transformers and open_clip.
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "hello world!": [3306, 1002, 256],
    "A photo of   a DIAGRAM": [320, 1125, 539, 320, 22697],
}


@pytest.fixture(scope="module")
def clip():
    return make_tokenizer({"pad_token": "<|endoftext|>"})


@pytest.mark.parametrize("text", KNOWN)
def test_ids_are_those_of_clip(clip, text):
    assert clip(text).input_ids == [49406, *KNOWN[text], 49407]


def test_there_are_as_many_tokens_as_in_clip(clip):
    vocabulary, merges = bpe()
    assert len(clip) == len(vocabulary) == 49408
    assert len(merges) == 48894
    assert vocabulary["!"] == 0
    assert vocabulary["<|endoftext|>"] == 49407


def test_clip_pads_with_the_end_and_open_clip_with_zero(clip):
    open_clip = make_tokenizer({"pad_token": "!"})
    ids = [each("a", padding="max_length").input_ids for each in (clip, open_clip)]
    assert [len(each) for each in ids] == [77, 77]
    assert ids[0][2:] == [49407] * 75
    assert ids[1][2:] == [49407] + [0] * 74


def test_every_byte_and_every_language_is_there(clip):
    for text in ("naïve café", "雪の山", "🙂", "a\tb\nc", "1234 ½"):
        assert clip.unk_token_id not in clip(text).input_ids[1:-1]


def test_a_description_makes_the_same_tokenizer(clip):
    again = make_tokenizer(clip.describe())
    text = "an oil painting of 3 foxes, 4k -- 'soft' light"
    assert again(text).input_ids == clip(text).input_ids
    assert again.pad_token == clip.pad_token
