"""One picture under two prompts, against a loop in the manner of the paper's own code on diffusers' U-Net."""

from functools import cache

import pytest
import torch

import ldm
from ldm import cli
from ldm.errors import UserError
from ldm.images.png import read_request
from ldm.pipeline.steering.prompt_to_prompt import mapping_of
from ldm.prompts.words import matched, words_of
from ldm.request import Request

SOURCE, SWAPPED, REFINED = (
    "a red boat on the sea",
    "a blue boat on the sea",
    "a red boat on the calm blue sea",
)
STEPS, SCALE = 5, 3.0
# Not the model's own levels: from the first of them, 4096, fp32 rounds the picture by 1e-4.
FEW = {
    "sigmas": (10.0, 4.0, 2.0, 1.0, 0.4, 0.0),
    "guidance_scale": SCALE,
    "sampler": "euler",
    "seed": 4,
    "width": 64,
}
FEW |= {"height": 64, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return ldm.load(dtype="fp32")


class Controlled:
    """An attention processor of diffusers; rows are [uncond, uncond, cond, cond] of source and target."""

    def __init__(self, state):
        self.state = state

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        q, k, v = (
            to(each).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for to, each in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        shares = torch.softmax(q @ k.mT * attn.scale, -1)
        self.state(shares, cross)
        return attn.to_out[0]((shares @ v).transpose(1, 2).flatten(2))


@cache
def unet_of(pipe):
    return pipe.to_diffusers().unet


class PublishedLoop:
    """`AttentionReplace`, `AttentionRefine` and `AttentionReweight`, by a mapper and its alphas."""

    def __init__(self, pipe, mapper, alphas, factors=None, cross=0.8, own=0.4, smallest=4):
        self.pipe, self.mapper, self.alphas, self.factors = pipe, mapper, alphas, factors
        self.cross, self.own, self.smallest, self.step = cross, own, smallest, 0

    def __call__(self, shares, is_cross):
        base, target = shares[2], shares[3].clone()
        if is_cross and self.step < int(self.cross * (STEPS + 1)):
            new = (base @ self.mapper) * self.alphas + target * (1 - self.alphas)
            shares[3] = new if self.factors is None else new * self.factors
        elif not is_cross and self.step < int(self.own * STEPS) and len(base[0]) <= self.smallest:
            shares[3] = base

    @torch.no_grad()
    def draw(self, source, target):
        """Latents of both pictures."""
        pipe = self.pipe
        unet = unet_of(pipe)
        unet.set_attn_processor(Controlled(self))
        job = pipe.prepare(
            Request(prompt=source, **{n: v for n, v in FEW.items() if n in Request.model_fields})
        )
        x = job.grid.initial_scale * job.start.unit(job.sampler.noise([FEW["seed"]] * 2), None)
        texts = pipe.text.encode(["", "", source, target]).tokens
        sigmas = job.grid.sigmas
        for self.step in range(STEPS):
            sigma, after = sigmas[self.step], sigmas[self.step + 1]
            scaled = (x / (sigma**2 + 1) ** 0.5).repeat(2, 1, 1, 1)
            out = unet(scaled, job.grid.t(sigma), encoder_hidden_states=texts).sample
            uncond, cond = out.chunk(2)
            x0 = pipe.schedule.prediction.x0(uncond + SCALE * (cond - uncond), x, sigma)
            x = x0 if after == 0 else x + (x - x0) / sigma * (after - sigma)
        return x


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_a_swap_of_words_is_the_published_loops(pipe):
    n = pipe.text.window
    source, target = PublishedLoop(pipe, torch.eye(n), torch.ones(n)).draw(SOURCE, SWAPPED).split(1)
    asked = {**FEW, "negative_prompt": ""}
    ours = pipe(SOURCE, target_prompt=SWAPPED, **asked)
    assert difference(ours.images, target) < 1e-4
    plain = pipe(SOURCE, **asked).images
    assert difference(source, plain) < 1e-4
    alone = pipe(SWAPPED, **asked).images
    assert difference(alone, target) > 1e-2
    assert (ours.request.cross_replace_steps, ours.request.self_replace_steps) == (0.8, 0.4)
    assert torch.equal(pipe.generate(ours.request, output_type="latent").images, ours.images)


def test_a_refinement_keeps_the_maps_of_new_words(pipe):
    n = pipe.text.window
    # a red boat on the (calm blue) sea: the two new ones after "the", place 5 counted from the start.
    mapper, alphas = torch.zeros(n, n), torch.ones(n)
    for place in range(n):
        if place in (6, 7):
            alphas[place] = 0
        elif place < 10:
            mapper[place if place < 6 else place - 2, place] = 1
        else:
            mapper[place, place] = 1
    _, target = PublishedLoop(pipe, mapper, alphas, cross=0.7, own=1.0).draw(SOURCE, REFINED).split(1)
    shares = {"cross_replace_steps": 0.7, "self_replace_steps": 1.0}
    ours = pipe(SOURCE, target_prompt=REFINED, negative_prompt="", **shares, **FEW).images
    assert difference(ours, target) < 1e-4


def test_words_are_reweighted(pipe):
    n = pipe.text.window
    factors = torch.ones(n)
    factors[2] = -1.5
    loop = PublishedLoop(pipe, torch.eye(n), torch.ones(n), factors)
    _, target = loop.draw(SOURCE, SOURCE).split(1)
    ours = pipe(SOURCE, target_prompt=SOURCE, negative_prompt="", word_weights={"red": -1.5}, **FEW).images
    assert difference(ours, target) < 1e-4


def test_the_same_prompt_and_no_steps_are_a_plain_drawing(pipe):
    plain = pipe(SOURCE, **FEW).images
    assert difference(pipe(SOURCE, target_prompt=SOURCE, **FEW).images, plain) < 1e-5
    none = {"cross_replace_steps": 0.0, "self_replace_steps": 0.0}
    alone = pipe(SWAPPED, **FEW).images
    assert difference(pipe(SOURCE, target_prompt=SWAPPED, **none, **FEW).images, alone) < 1e-5
    freely = {**FEW, "sampler": "dpmpp_2m_sde", "guidance_scale": 1.0}
    assert (
        difference(pipe(SOURCE, target_prompt=SOURCE, **freely).images, pipe(SOURCE, **freely).images) < 1e-5
    )


def test_each_picture_of_a_batch_is_the_one_drawn_alone(pipe):
    few = {**FEW, "seed": [7, 8, 9, 10], "num_images_per_prompt": 2}
    prompts, targets = [SOURCE, "a house"], [SWAPPED, "a tall house"]
    both = pipe(prompts, target_prompt=targets, **few).images
    for k in range(4):
        alone = pipe(prompts[k // 2], target_prompt=targets[k // 2], **{**FEW, "seed": 7 + k}).images
        assert difference(both[k : k + 1], alone) < 1e-4
    generator = torch.Generator().manual_seed(7)
    given = pipe(prompts[0], target_prompt=targets[0], **{**FEW, "seed": None}, generator=generator).images
    assert difference(given, both[:1]) < 1e-4


def test_where_words_are_matched(pipe):
    clip = pipe.text.clips[0]

    def pairs(source, target):
        found = matched(words_of(clip, source), words_of(clip, target))
        return [None if a is None else (a.text, b.text) for a, b in found]

    assert pairs("a red boat", "a blue house") == [("a", "a"), ("red", "blue"), ("boat", "house")]
    assert pairs("a red boat", "a boat") == [("a", "a"), ("boat", "boat")]
    assert pairs("boat sea boat", "a sea boat boat a") == [None, ("sea", "sea"), ("boat", "boat"), None, None]
    # A word of several tokens shares its map among those of the other, and what follows is moved.
    (long,) = words_of(clip, "zyxwv")
    size = len(long.places)
    assert size > 1
    asked = Request(prompt="red boat", target_prompt="zyxwv boat")
    found = mapping_of(clip, asked, clip.window)
    assert torch.equal(found.matrix[1, 1 : 1 + size], torch.full((size,), 1 / size))
    assert found.matrix[2, 1 + size] == found.matrix[3, 2 + size] == found.matrix[0, 0] == 1
    assert torch.allclose(found.matrix.sum(0)[2 + size :], torch.ones(1))


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"cross_replace_steps": 0.5}, "cross_replace_steps is not allowed here.*--to"),
        ({"target_prompt": "a", "word_weights": {"snow": 2}}, "snow is not allowed: .* words are a"),
        ({"target_prompt": "a AND b"}, "one text for all its steps"),
        ({"target_prompt": "a", "hires_scale": 2}, "target_prompt"),
        ({"target_prompt": "a", "regions": ["0,0,1,1: b"]}, "target_prompt"),
        (
            {"target_prompt": "a", "prompt": None, "prompt_embeds": torch.zeros(1, 77, 8)},
            "not as prompt_embeds",
        ),
        ({"target_prompt": "a", "self_replace_steps": 2.0}, "self_replace_steps"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_drawn(pipe, asked, line, monkeypatch):
    monkeypatch.setattr("ldm.pipeline.drawing.draw_latents", None)
    with pytest.raises(UserError, match=line):
        pipe(**{"prompt": "sea", **FEW, **asked})


def test_a_callback_sees_the_targets_and_may_change_them(pipe):
    seen = []

    def callback(_, i, t, given):
        seen.append(given["latents"].shape)
        return {"latents": given["latents"] * 0} if i == STEPS - 2 else {}

    drawn = pipe(SOURCE, target_prompt=SWAPPED, callback_on_step_end=callback, **FEW).images
    assert seen == [drawn.shape] * STEPS
    assert difference(drawn, pipe(SOURCE, target_prompt=SWAPPED, **FEW).images) > 1e-2


def test_the_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["txt2img", "-p", SOURCE, "--to", SWAPPED, "--word-weight", "blue=1.5", "--steps", "1"]
    argv += ["--self-replace-steps", "1", "-W", "32", "-H", "32", "-q", "--dtype", "fp32"]
    assert cli.main([*argv, "-o", "a.png"]) == 0
    request = read_request("a.png")
    assert (request.target_prompt, request.word_weights) == (SWAPPED, (("blue", 1.5),))
    assert (request.cross_replace_steps, request.self_replace_steps) == (0.8, 1.0)
    assert cli.main(["redraw", "a.png", "-q", "--dtype", "fp32"]) == 0
    assert "equal" in capsys.readouterr().out
