"""What samplers ask of a drawing: options, CFG++, pictures one by one, texts where places are left out."""

from types import SimpleNamespace

import pytest
import torch

import ldm
from ldm.diffusion.guidance import CFG, CFGPlusPlus
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.solvers import Step
from ldm.errors import UserError
from ldm.pipeline.deciding.prepare import chosen_options, prepare
from ldm.pipeline.inputs import Inputs
from ldm.pipeline.sample import sample
from ldm.request import Request


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, device="cpu", dtype="fp32")


def test_options_are_the_solvers_and_the_spacings():
    asked = SimpleNamespace(sampler_options={"s_churn": 2, "rho": 5.0})
    assert chosen_options(asked, SAMPLERS["euler"], "karras") == ({"s_churn": 2.0}, 5.0)
    assert chosen_options(SimpleNamespace(sampler_options=None), SAMPLERS["euler"], None) == ({}, None)
    with pytest.raises(UserError, match="rho=5 is not allowed: it is above 0, and of a spacing"):
        chosen_options(asked, SAMPLERS["euler"], None)
    with pytest.raises(UserError, match="sampler option s_churn is not allowed here: ddim has none"):
        chosen_options(asked, SAMPLERS["ddim"], "karras")


def job(pipe, **fields):
    return prepare(pipe, Request(prompt="the red boat", num_inference_steps=6, **fields))


def test_cfg_pp_is_a_guidance_of_the_sampler(pipe):
    assert job(pipe, sampler="Euler CFG++", guidance_scale=5.0).guidance == CFGPlusPlus(20 / 6)
    assert job(pipe, sampler="Euler", guidance_scale=5.0).guidance == CFG(5.0)
    assert job(pipe, sampler="Euler CFG++", guidance_scale=1.0).guidance == CFG(1.0)  # none


def test_grids_go_to_the_samplers_that_ask(pipe):
    drawn = job(pipe, sampler="tcd")
    assert drawn.options["times"] is drawn.grid
    assert "times" not in job(pipe, sampler="euler").options


def test_pictures_of_dpm_adaptive_are_drawn_one_by_one(pipe):
    assert [len(batch) for batch in job(pipe, sampler="dpm_adaptive", seeds=(1, 2, 3)).batches] == [1, 1, 1]
    assert [len(batch) for batch in job(pipe, sampler="euler", seeds=(1, 2, 3)).batches] == [3]


def test_texts_change_where_a_solver_leaves_out_places(pipe):
    """The text changes in step 2, of which a solver of its own levels tells nothing."""

    def leaping(denoise, x, sigmas, noise):
        for i in (0, 3, 5):
            d = denoise(torch.ones_like(x), sigmas[i])
            yield Step(i, float(sigmas[i + 1]), x, d.x0)

    def x0s(prompt):
        drawn = prepare(pipe, Request(prompt=prompt, num_inference_steps=6), Inputs(solver=leaping))
        return [step.x0 for step in sample(drawn, drawn.pictures)]

    before, after, both = x0s("the red boat"), x0s("sea"), x0s("[the red boat:sea:2]")
    assert torch.equal(both[0], before[0])
    assert torch.equal(both[2], after[2])
    assert not torch.equal(before[2], after[2])
