"""Marks in prompts through the pipeline: weights, composition, edits over the steps."""

import pytest
import torch

import ldm
from ldm.diffusion.solvers import Denoised
from ldm.errors import UserError
from ldm.models.conditioning import Conditioning
from ldm.pipeline import networks
from ldm.pipeline.conditioning import texts_at
from ldm.request import Request

COMMON = {
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
    "output_type": "latent",
    "seed": 3,
    "sampler": "dpmpp_2m",
}


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, device="cpu", dtype="fp32")


def draw(pipe, prompt, **arguments):
    return pipe(prompt, **(COMMON | arguments)).images


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "prompt",
    ["a (red:1.0) boat", "(a red boat:1)", r"a red boat", "a red boat AND the sea:0", "[a red boat::9]"],
)
def test_marks_that_change_nothing(pipe, prompt):
    assert distance(draw(pipe, prompt), draw(pipe, "a red boat")) < 1e-6


@pytest.mark.parametrize(
    "prompt", ["a (red:1.5) boat", "a [red] boat", "a red BREAK boat", "a AND red boat", "[a:red:2] boat"]
)
def test_marks_change_the_picture_and_plain_ones_do_not(pipe, prompt):
    marked, plain = draw(pipe, prompt), draw(pipe, prompt, prompt_grammar="plain")
    assert distance(marked, plain) > 1e-3
    assert torch.equal(
        plain, pipe.draw(pipe.prepare(Request(**asked(prompt), version=2)), output_type="latent").images
    )


def asked(prompt):
    return {
        "prompt": prompt,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "seeds": (3,),
        "sampler": "dpmpp_2m",
    }


def test_a_composition_is_the_sum_of_its_guidances(pipe):
    """uncond + scale sum_i share_i (cond_i - uncond), with a guidance of one's own over three branches."""
    tokens = {name: pipe.text.encode([name]).tokens for name in ("red boat", "sea", "")}
    job = pipe.prepare(Request(**asked("red boat:0.7 AND sea:-0.4")))
    branches = {name: Conditioning(each) for name, each in tokens.items()}
    predict = networks.predict(pipe.unet, job.grid, branches)

    def by_hand(_, to_x0):
        def denoise(x, sigma):
            out = predict(x, sigma, tuple(tokens))
            uncond = out[""]
            whole = uncond + 4 * (0.7 * (out["red boat"] - uncond) - 0.4 * (out["sea"] - uncond))
            return Denoised(to_x0(whole, x, sigma))

        return denoise

    wanted = draw(pipe, "red boat", guidance_scale=None, guidance=by_hand)
    assert distance(draw(pipe, "red boat:0.7 AND sea:-0.4"), wanted) < 1e-5


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_a"])
def test_an_edit_is_another_text_from_its_step_on(pipe, sampler):
    """As diffusers' users do it, by replacing the embeddings in a callback."""
    other = pipe.text.encode(["blue boat"]).tokens

    def replace(pipe, i, t, given):
        return {"prompt_embeds": torch.cat([pipe.text.encode([""]).tokens, other])} if i == 1 else {}

    wanted = draw(pipe, "red boat", sampler=sampler, callback_on_step_end=replace)
    assert distance(draw(pipe, "[red:blue:2] boat", sampler=sampler), wanted) < 1e-6
    assert distance(draw(pipe, "[red:blue:0.5] boat", sampler=sampler), wanted) < 1e-6


def test_steps_are_those_that_are_drawn(pipe):
    """From an image, of the last `strength` of them."""
    request = Request(**asked("[red:blue:0.5] boat"))
    assert [texts_at(request.replace(prompt_grammar="a1111"), i, 2).prompts for i in range(2)] == [
        ("red boat",),
        ("blue boat",),
    ]


def test_the_negative_prompt_is_edited_too(pipe):
    edited = draw(pipe, "boat", negative_prompt="[red|blue] AND sea")
    assert distance(edited, draw(pipe, "boat", negative_prompt="red AND sea")) > 1e-4
    job = pipe.prepare(Request(**asked("boat"), negative_prompt="[red|blue] AND sea"))
    assert texts_at(job.request, 1, 4).negative == "blue AND sea"


PROMPTS = ["red boat AND sea:0.5", "boat", "[red|blue] (sea:1.4)", "a AND b AND c"]


def test_each_picture_of_a_batch_is_the_one_drawn_alone(pipe):
    together = draw(pipe, PROMPTS, seed=[3, 4, 5, 6])
    for i, prompt in enumerate(PROMPTS):
        assert distance(together[i : i + 1], draw(pipe, prompt, seed=3 + i)) < 1e-5


def test_two_encoders_are_composed_of_as_many(families):
    pipe = ldm.load(families("sdxl")[0], device="cpu", dtype="fp32")
    alike = draw(pipe, "red AND boat", prompt_2="sea AND sky")
    assert alike.isfinite().all()
    assert distance(draw(pipe, "red AND boat"), draw(pipe, "red AND boat", prompt_2="red AND boat")) == 0
    with pytest.raises(UserError, match="prompt and prompt_2 are composed by AND"):
        draw(pipe, "red AND boat", prompt_2="sea")


@pytest.mark.parametrize("prompt", ["a (boat:nan)", "(" * 300 + "a"])
def test_what_is_not_allowed_is_told_before_drawing(pipe, prompt):
    with pytest.raises(UserError, match="prompt"):
        pipe.prepare(Request(**asked(prompt)))


def test_the_grammar_is_kept_with_the_picture(pipe):
    image = pipe("a (red:1.5) boat", **(COMMON | {"output_type": "pil"}))
    assert image.request.prompt_grammar == "a1111"
