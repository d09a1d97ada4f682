"""Drawing faster at a price: guidance in an interval, deep features kept over steps, merged tokens."""

import threading
from dataclasses import replace

import pytest
import torch
from family_inputs import INPUTS, error, picture

import ldm
from ldm import cli
from ldm.checkpoint.parts import Defaults
from ldm.diffusion.deep_cache import DeepCache
from ldm.diffusion.guidance import CFG
from ldm.pipeline import networks
from ldm.request.fast import fast_fields

FEW = {"num_inference_steps": 4, "output_type": "latent", "seed": 4}
SAVINGS = [
    {"guidance_interval": (0.25, 0.75)},
    {"cache_interval": 2, "cache_branch_id": 1},
    {"token_merging_ratio": 0.5},
    {"guidance_interval": (0.25, 0.75), "cache_interval": 3, "token_merging_ratio": 0.3},
]


@pytest.fixture(scope="module")
def pipe(models):
    return models("sd1")


@pytest.mark.parametrize(
    "nothing",
    [
        {"guidance_interval": (0, 1)},
        {"cache_interval": 1},
        {"cache_interval": 1, "cache_branch_id": 3},
        {"token_merging_ratio": 0.0},
    ],
)
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m_sde"])
def test_nothing_saved_is_bit_for_bit_the_picture(pipe, nothing, sampler):
    asked = {**FEW, "sampler": sampler, "guidance_rescale": 0.3}
    assert torch.equal(pipe("sea", **asked).images, pipe("sea", **asked, **nothing).images)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "pix2pix", "inpaint"])
