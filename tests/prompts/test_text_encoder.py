"""Tokens and windows: prompts of any length, never cut."""

import warnings

import pytest
import torch
from tiny_families import make_family
from tiny_pipeline import WINDOW, randomise, tiny_text_encoder, write_tokenizer

from ldm.checkpoint import load_folder, load_tokenizer
from ldm.checkpoint.peers import text_encoder_of
from ldm.errors import UserError
from ldm.prompts.text_encoder import Clip, TextEncoder, weighted
from ldm.runtime import choose

ROOM = WINDOW - 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    theirs = randomise(tiny_text_encoder(write_tokenizer(folder)))
    return Clip(load_tokenizer(folder), text_encoder_of(theirs))


@pytest.fixture(scope="module")
def text(clip):
    return TextEncoder((clip,))


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """The two encoders of SDXL, of 24 and 40 channels."""
    make_family("sdxl", folder := tmp_path_factory.mktemp("sdxl") / "model")
    parts = load_folder(folder, choose("cpu", "fp32"))
    pairs = ((parts.tokenizer, parts.text_encoder), (parts.tokenizer_2, parts.text_encoder_2))
    return TextEncoder(tuple(Clip(*pair) for pair in pairs))


def tokens(text, prompts, *args, **kwargs):
    return text.encode(prompts, *args, **kwargs).tokens


def test_short_prompt_is_what_transformers_makes_of_it(clip, tmp_path):
    prompts = ["the red boat", "", "Sea?  2 boats'", "<|endoftext|> red"]
    theirs = write_tokenizer(tmp_path)
    wanted = theirs(prompts, padding="max_length", max_length=WINDOW, return_tensors="pt").input_ids
    assert torch.equal(torch.cat([clip.tokenise(prompt) for prompt in prompts]), wanted)


@pytest.mark.parametrize(("words", "windows"), [(0, 1), (ROOM, 1), (ROOM + 1, 2), (2 * ROOM, 2), (50, 4)])
def test_long_prompt_is_read_in_windows(clip, words, windows):
    prompt = "red " * words
    assert clip.count_windows(prompt) == windows
    ids = clip.tokenise(prompt, windows)
    start, end = clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id
    assert ids.shape == (windows, WINDOW)
    assert (ids[:, 0] == start).all()
    red = clip.tokenizer.convert_tokens_to_ids("red</w>")
    assert (ids == red).sum(1).tolist() == [min(ROOM, words - k * ROOM) for k in range(windows)]
    assert all(row[1 + (row == red).sum()] == end for row in ids)


def test_no_token_is_lost(clip):
    prompt = "the red boat at sea " * 10
    whole = clip.tokenizer.ids(prompt)
    ids = clip.tokenise(prompt, clip.count_windows(prompt))
    special = {clip.tokenizer.bos_token_id, clip.tokenizer.eos_token_id}
    assert [token for token in ids.flatten().tolist() if token not in special] == whole
    with pytest.raises(ValueError, match="do not fit"):
        clip.tokenise(prompt, 1)


def test_windows_are_encoded_one_by_one_and_follow_each_other(text):
    first, second = "red " * ROOM, "the sea"
    with pytest.warns(UserWarning, match="read in 2 parts"):
        long = tokens(text, [first + second])
    assert torch.allclose(long, torch.cat([tokens(text, [first]), tokens(text, [second])], 1), atol=1e-5)


