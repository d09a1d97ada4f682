"""Guidances by name in whole drawings."""

import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import guiders
from family_inputs import INPUTS, error, latents
from PIL import Image
from tiny_pipeline import SCHEDULER, make_folder, randomise, tiny_unet

import ldm
from ldm.cli import txt2img
from ldm.diffusion.solvers import Denoised
from ldm.errors import UserError
from ldm.images.parameters import format_parameters, parse_parameters
from ldm.images.png import read_request
from ldm.pipeline import networks, prepare
from ldm.pipeline.deciding import plan
from ldm.request import Request
from ldm.serve.limits import Limits

NAMES = (
    "apg:eta=0.2,r=20,momentum=-0.5+interval:0.1,0.9",
    "tcfg+cfg_rescale",
    "cfg_zero_star",
    "cfgpp",
    "perp_neg",
    "fdg",
    "dynamic_thresholding:2,0.9",
    "autoguidance+mambo",
)
BETAS = ("beta_start", "beta_end", "beta_schedule")
COMMON = {"negative_prompt": "sea", "guidance_scale": 5.0, "sampler": "euler", "seed": 1}


class Rows:
    """The U-Net's calls while it is in use: rows of each."""

    def __init__(self, monkeypatch):
        self.calls, forward = [], ldm.models.UNet.forward

        def counted(unet, sample, *args, **kwargs):
            self.calls.append(len(sample))
            return forward(unet, sample, *args, **kwargs)

        monkeypatch.setattr(ldm.models.UNet, "forward", counted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of diffusers', and an earlier checkpoint of it."""
    root = tmp_path_factory.mktemp("guiding")
    make_folder(root / "model")
    shutil.copytree(root / "model", root / "earlier")
    unet = diffusers.UNet2DConditionModel.from_pretrained(root / "model", subfolder="unet")
    randomise(unet, scale=0.9)
    unet.save_pretrained(root / "earlier" / "unet")
    return root


@pytest.fixture(scope="module")
def pipe(folder):
    return ldm.load(folder / "model", device="cpu", dtype="fp32")


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_pictures_drawn_alone(pipe, name):
    common = {**COMMON, "guidance": name, "num_inference_steps": 4}
    prompts = ["the red boat", "sea"]
    batch = latents(pipe, prompts, **common)  # seeds 1 and 2
    alone = [latents(pipe, text, **{**common, "seed": seed}) for seed, text in enumerate(prompts, 1)]
    assert error(batch, torch.cat(alone)) < 1e-5
    assert error(batch, latents(pipe, prompts, **{**common, "guidance": None})) > 1e-4


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (None, [2, 2, 2, 2]),
        ("apg+interval:0.5,1", [1, 1, 2, 2]),
        ("cfg_zero_star:zero_init=1", [2, 2, 2]),
        ("perp_neg", [3, 3, 3, 3]),
        ("autoguidance", [1, 1] * 4),
        ("autoguidance+interval:0,0.5", [1, 1, 1, 1, 1, 1]),
    ],
)
def test_rows_that_are_not_needed_are_not_computed(pipe, monkeypatch, name, rows):
    made = Rows(monkeypatch)
    latents(pipe, guidance=name, num_inference_steps=4, spacing="trailing", **COMMON)
    assert made.calls == rows
    made.calls.clear()
    latents(pipe, guidance=name, num_inference_steps=4, **{**COMMON, "guidance_scale": 1.0})
    assert made.calls == [1] * 4


