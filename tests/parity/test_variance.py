"""A U-Net that has learned its variance: pictures, folders and files, against diffusers' own modules.

diffusers' StableDiffusionPipeline would guide the variance too, so its loop is written here as in IFPipeline:
classifier-free guidance of the first half of the channels, the variance of the conditional branch.
"""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_pipeline import SCHEDULER, make_folder, randomise, tiny_unet

import ldm
from ldm.checkpoint import save_folder, save_model
from ldm.diffusion.methods.ancestral import ddpm
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError

PROMPT, NEGATIVE = "the red boat", "sea"
BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule")}
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def set_config(folder, **changes):
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder as diffusers saves it, not to be changed, and diffusers' pipeline."""
    folder = tmp_path_factory.mktemp("learned") / "model"
    scheduler = DDPMScheduler(**BETAS, clip_sample=False, variance_type="learned_range")
    pipe = make_folder(folder, scheduler=scheduler)
    pipe.unet = randomise(tiny_unet(out_channels=8))
    pipe.save_pretrained(folder)
    # So that runs end at timestep 0: from any other diffusers' last step adds noise to the finished picture,
    # of a variance that it takes for 1e-20, or for beta.
    set_config(folder, steps_offset=0)
    return folder, pipe


@pytest.fixture
def copy(learned, tmp_path):
    return shutil.copytree(learned[0], tmp_path / "copy")


def noise(seed=3):
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def draw(pipe, **arguments):
    common = {"negative_prompt": NEGATIVE, "output_type": "latent", "latents": noise(), "seed": 5}
    return pipe(PROMPT, **(common | {"num_inference_steps": 6, "guidance_scale": 4.0} | arguments)).images


@torch.no_grad()
def reference(pipe, scheduler, scale, **grid):
    """The loop of diffusers' IFPipeline."""
    cond, uncond = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    scheduler.set_timesteps(**grid)
    x, generator = noise(), torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        output = pipe.unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).sample
        (mean_uncond, _), (mean, variance) = (half.split(4, dim=1) for half in output.chunk(2))
        mean = mean_uncond + scale * (mean - mean_uncond)
        x = scheduler.step(torch.cat([mean, variance], dim=1), t, x, generator=generator).prev_sample
    return x


def error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


GRIDS = {
    "strided": ({"num_inference_steps": 10}, {"num_inference_steps": 10}),
    "listed": ({"timesteps": (999, 950, 600, 200, 40, 0)}, {"timesteps": [999, 950, 600, 200, 40, 0]}),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "zero_terminal"])
def test_it_draws_what_diffusers_draws(learned, copy, prediction, scale, grid):
    zero = prediction == "zero_terminal"
    changes = {"prediction_type": "v_prediction" if zero else prediction, "rescale_betas_zero_snr": zero}
    set_config(copy, **changes)
    scheduler = DDPMScheduler.from_pretrained(copy, subfolder="scheduler")
    assert scheduler.config.variance_type == "learned_range"
    ours, theirs = GRIDS[grid]
    pipe = ldm.load(copy, device="cpu", dtype="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of leading at zero terminal SNR
        drawn = draw(pipe, guidance_scale=scale, **({"num_inference_steps": None} | ours))
    assert error(drawn, reference(learned[1], scheduler, scale, **theirs)) < 1e-4


def test_another_variance_can_be_asked_for(learned, copy):
    pipe = ldm.load(copy, device="cpu", dtype="fp32")
    drawn = {}
    for kind in ("fixed_small", "fixed_large"):
        config = {**BETAS, "clip_sample": False, "variance_type": kind}
        theirs = reference(learned[1], _Fixed(DDPMScheduler(**config)), 4.0, num_inference_steps=6)
        solver = partial(ddpm, variance=kind)
        steps = [int(t) for t in pipe.schedule.grid(6, "leading", "ddpm").timesteps]
        drawn[kind] = draw(pipe, sampler=solver, num_inference_steps=None, timesteps=steps)
        assert error(drawn[kind], theirs) < 1e-4
    assert error(drawn["fixed_small"], drawn["fixed_large"]) > 0.01
    assert error(draw(pipe), drawn["fixed_small"]) > 0.01


class _Fixed:
    """A scheduler of fixed variance, which is told the mean alone."""

    def __init__(self, scheduler):
        self.scheduler, self.set_timesteps = scheduler, scheduler.set_timesteps

    @property
    def timesteps(self):
        return self.scheduler.timesteps

    def step(self, output, t, x, generator):
        return self.scheduler.step(output[:, :4], t, x, generator=generator)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])
def test_other_samplers_draw_by_the_mean(learned, copy, tmp_path, sampler):
    """What a U-Net draws that has no other channels."""
    pipe = ldm.load(copy, device="cpu", dtype="fp32")
    plain = shutil.copytree(copy, tmp_path / "plain")
    tensors = load_file(plain / UNET_FILE)
    tensors |= {name: tensors[name][:4].clone() for name in ("conv_out.weight", "conv_out.bias")}
    save_file(tensors, plain / UNET_FILE)
    config = json.loads((plain / "unet" / "config.json").read_text()) | {"out_channels": 4}
    (plain / "unet" / "config.json").write_text(json.dumps(config))
    set_config(plain, variance_type="fixed_small")
    wanted = draw(ldm.load(plain, device="cpu", dtype="fp32"), sampler=sampler, num_inference_steps=3)
    assert error(draw(pipe, sampler=sampler, num_inference_steps=3), wanted) < 1e-5


# --- on disk ---------------------------------------------------------------------------------------------


def test_what_is_saved_opens_in_diffusers_and_in_one_file(learned, tmp_path):
    pipe = ldm.load(learned[0], device="cpu", dtype="fp32")
    wanted = draw(pipe)
    save_folder(tmp_path / "folder", pipe.parts)
    save_model(tmp_path / "one.safetensors", pipe.parts)
    for place in (tmp_path / "folder", tmp_path / "one.safetensors"):
        again = ldm.load(place, device="cpu", dtype="fp32")
        assert again.schedule.variance == "learned_range"
        assert torch.equal(draw(again), wanted)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)
    assert theirs.scheduler.config.variance_type == "learned_range"
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet")
    assert unet.config.out_channels == 8
    assert all(torch.equal(unet.state_dict()[k], v) for k, v in learned[1].unet.state_dict().items())


def test_a_mismatch_of_network_and_config_is_one_line(copy, tiny_folder, tmp_path):
    set_config(copy, variance_type="fixed_small")
    with pytest.raises(UserError, match=r"gives 8 channels, twice the VAE's 4.*set it to learned_range$"):
        ldm.load(copy)
    plain = shutil.copytree(tiny_folder, tmp_path / "plain")
    set_config(plain, variance_type="learned_range")
    with pytest.raises(UserError, match=r"gives 4 channels.*learned_range, which needs 8.*to fixed_small"):
        ldm.load(plain)
    with pytest.raises(UserError, match=r"unet: the U-Net gives 8 channels, twice the VAE's 4"):
        ldm.load(tiny_folder, unet=copy / "unet")
