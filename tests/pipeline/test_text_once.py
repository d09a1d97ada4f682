"""What attentions make of the text is made once for all steps, and the picture is bit for bit the same."""

import pytest
import torch

import ldm
from ldm.models.attention import Attention
from ldm.models.clip import CLIPTextModel
from ldm.pipeline import networks

STEPS = {"num_inference_steps": 4, "sampler": "euler", "seed": 5, "width": 64, "height": 64}


@pytest.fixture
def pipe():
    return ldm.load()


@pytest.fixture
def read(monkeypatch):
    """The texts of which keys and values were made."""
    texts, plain = [], Attention._keys_and_values

    def counted(layer, context):
        if layer.to_k.in_features != layer.to_q.in_features:  # not of the latents themselves
            texts.append(context)
        return plain(layer, context)

    monkeypatch.setattr(Attention, "_keys_and_values", counted)
    return texts


def drawn(pipe, prompt, **fields):
    return torch.from_numpy(pipe(prompt, output_type="np", **{**STEPS, **fields}).images)


def attentions(pipe):
    return sum(
        isinstance(each, Attention) and each.to_k.in_features != each.to_q.in_features
        for each in pipe.unet.modules()
    )


def test_once_for_all_steps_and_the_same_to_the_bit(pipe, read, monkeypatch):
    once = drawn(pipe, "a red boat")
    assert len(read) == attentions(pipe)
    monkeypatch.setattr(networks, "Context", lambda tokens, *others: tokens)
    assert torch.equal(drawn(pipe, "a red boat"), once)
    assert len(read) == (1 + 4) * attentions(pipe)


def test_a_prompt_that_changes_is_read_again(pipe, read, monkeypatch):
    once = drawn(pipe, "a [red:blue:0.5] boat")
    assert len(read) == 2 * attentions(pipe)
    monkeypatch.setattr(networks, "Context", lambda tokens, *others: tokens)
    assert torch.equal(drawn(pipe, "a [red:blue:0.5] boat"), once)


def test_two_drawings_share_nothing(pipe, read):
    drawn(pipe, "a red boat")
    drawn(pipe, "a red boat")
    assert len(read) == 2 * attentions(pipe)


def test_prompts_of_a_call_read_their_negative_prompt_once(pipe, monkeypatch):
    rows, plain = [], CLIPTextModel.forward

    def counted(encoder, input_ids, *given, **named):
        rows.append(len(input_ids))
        return plain(encoder, input_ids, *given, **named)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    prompts, given = ["a red boat", "a house", "a red boat", "the sea"], {"negative_prompt": "snow"}
    together = drawn(pipe, prompts, **given)
    assert sum(rows) == len({*prompts, "snow"})
    assert torch.equal(together[1], drawn(pipe, "a house", **given, seed=STEPS["seed"] + 1)[0])