@pytest.mark.parametrize(
    ("name", "guider"),
    [
        ("cfg_rescale:0.7", guiders.ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.7)),
        ("tcfg", guiders.TangentialClassifierFreeGuidance(guidance_scale=5.0)),
        ("cfg_zero_star:0", guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=0)),
        (
            "apg:eta=0,r=5,momentum=-0.5,space=output",
            guiders.AdaptiveProjectedGuidance(
                guidance_scale=4.0,
                eta=0.0,
                adaptive_projected_guidance_rescale=5.0,
                adaptive_projected_guidance_momentum=-0.5,
                use_original_formulation=True,
            ),
        ),
        ("autoguidance", guiders.AutoGuidance(guidance_scale=5.0, auto_guidance_layers=[0], dropout=1.0)),
    ],
)
@torch.no_grad()
def test_draws_as_diffusers_with_its_guider(folder, pipe, name, guider):
    """Their U-Net, scheduler and guider in a plain loop. Their "unconditional" network is told as the paper
    has it: the same text, without the middle block."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    scheduler = diffusers.EulerDiscreteScheduler(**{key: SCHEDULER[key] for key in BETAS})
    cond, uncond = theirs.encode_prompt("the red boat", "cpu", 1, True, negative_prompt="sea")
    scheduler.set_timesteps(4)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    x, middle = noise * scheduler.init_noise_sigma, theirs.unet.mid_block
    for i, t in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(x, t)
        good = theirs.unet(sample, t, cond).sample
        theirs.unet.mid_block = None if name == "autoguidance" else middle
        bad = theirs.unet(sample, t, cond if name == "autoguidance" else uncond).sample
        theirs.unet.mid_block = middle
        guider.set_state(i, 4, t)
        guider.prepare_inputs({"x": (good, bad)})
        x = scheduler.step(guider.forward(pred_cond=good, pred_uncond=bad).pred, t, x).prev_sample
    common = {**COMMON, "num_inference_steps": 4, "spacing": "linspace"}
    assert error(latents(pipe, latents=noise, guidance=name, **common), x) < 1e-4


def test_an_earlier_checkpoint_is_the_worse_model(folder, pipe, monkeypatch):
    """Drawn by hand: two networks, one text."""
    name = f"autoguidance:{folder / 'earlier'}"
    got = pipe("the red boat", num_inference_steps=3, guidance=name, output_type="latent", **COMMON)
    other = ldm.load(folder / "earlier", device="cpu", dtype="fp32")

    def worse(predict, to_x0):
        job = other.prepare(Request(prompt="the red boat", num_inference_steps=3, sampler="euler"))
        ask = networks.predict(other.unet, job.grid, {"cond": job.encode(0)[0]})

        def denoise(x, sigma):
            good, bad = predict(x, sigma, ("cond",))["cond"], ask(x, sigma, ("cond",))["cond"]
            return Denoised(to_x0(bad + 5.0 * (good - bad), x, sigma))

        return denoise

    want = latents(pipe, seed=1, guidance=worse, sampler="euler")
    assert error(got.images, want) < 1e-5
    kept = str(got.request.guidance)
    assert kept.startswith(f"autoguidance:model={folder / 'earlier'},hash=")
    again = latents(pipe, guidance=kept, **COMMON)
    assert torch.equal(again, got.images)
    with pytest.raises(UserError, match="is not the model that this was drawn with"):
        latents(pipe, guidance=kept[:-1] + ("0" if kept[-1] != "0" else "1"), **COMMON)


def test_words_that_are_not_there_ask_for_nothing(pipe):
    """Perp-Neg without a negative prompt is CFG: its branches "uncond" and "empty" are one."""
    plain = {**COMMON, "negative_prompt": None}
    assert error(latents(pipe, guidance="perp_neg", **plain), latents(pipe, **plain)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_composed_prompts_and_changing_ones(pipe, name):
    prompt = "the red boat AND a red sea:0.5"
    drawn = latents(pipe, prompt, guidance=name, **COMMON)
    assert torch.isfinite(drawn).all()
    assert error(drawn, latents(pipe, "the red boat", guidance=name, **COMMON)) > 1e-3
    latents(pipe, "the [red:sea:1] boat", guidance=name, **COMMON)


@pytest.mark.parametrize(
    ("family", "arguments", "said"),
    [
        ("pix2pix", {"guidance": "apg"}, "guidance apg is not for instruct-pix2pix models"),
        ("lcm", {"guidance": "tcfg"}, "guidance tcfg is not for this model, which is told its guidance"),
        ("sdxl", {"guidance": "fdg", "sampler": "euler_cfg_pp"}, "fdg is not allowed with euler_cfg_pp"),
        ("sdxl", {"guidance": "interval:0,0.5", "guidance_interval": (0, 0.5)}, "say the same twice"),
        ("sdxl", {"guidance": "cfg_rescale", "guidance_rescale": 0.5}, "say the same twice"),
        ("sdxl", {"guidance": "interval:0.5,0.2"}, "start 0.5 must be less than stop 0.2"),
        ("sdxl", {"guidance": "autoguidance:no/such/model"}, "no/such/model"),
        ("sdxl", {"guidance": 7}, "guidance 7 is not allowed: it must be a name"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_drawn(
    models, monkeypatch, family, arguments, said
):
    pipe, made = models(family), Rows(monkeypatch)
    with pytest.raises(UserError) as caught:
        latents(pipe, **{**INPUTS[family], "guidance_scale": 5.0, **arguments})
    assert said in str(caught.value)
    assert made.calls == []


@pytest.mark.parametrize(
    ("family", "name", "same"),
    [
        (
            "pix2pix",
            "cfg_rescale:0.5+interval:0,0.5",
            {"guidance_rescale": 0.5, "guidance_interval": (0, 0.5)},
        ),
        ("lcm", "cfg", {}),
        ("sdxl", "cfg_rescale:0.5", {"guidance_rescale": 0.5}),
        ("inpaint", "interval:0.2,0.9", {"guidance_interval": (0.2, 0.9)}),
    ],
)
def test_names_of_what_fields_say_draw_the_same(models, family, name, same):
    pipe, common = models(family), {**INPUTS[family], "guidance_scale": 5.0, "seed": 1}
    assert error(latents(pipe, guidance=name, **common), latents(pipe, **common, **same)) < 1e-4


def test_a_cfg_plus_plus_sampler_has_it_by_itself(pipe):
    """The name with the plain sampler is the sampler of that name."""
    plain = latents(pipe, guidance="cfgpp", **COMMON)
    assert error(plain, latents(pipe, **{**COMMON, "sampler": "euler_cfg_pp"})) < 1e-6


def test_a_callback_changes_the_scale_of_a_named_guidance(pipe):
    def stronger(pipe, step, timestep, seen):
        return {"guidance_scale": 9.0} if step == 0 else {}

    call = {**COMMON, "guidance": "apg:eta=0.5"}
    changed = latents(pipe, callback_on_step_end=stronger, **call)
    assert error(changed, latents(pipe, **call)) > 1e-3


def test_a_picture_keeps_its_guidance(pipe, folder, tmp_path):
    request = Request(prompt="a boat", guidance="interval:0.2,0.8+APG:0", seeds=(3,), num_inference_steps=2)
    assert request.guidance == "apg:eta=0,r=0,momentum=0,space=x0+interval:start=0.2,stop=0.8"
    assert Request.from_json(request.to_json()) == request
    assert parse_parameters(format_parameters(request)).guidance == request.guidance
    argv = ["-p", "a boat", "-s", "3", "--steps", "2", "--guidance", "APG:0+interval:0.2,0.8", "-q"]
    argv += ["-m", str(folder / "model"), "-o", str(tmp_path / "a.png"), "--device", "cpu", "--dtype", "fp32"]
    assert txt2img(argv) == 0
    kept = read_request(tmp_path / "a.png")
    assert kept.guidance == request.guidance
    again = pipe.generate(kept).images[0]
    assert again.tobytes() == Image.open(tmp_path / "a.png").tobytes()


def test_a_server_opens_no_model_for_a_guidance():
    with pytest.raises(UserError, match="not allowed here with another model"):
        Limits().check(Request(guidance="apg+autoguidance:/etc"), ())
    with pytest.raises(UserError, match="not allowed here with another model"):
        Limits().check(Request(hires=Request(guidance="autoguidance:/etc")), ())
    Limits().check(Request(guidance="apg+autoguidance"), ())


def test_a_model_that_says_its_variance_is_asked_in_every_step(tmp_path):
    make_folder(tmp_path / "model")
    unet = tiny_unet(out_channels=8)
    randomise(unet).save_pretrained(tmp_path / "model" / "unet")
    scheduler = diffusers.DDPMScheduler(
        **{key: SCHEDULER[key] for key in BETAS}, variance_type="learned_range"
    )
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    pipe = ldm.load(tmp_path / "model", device="cpu", dtype="fp32")
    call = {**COMMON, "sampler": "ddpm"}
    with pytest.raises(UserError, match="give zero_init=0"):
        latents(pipe, guidance="cfg_zero_star", **call)
    for name in ("cfg_zero_star:0", "apg:eta=0.5,momentum=-0.5", "autoguidance"):
        drawn = latents(pipe, guidance=name, **call)
        assert drawn.shape[1] == 4
        assert torch.isfinite(drawn).all()
    assert error(latents(pipe, guidance="apg:eta=1", **call), latents(pipe, **call)) < 1e-4


def test_planned_memory_knows_the_branches_and_has_no_room_for_another_model(folder):
    pipe = ldm.load(folder / "model", device="cpu", dtype="fp32", max_memory="64GiB")
    asked = {"prompt": "a boat", "guidance_scale": 5.0}
    rows = {
        name: plan._branches(prepare(replace(pipe, max_memory=None), Request(**asked, guidance=name)))
        for name in (None, "interval:0,0.5", "perp_neg", "autoguidance", "apg+pag")
    }
    assert rows == {None: 2, "interval:0,0.5": 2, "perp_neg": 3, "autoguidance": 2, "apg+pag": 3}
    with pytest.raises(UserError, match="no other model beside max_memory"):
        latents(pipe, guidance=f"autoguidance:{folder / 'earlier'}", **COMMON)
    assert torch.isfinite(latents(pipe, guidance="autoguidance", **COMMON)).all()
