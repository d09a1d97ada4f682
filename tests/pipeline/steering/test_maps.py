"""Which places of a picture each word drew."""

import pytest
import torch
from torch.nn import functional as F

import ldm
from ldm import cli
from ldm.errors import UserError
from ldm.models.attention import Attention
from ldm.pipeline.steering.layers import attention_layers, is_cross, probabilities
from ldm.prompts.words import words_of
from ldm.request import Request

ASKED = Request(prompt="a red boat, (the sea:1.3)", num_inference_steps=2, width=64, height=32, seeds=(4, 5))


@pytest.fixture(scope="module")
def pipe():
    return ldm.load(dtype="fp32")


@pytest.fixture(scope="module")
def made(pipe):
    return pipe.attention_maps(ASKED)


def test_the_pictures_are_those_without_and_the_words_those_of_the_prompt(pipe, made):
    assert made.words == ("a", "red", "boat", ",", "the", "sea")
    assert made.maps.shape == (2, 6, 32, 64)
    assert list(made.images) == pipe.generate(ASKED).images
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_shares_of_all_tokens_sum_to_one(made):
    sums = made.tokens.sum(1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    assert made.tokens.min() >= 0
    own = F.interpolate(made.tokens[:, 2:3], (32, 64), mode="bilinear")
    assert torch.allclose(made.maps[:, 1:2], own)  # "red", after the start and "a"


def test_they_are_the_mean_of_softmax_in_float64(pipe, made):
    """Seen from outside: a hook on each layer of a copy, whose inputs are multiplied here."""
    import copy
    from dataclasses import replace

    unet, seen = copy.deepcopy(pipe.unet), []
    size = made.tokens.shape[-2:]

    def look(layer, given, kwargs, out):
        x, context, _, (height, width) = given
        if context is None:
            return
        split = lambda each: each.double().unflatten(2, (layer.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k = split(layer.to_q(x)), split(layer.to_k(context.tokens))
        shares = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1).mean(1)[len(x) // 2 :]
        maps = shares.transpose(1, 2).unflatten(2, (height, width))
        seen.append(F.interpolate(maps, size, mode="bilinear"))

    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.register_forward_hook(look, with_kwargs=True)
    watched = ldm.Pipeline.from_parts(replace(pipe.parts, unet=unet))
    watched.generate(ASKED)
    assert torch.allclose(torch.stack(seen).mean(0).float(), made.tokens, atol=1e-6)


def test_each_picture_is_alone_and_branches_may_be_called_one_by_one(pipe, made):
    alone = pipe.attention_maps(ASKED.replace(seeds=(5,)))
    assert torch.allclose(alone.maps, made.maps[1:], atol=1e-5)
    job = pipe.prepare(ASKED)
    job.model.unet.in_turn = True
    try:
        assert torch.allclose(pipe.attention_maps(ASKED).maps, made.maps, atol=1e-5)
    finally:
        job.model.unet.in_turn = False


def test_layers_by_their_short_names(pipe, made):
    mid = pipe.attention_maps(ASKED, ["mid"])
    assert not torch.allclose(mid.maps, made.maps, atol=1e-4)
    found = attention_layers(pipe.unet, ["mid", "up.0", "down_blocks"], cross=True)
    assert {name.split(".")[0] for name in found} <= {"mid_block", "up_blocks", "down_blocks"}
    assert all(is_cross(pipe.unet, name) and name.endswith("attn2") for name in found)
    everything = attention_layers(pipe.unet, ["down", "mid", "up"], cross=False)
    assert everything == {
        name
        for name, module in pipe.unet.named_modules()
        if isinstance(module, Attention) and name.endswith("attn1")
    }
    with pytest.raises(UserError, match=r"no layer 'side' attends.*mid_block"):
        pipe.attention_maps(ASKED, ["side"])


def test_scores_are_normalised_in_fp32():
    q, k = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(2, 3, 7, 8).bfloat16()
    expected = torch.softmax(q.double() @ k.double().mT / 8**0.5, -1)
    assert torch.allclose(probabilities(q, k).double(), expected, atol=1e-6)


def test_words_over_several_windows_and_learnt_ones(pipe):
    clip = pipe.text.clips[0]
    long = " ".join(["boat"] * clip.window)
    words = words_of(clip, long)
    assert [word.text for word in words] == ["boat"] * clip.window
    assert words[clip.window - 2].places == (clip.window + 1,)
    cut = words_of(clip, "naïve")
    assert [word.text for word in cut] == ["naïve"]
    assert len(cut[0].places) > 1


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"tile_size": 32}, "tile_size"),
        ({"prompt": "[a:b:0.5]"}, "changes over the steps"),
        ({"prompt": "a AND b"}, "composed by AND"),
        ({"prompt": ""}, "a prompt with words"),
        ({"regions": ["0,0,1,1: a"]}, "regions"),
    ],
)
def test_what_has_no_maps_is_told_before_anything_is_drawn(pipe, asked, line, monkeypatch):
    monkeypatch.setattr("ldm.pipeline.drawing.draw_batch", None)
    with pytest.raises(UserError, match=line):
        pipe.attention_maps(ASKED.replace(**asked))


def test_a_sheet_for_each_picture(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    argv = ["txt2img", "-p", "a red boat", "--steps", "1", "-W", "32", "-H", "32", "-q", "--dtype", "fp32"]
    assert cli.main([*argv, "-o", "plain.png"]) == 0
    assert cli.main([*argv, "-o", "a.png", "--attention-maps", "maps"]) == 0
    assert Image.open("a.png").tobytes() == Image.open("plain.png").tobytes()
    (sheet,) = (tmp_path / "maps").iterdir()
    with Image.open(sheet) as image:
        assert image.width > 3 * 32
    assert cli.main([*argv, "--tile-size", "16", "--attention-maps", "maps"]) == 2