@pytest.mark.parametrize("savings", SAVINGS)
def test_a_batch_and_threads_are_as_alone(models, family, savings):
    pipe, asked = models(family), {**INPUTS[family], **FEW, **savings}
    seeds, drawn = (1, 2), {}
    asked.pop("seed")
    batch = pipe(["sea", "boat"], **asked, seed=list(seeds)).images

    def draw(k, prompt):
        drawn[k] = pipe(prompt, seed=k, **asked).images[0]

    threads = [threading.Thread(target=draw, args=each) for each in zip(seeds, ["sea", "boat"], strict=True)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for k, one in zip(seeds, batch, strict=True):
        assert error(one, drawn[k]) < 1e-5
    exact = {name: value for name, value in asked.items() if name not in savings}
    assert error(batch, pipe(["sea", "boat"], **exact, seed=list(seeds)).images) > 1e-3


def test_a_drawing_with_all_of_it_by_hand(pipe):
    """Euler's steps, each branch alone: which rows the U-Net is asked for, and what it goes on from."""
    asked = {
        "sampler": "euler",
        "spacing": "trailing",
        "guidance_interval": (0.25, 0.75),
        "cache_interval": 3,
    }
    request = ldm.Request(prompt="sea", num_inference_steps=8, guidance_scale=3.0, cache_branch_id=2, **asked)
    job = pipe.prepare(request.replace(token_merging_ratio=0.4))
    cond, uncond = job.encode(0)
    x = job.sampler.noise([0]).initial(job.start.shape) * job.grid.initial_scale
    deep, made = {}, {}
    with torch.no_grad():
        for i, (sigma, after) in enumerate(zip(job.grid.sigmas[:-1], job.grid.sigmas[1:], strict=True)):
            texts = {"cond": cond} | ({"uncond": uncond} if 2 <= i < 6 else {})
            # The first call of "uncond", in step 2, makes that one whole, and so the next is 5.
            if any(name not in made or i - made[name] >= 3 for name in texts):
                made.update(dict.fromkeys(texts, i))
                for name in texts:
                    deep.pop(name, None)
            out, scaled = {}, (x / (sigma**2 + 1).sqrt()).float()
            for name, each in texts.items():
                args = scaled, job.grid.timesteps[i].float(), each.tokens, 2, deep.get(name), 0.4
                out[name], deep[name] = pipe.unet.from_deep(*args)
            guided = out["cond"]
            if "uncond" in out:
                guided = out["uncond"] + 3 * (out["cond"] - out["uncond"])
            x0 = pipe.schedule.prediction.x0(guided, x, sigma)
            x = x0 + after / sigma * (x - x0)
    assert made == {"cond": 5, "uncond": 5}
    got = pipe.draw(job, output_type="latent").images
    assert error(got, x.float()) < 1e-4


def test_outside_of_the_interval_one_row_is_computed(pipe, monkeypatch):
    rows, unet = [], networks._unet

    def watched(module, grid, x, sigma, cond, *others):
        rows.append(len(cond))
        return unet(module, grid, x, sigma, cond, *others)

    monkeypatch.setattr(networks, "_unet", watched)
    asked = {"num_inference_steps": 8, "sampler": "ddim", "spacing": "trailing", "output_type": "latent"}
    pipe("sea", guidance_interval=(0, 0.5), **asked)
    assert rows == [2, 2, 2, 2, 1, 1, 1, 1]
    rows.clear()
    pipe(
        "sea", guidance_interval=(0.5, 0.75), image=picture(), strength=0.75, **asked
    )  # of timesteps, not steps
    assert rows == [1, 1, 2, 2, 1, 1]


def test_another_text_is_not_drawn_from_the_old_ones_features(pipe, monkeypatch):
    """With a prompt that changes in the middle, the step where it does is whole."""
    text, others = "[sea:boat:0.5]", {"cache_interval": 4, "cache_branch_id": 3, "sampler": "ddim"}
    whole = []
    job = pipe.prepare(ldm.Request(prompt=text, num_inference_steps=4, guidance_scale=1.0, **others))
    original = DeepCache.keep

    def keep(cache, told, sigma, features):
        whole.append(float(sigma))
        original(cache, told, sigma, features)

    monkeypatch.setattr(DeepCache, "keep", keep)
    pipe.draw(job, output_type="latent")
    assert whole == [float(job.grid.sigmas[k]) for k in (0, 2)]


def test_windows_have_features_of_their_own(pipe):
    asked = {**FEW, "height": 16, "width": 32, "tile_size": 16, "tile_overlap": 0, "sampler": "ddim"}
    asked |= {"cache_interval": 2, "cache_branch_id": 3, "guidance_scale": 1.0}
    noise = torch.randn(1, 4, 8, 16)
    half = noise.shape[-1] // 2
    whole = pipe("sea", latents=noise, **asked).images
    asked |= {"tile_size": None, "tile_overlap": None, "width": 16}
    left, right = (pipe("sea", latents=part, **asked).images for part in noise.split(half, dim=-1))
    assert error(whole, torch.cat([left, right], dim=-1)) < 1e-4


def test_a_second_pass_and_a_refiner_save_too(models, pipe):
    job = pipe.prepare(ldm.Request(num_inference_steps=30, hires_scale=2, fast=True))
    assert job.then.job.request.cache_interval == job.request.cache_interval == 3
    assert job.then.job.savings == job.savings
    xl = models("sdxl").with_refiner(models("refiner"))
    job = xl.prepare(ldm.Request(num_inference_steps=30, fast=True))
    assert job.savings.interval == 3
    assert job.then.job.savings == job.savings
    assert (job.then.job.guidance.low, job.then.job.guidance.high) == (job.guidance.low, job.guidance.high)


def test_a_callback_sees_what_guidance_has_and_changes_its_scale(pipe):
    seen, asked = [], {**FEW, "num_inference_steps": 8, "sampler": "ddim", "guidance_interval": (0.0, 0.5)}

    def note(_, step, t, given):
        seen.append(len(given["prompt_embeds"]))
        return {"guidance_scale": 7.5 if step == 1 else 2.0} if step < 2 else {"guidance_scale": 7.5}

    changed = pipe(
        "sea", callback_on_step_end=note, callback_on_step_end_tensor_inputs=["prompt_embeds"], **asked
    )
    assert set(seen) == {2}
    assert error(changed.images, pipe("sea", **asked).images) > 1e-3
    own = pipe("sea", guidance=CFG(7.5), **asked).images
    assert torch.equal(own, pipe("sea", guidance_scale=7.5, **asked).images)


def test_a_fast_picture_redraws_from_what_it_notes(folder_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["-m", str(folder_of("sd1")), "--device", "cpu", "--dtype", "fp32", "--quiet"]
    fast = ["-p", "sea", "--steps", "20", "--fast", "--cache-branch-id", "1", "-o", "a.png"]
    assert cli.txt2img([*model, *fast]) == 0
    noted = ldm.images.png.read_request(tmp_path / "a.png")
    want = {**fast_fields(20), "cache_branch_id": 1, "fast": None, "num_inference_steps": 20}
    assert {name: getattr(noted, name) for name in want} == want
    assert cli.main(["redraw", "a.png", *model]) == 0
    assert "equal: every pixel" in capsys.readouterr().out


def noiseless(pipe, **others):
    """The steps and the sampler of a fast picture, where the model's sampler adds noise."""
    own = Defaults(num_inference_steps=8, sampler="dpmpp_2m_sde")
    model = replace(pipe, parts=replace(pipe.parts, defaults=own))
    request = model.resolve(ldm.Request(fast=True, **others))
    return request.num_inference_steps, request.sampler


def test_fast_fills_in_what_is_left_out_by_the_models_steps(pipe):
    def filled(steps, **others):
        model = replace(pipe, parts=replace(pipe.parts, defaults=Defaults(num_inference_steps=steps)))
        request = model.resolve(ldm.Request(fast=True, **others))
        assert request.fast is None
        return request.num_inference_steps, request.cache_interval, request.guidance_interval

    assert filled(50) == (50, 5, (0, 0.75))
    assert filled(20) == (20, 2, (0, 0.75))
    assert filled(8) == (4, None, None)
    assert filled(15) == (8, None, None)
    assert filled(4) == (4, None, None)  # distilled
    assert filled(8, num_inference_steps=12) == (12, None, None)
    assert filled(8, num_inference_steps=30, guidance_interval=(0.2, 1)) == (30, 3, (0.2, 1))
    assert noiseless(pipe) == (3, "dpmpp_2m")
    assert noiseless(pipe, sampler="dpmpp_2m_sde") == (4, "dpmpp_2m_sde")
    assert noiseless(pipe, num_inference_steps=6) == (6, "dpmpp_2m_sde")
    edited = ldm.Request(fast=True, target_prompt="a boat")
    job = pipe.prepare(edited, ldm.pipeline.Inputs(image=picture()))
    assert (job.savings.interval, job.request.num_inference_steps) == (1, 50)
    assert pipe.resolve(ldm.Request(fast=False)) == pipe.resolve(ldm.Request())


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (
            {"guidance_interval": (0.5, 0.5)},
            r"guidance_interval .* two numbers from 0 to 1, the smaller first",
        ),
        ({"guidance_interval": (0, 1.5)}, r"guidance_interval .* two numbers from 0 to 1, the smaller first"),
        ({"cache_interval": 0}, "cache_interval 0 is not allowed: it must be a whole number from 1 to 100"),
        ({"cache_branch_id": 2}, "cache_branch_id is not allowed here: it goes with a cache_interval"),
        (
            {"cache_interval": 2, "cache_branch_id": 4},
            "cache_branch_id 4 is not allowed: this model has 0 to 3",
        ),
        (
            {"token_merging_ratio": 1.5},
            "token_merging_ratio 1.5 is not allowed: it must be a number from 0 to 1",
        ),
        (
            {"cache_interval": 2, "target_prompt": "a boat", "image": picture()},
            "cache_interval .* for an edit",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(pipe, asked, fault):
    with pytest.raises(ldm.UserError, match=fault):
        pipe("sea", num_inference_steps=4, **asked)
