"""Tokens and windows: prompts of any length, never cut."""

import warnings

import pytest
import torch
from tiny_pipeline import WINDOW, randomise, tiny_text_encoder, write_tokenizer

from ldm.errors import UserError
from ldm.text import TextEncoder

ROOM = WINDOW - 2


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return TextEncoder(tokenizer, randomise(tiny_text_encoder(tokenizer)))


def test_short_prompt_is_what_transformers_makes_of_it(text):
    prompts = ["the red boat", "", "Sea?  2 boats'", "<|endoftext|> red"]
    wanted = text.tokenizer(prompts, padding="max_length", max_length=WINDOW, return_tensors="pt").input_ids
    assert torch.equal(torch.cat([text.tokenise(prompt) for prompt in prompts]), wanted)


@pytest.mark.parametrize(("words", "windows"), [(0, 1), (ROOM, 1), (ROOM + 1, 2), (2 * ROOM, 2), (50, 4)])
def test_long_prompt_is_read_in_windows(text, words, windows):
    prompt = "red " * words
    assert text.count_windows(prompt) == windows
    ids = text.tokenise(prompt, windows)
    start, end = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    assert ids.shape == (windows, WINDOW)
    assert (ids[:, 0] == start).all()
    red = text.tokenizer.convert_tokens_to_ids("red</w>")
    assert (ids == red).sum(1).tolist() == [min(ROOM, words - k * ROOM) for k in range(windows)]
    assert all(row[1 + (row == red).sum()] == end for row in ids)


def test_no_token_is_lost(text):
    prompt = "the red boat at sea " * 10
    whole = text.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    ids = text.tokenise(prompt, text.count_windows(prompt))
    special = {text.tokenizer.bos_token_id, text.tokenizer.eos_token_id}
    assert [token for token in ids.flatten().tolist() if token not in special] == whole
    with pytest.raises(ValueError, match="do not fit"):
        text.tokenise(prompt, 1)


def test_windows_are_encoded_one_by_one_and_follow_each_other(text):
    first, second = "red " * ROOM, "the sea"
    with pytest.warns(UserWarning, match="read in 2 parts"):
        long = text.encode([first + second])
    assert torch.allclose(long, torch.cat([text.encode([first]), text.encode([second])], 1), atol=1e-5)


def test_shorter_prompt_of_a_batch_gets_empty_windows(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = text.encode(["red " * (ROOM + 3), "sea"])
    assert both.shape == (2, 2 * WINDOW, 24)
    assert torch.allclose(both[1:], torch.cat([text.encode(["sea"]), text.encode([""])], 1), atol=1e-5)


def test_a_prompt_that_fits_warns_of_nothing(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(["the red boat"])


def test_a_prompt_of_ten_thousand_letters(text):
    with pytest.warns(UserWarning, match="parts"):
        tokens = text.encode(["red " * 2500])
    assert tokens.shape[1] == -(-2500 // ROOM) * WINDOW
    assert tokens.isfinite().all()


@pytest.mark.parametrize("clip_skip", [3, 12, -1])
def test_clip_skip_that_leaves_no_layer(text, clip_skip):
    with pytest.raises(UserError, match=f"clip_skip {clip_skip} .* 3 layers"):
        text.encode(["sea"], clip_skip)
