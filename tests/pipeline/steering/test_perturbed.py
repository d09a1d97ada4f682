"""Guidance away from disturbed self-attention, against diffusers' pipelines and guiders."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.hooks.smoothed_energy_guidance_utils import _gaussian_blur_2d

import ldm
from ldm import cli
from ldm.diffusion.guidances.perturbed import blurred
from ldm.errors import UserError
from ldm.images.png import read_request
from ldm.pipeline import networks
from ldm.pipeline.sample import draw_latents
from ldm.request import Request

FEW = {"num_inference_steps": 2, "output_type": "latent", "negative_prompt": "sea"}
DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
DDIM |= {"steps_offset": 1}
BLOCKS = "mid_block.attentions.0.transformer_blocks"


@pytest.fixture(scope="module")
def pipe(models):
    return models("sd1")


@pytest.fixture(scope="module")
def peer(families):
    return families("sd1")[1]


@pytest.fixture(scope="module")
def ddim(pipe):
    config = {**DDIM, "_class_name": "DDIMScheduler"}
    return ldm.Pipeline.from_parts(replace(pipe.parts, scheduler=config))


def noise(pipe, count=1):
    shape = pipe.prepare(Request()).start.shape
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


def error(ours, theirs):
    ours, theirs = torch.as_tensor(np.asarray(ours)), torch.as_tensor(np.asarray(theirs))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def like(kind, peer, **more):
    """diffusers' pipeline of another kind with the same parts, and DDIM as `ddim` has it."""
    parts = {name: part for name, part in peer.components.items() if name != "scheduler"}
    return kind(**parts, scheduler=diffusers.DDIMScheduler(**DDIM), **more)


@pytest.mark.parametrize(
    ("layers", "theirs", "scale"),
    [("mid", ["mid"], 4.0), ("mid/up.1", ["mid", "up_blocks.1"], 4.0), ("down", ["down"], 1.0)],
)
def test_pag_draws_diffusers_picture(ddim, peer, layers, theirs, scale):
    pag = like(diffusers.StableDiffusionPAGPipeline, peer, pag_applied_layers=theirs)
    own = pag.unet.attn_processors
    few = {**FEW, "latents": noise(ddim), "guidance_scale": scale}
    try:
        expected = pag("red boat", pag_scale=3.0, **few).images
    finally:
        pag.unet.set_attn_processor(own)
    ours = ddim("red boat", guidance=f"pag:scale=3,layers={layers}", **few).images
    assert error(ours, expected) < 1e-4
    assert error(ddim("red boat", **few).images, expected) > 1e-3


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_sag_draws_diffusers_picture(ddim, peer, scale):
    sag = like(diffusers.StableDiffusionSAGPipeline, peer)
    few = {**FEW, "latents": noise(ddim), "guidance_scale": scale}
    expected = sag("red boat", sag_scale=0.75, **few).images
    ours = ddim("red boat", guidance="sag", **few).images
    assert error(ours, expected) < 1e-4
    assert error(ddim("red boat", **few).images, expected) > 1e-3


def guided(guider, peer, x, t, cond, uncond):
    """What a guider makes of diffusers' U-Net at one state."""
    guider.set_state(step=1, num_inference_steps=10, timestep=t)
    batches = guider.prepare_inputs({"tokens": (cond, uncond)})
    for batch in batches:
        guider._count_prepared += isinstance(guider, guiders.SmoothedEnergyGuidance)  # which forgets it
        guider.prepare_models(peer.unet)
        batch.noise_pred = peer.unet(x, t, batch.tokens).sample
        guider.cleanup_models(peer.unet)
    return guider(batches).pred