def test_shorter_prompt_of_a_batch_gets_empty_windows(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = tokens(text, ["red " * (ROOM + 3), "sea"])
    assert both.shape == (2, 2 * WINDOW, 24)
    assert torch.allclose(both[1:], torch.cat([tokens(text, ["sea"]), tokens(text, [""])], 1), atol=1e-5)


def test_a_prompt_that_fits_warns_of_nothing(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode(["the red boat"])


def test_a_prompt_of_ten_thousand_letters(text):
    with pytest.warns(UserWarning, match="parts"):
        read = tokens(text, ["red " * 2500])
    assert read.shape[1] == -(-2500 // ROOM) * WINDOW
    assert read.isfinite().all()


@pytest.mark.parametrize("clip_skip", [3, 12, -1])
def test_clip_skip_that_leaves_no_layer(text, clip_skip):
    with pytest.raises(UserError, match=f"clip_skip {clip_skip} .* 3 layers"):
        text.encode(["sea"], clip_skip)


# --- two encoders ----------------------------------------------------------------------------------------


def test_each_tokenizer_pads_with_its_own_token(xl):
    first, second = (clip.tokenise("red")[0] for clip in xl.clips)
    assert torch.equal(first[:3], second[:3])
    assert (first[3:] == xl.clips[0].tokenizer.eos_token_id).all()
    assert (second[3:] == 0).all()


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_penultimate_layers_side_by_side_without_the_final_norm(xl, clip_skip):
    read = xl.encode(["the red boat", "sea"], clip_skip, prompts_2=["a boat", "red"])
    layer = -2 - (clip_skip or 0)
    for clip, prompts, channels in zip(
        xl.clips, [["the red boat", "sea"], ["a boat", "red"]], [slice(24), slice(24, 64)], strict=True
    ):
        ids = clip.tokenizer(prompts, padding="max_length", max_length=WINDOW, return_tensors="pt").input_ids
        out = clip.model(ids)
        assert torch.allclose(read.tokens[..., channels], out.hidden_states[layer], atol=1e-5)
    assert torch.allclose(read.pooled, out.text_embeds, atol=1e-5)


def test_both_read_as_many_windows_and_the_first_is_pooled(xl):
    """Of different lengths: the second text needs three windows, the first one."""
    long = "red " * ROOM + "the sea " * ROOM
    with pytest.warns(UserWarning, match="read in 3 parts"):
        both = xl.encode(["boat", "sea"], prompts_2=[long, "red"])
    assert both.tokens.shape == (2, 3 * WINDOW, 64)
    alone = xl.encode(["boat", "sea"], prompts_2=["red " * ROOM, "red"])
    assert torch.allclose(both.pooled, alone.pooled, atol=1e-5)
    assert torch.allclose(both.tokens[:, :WINDOW], alone.tokens, atol=1e-5)


def test_clip_skip_counts_from_the_penultimate_layer(xl):
    with pytest.raises(UserError, match=r"clip_skip 2 .* 2 layers"):
        xl.encode(["sea"], 2)


def test_the_refiner_has_the_second_only(xl):
    alone = TextEncoder(xl.clips[1:]).encode(["the red boat"])
    both = xl.encode(["sea"], prompts_2=["the red boat"])
    assert torch.allclose(alone.tokens, both.tokens[..., 24:], atol=1e-5)
    assert torch.allclose(alone.pooled, both.pooled, atol=1e-5)


# --- weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", ["a1111", "comfy"])
def test_weights_of_1_change_no_bit(text, grammar):
    plain = tokens(text, ["a red boat at sea"])
    assert torch.equal(plain, tokens(text, ["a (red:1) (boat at:1.0) sea"], grammar=grammar))
    assert torch.equal(plain, tokens(text, ["a red boat at sea"], grammar=grammar))


def test_weights_scale_and_the_windows_mean_stays(text):
    """AUTOMATIC1111's rule, window by window."""
    prompt, written = "the red boat " * 6, "the (red:1.4) boat " * 6
    plain = tokens(text, [prompt]).reshape(-1, WINDOW, text.width)
    found = tokens(text, [written], grammar="a1111").reshape(plain.shape)
    ids = text.clips[0].tokenise(prompt, len(plain))
    red = text.clips[0].tokenizer.convert_tokens_to_ids("red</w>")
    scaled = plain.double() * torch.where(ids == red, 1.4, 1.0)[..., None]
    wanted = scaled * (plain.double().mean((1, 2)) / scaled.mean((1, 2)))[:, None, None]
    assert (found.double() - wanted).norm() < 1e-6 * wanted.norm()
    assert found.mean((1, 2)) == pytest.approx(plain.mean((1, 2)), rel=1e-4)


def test_comfys_weights_lead_away_from_the_empty_prompt(text):
    plain, empty = tokens(text, ["red boat", ""])
    (found,) = tokens(text, ["(red:1.5) boat"], grammar="comfy")
    wanted = plain.clone()
    wanted[1] = empty[1] + 1.5 * (plain[1] - empty[1])  # after the start
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.equal(found[[0, *range(2, WINDOW)]], plain[[0, *range(2, WINDOW)]])


@pytest.mark.parametrize("grammar", ["a1111", "comfy"])
def test_weights_do_not_depend_on_the_neighbours(text, grammar):
    alone = tokens(text, ["(red:1.5) boat"], grammar=grammar)
    beside = tokens(text, ["(the sea:0.2)", "(red:1.5) boat", "boat"], grammar=grammar)
    assert torch.allclose(alone[0], beside[1], atol=1e-6)
    assert torch.allclose(beside[2], tokens(text, ["boat"])[0], atol=1e-6)


@pytest.mark.parametrize("grammar", ["a1111", "comfy"])
def test_both_encoders_weigh_and_pooled_text_does_not(xl, grammar):
    plain, found = xl.encode(["a red boat"]), xl.encode(["a (red:1.5) boat"], grammar=grammar)
    assert torch.allclose(plain.pooled, found.pooled, atol=1e-6)
    for part in (slice(24), slice(24, None)):
        assert (plain.tokens[0, 2, part] - found.tokens[0, 2, part]).norm() > 0.1 * plain.tokens[
            0, 2, part
        ].norm()


def test_weights_that_cancel_are_told():
    hidden = torch.ones(1, 4, 2)
    with pytest.raises(UserError, match="cancel each other"):
        weighted(hidden, torch.tensor([[1.0, -3.0, 1.0, 1.0]]), hidden[:0])