GUIDERS = {
    "pag:scale=2.5": lambda: guiders.PerturbedAttentionGuidance(
        guidance_scale=4.0, perturbed_guidance_scale=2.5, perturbed_guidance_start=0.0,
        perturbed_guidance_config=LayerSkipConfig([0], BLOCKS, False, True, False),
    ),
    "slg:scale=2.5": lambda: guiders.SkipLayerGuidance(
        guidance_scale=4.0, skip_layer_guidance_scale=2.5, skip_layer_guidance_start=0.0,
        skip_layer_config=LayerSkipConfig([0], BLOCKS),
    ),
    # diffusers takes the mean where sigma is finite, and the blur where it is not: the other way round.
    "seg:scale=2.5": lambda: guiders.SmoothedEnergyGuidance(
        guidance_scale=4.0, seg_guidance_scale=2.5, seg_blur_sigma=1.0,
        seg_guidance_config=SmoothedEnergyGuidanceConfig([0], BLOCKS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDERS)
def test_one_state_is_guided_as_by_diffusers_guider(pipe, peer, name):
    asked = Request(
        prompt="red boat", negative_prompt="sea", guidance=f"{name},start=0,stop=1", guidance_scale=4
    )
    job = pipe.prepare(asked)
    cond, uncond = job.encode(0)
    sigma, x = torch.tensor(2.0), 2.2 * noise(pipe)
    seen = []

    def raw(output, x, sigma):
        seen.append(output)
        return output

    predict = networks.predict(pipe.unet, job.grid, {"cond": cond, "uncond": uncond}, attending=job.attending)
    job.guidance(predict, raw)(x, sigma)
    with torch.no_grad():
        scaled = x / (sigma**2 + 1) ** 0.5
        expected = guided(GUIDERS[name](), peer, scaled, job.grid.t(sigma), cond.tokens, uncond.tokens)
    assert error(seen[-1], expected) < 1e-4
    plain = predict(x, sigma, ("uncond", "cond"))
    assert error(plain["uncond"] + 4 * (plain["cond"] - plain["uncond"]), expected) > 1e-3


@pytest.mark.parametrize("sigma", [0.4, 1.0, 5.0])
@pytest.mark.parametrize("side", [2, 7, 8])
def test_queries_are_blurred_as_in_diffusers(sigma, side):
    x = torch.randn(2, 3, side, side)
    size = int(np.ceil(6 * sigma)) + 1 - int(np.ceil(6 * sigma)) % 2
    theirs = _gaussian_blur_2d(x.flatten(2).mT.clone(), size, sigma, sigma_threshold_inf=0)
    assert torch.allclose(blurred(x, sigma), theirs.mT.reshape(x.shape), atol=1e-5)
    assert torch.allclose(blurred(x, torch.inf), x.mean((2, 3), keepdim=True).expand_as(x))
    assert torch.allclose(blurred(torch.ones(1, 1, 5, 3), 2.0), torch.ones(1, 1, 5, 3))


def test_seg_of_a_wide_blur_nears_that_of_the_mean(pipe):
    few = {**FEW, "latents": noise(pipe), "guidance_scale": 3.0}
    mean, wide, none = (
        pipe("red", guidance=f"seg:sigma={sigma}", **few).images for sigma in ("inf", "1000", "0.1")
    )
    assert error(wide, mean) < 0.1
    assert error(none, pipe("red", **few).images) < 1e-5


def test_a_branch_is_asked_for_only_between_its_shares(pipe, monkeypatch):
    rows, real = [], networks._unet
    monkeypatch.setattr(networks, "_unet", lambda *given: rows.append(len(given[4])) or real(*given))
    few = {
        **FEW,
        "num_inference_steps": 10,
        "sampler": "euler",
        "latents": noise(pipe),
        "guidance_scale": 3.0,
    }
    drawn = pipe("red", guidance="slg:start=0.2,stop=0.5", **few).images
    assert rows == [2, 2, 3, 3, 3, 2, 2, 2, 2, 2]
    assert not torch.equal(drawn, pipe("red", **few).images)
    assert torch.equal(
        pipe("red", guidance="slg:start=0.95,stop=0.96", **few).images, pipe("red", **few).images
    )


@pytest.mark.parametrize("name", ["pag", "seg:sigma=1", "slg:stop=1", "sag", "pag+seg+slg:stop=1+sag+apg"])
def test_each_picture_of_a_batch_is_the_one_drawn_alone(pipe, name):
    few = {**FEW, "guidance": name, "guidance_scale": 3.0}
    both = pipe(["red boat", "sea AND the boat"], latents=noise(pipe, 2), **few).images
    for k, prompt in enumerate(["red boat", "sea AND the boat"]):
        assert error(pipe(prompt, latents=noise(pipe, 2)[k : k + 1], **few).images, both[k : k + 1]) < 1e-4
    regions = {"regions": ["0,0,0.5,1: boat"], **few}
    if "sag" not in name:
        mixed = pipe("sea", latents=noise(pipe), **regions).images
        whole = pipe("sea", latents=noise(pipe), **{**regions, "regions": ["0,0,1,1: boat"]}).images
        assert torch.equal(whole, pipe("boat", latents=noise(pipe), **few).images)
        assert not torch.equal(whole, mixed)


def test_branches_one_by_one_and_transformers_by_slices_draw_the_same(pipe):
    from ldm.memory.calls import set_sliced

    few = {**FEW, "guidance": "pag+slg:stop=1+sag", "guidance_scale": 3.0, "latents": noise(pipe)}
    plain = pipe("red boat", **few).images
    pipe.unet.in_turn = True
    set_sliced(pipe.unet, True)
    try:
        assert error(pipe("red boat", **few).images, plain) < 1e-4
    finally:
        pipe.unet.in_turn = False
        set_sliced(pipe.unet, False)


def test_two_drawings_at_once_do_not_hear_each_other(pipe):
    from concurrent.futures import ThreadPoolExecutor

    jobs = [
        pipe.prepare(Request(prompt=text, guidance="sag", num_inference_steps=4)) for text in ("red", "sea")
    ]

    def draw(job):
        return draw_latents(job, job.batches[0])

    alone = [draw(job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(draw, jobs))
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"guidance": "pag:layers=side"}, "no layer 'side' attends.*mid_block"),
        ({"guidance": "pag:start=0.5,stop=0.5"}, "start 0.5 must be less than stop 0.5"),
        ({"guidance": "pag:layers=down", "token_merging_ratio": 0.5}, "token_merging_ratio"),
        ({"guidance": "sag", "tile_size": 8}, "sag is not allowed beside tile_size"),
        ({"guidance": "sag", "cache_interval": 2}, "beside cache_interval"),
        ({"guidance": "seg:sigma=0"}, "sigma=0 is not allowed"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_drawn(pipe, asked, line, monkeypatch):
    monkeypatch.setattr("ldm.pipeline.drawing.draw_latents", None)
    with pytest.raises(UserError, match=line):
        pipe("sea", **{**FEW, **asked})


def test_the_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["txt2img", "-p", "sea", "--guidance", "pag:scale=2", "--steps", "1", "-W", "32", "-H", "32", "-q"]
    assert cli.main([*argv, "-o", "a.png", "--dtype", "fp32"]) == 0
    assert read_request("a.png").guidance == "pag:scale=2,layers=mid,start=0,stop=1"
    assert cli.main(["redraw", "a.png", "-q", "--dtype", "fp32"]) == 0
    assert "equal" in capsys.readouterr().out
    assert ldm.Request(guidance="seg").guidance == "seg:scale=3,layers=mid,start=0,stop=1,sigma=inf"
