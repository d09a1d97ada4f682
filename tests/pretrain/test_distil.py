"""Distillation: the target ends where diffusers' guided DDIM steps end, and a student learns it."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_tasks import learn, tiny_parts, tiny_pictures, tiny_tokenizer

import ldm
from ldm.errors import UserError
from ldm.pretrain.distil import DistilTask
from ldm.pretrain.unet import prepare


@pytest.fixture
def make_task(tmp_path):
    def make(**loss):
        parts = tiny_parts(tiny_tokenizer(tmp_path / "tokenizer"), "v_prediction")
        pictures = tiny_pictures()
        data = prepare(pictures, parts.vae, parts.tokenizer, tmp_path / "cache")
        return DistilTask(parts, data, data, loss, ["a red car"])

    return make


@pytest.mark.parametrize("substeps", [1, 2, 5])  # by which diffusers' trailing timesteps are whole
def test_one_step_to_the_target_ends_where_guided_ddim_ends(make_task, substeps):
    task = make_task(steps=4, substeps=substeps, guidance=2.5)
    batch = task.batch(torch.Generator().manual_seed(0), 4)
    batch["step"] = torch.arange(4)
    batch["t"] = task.grid[batch["step"] * substeps]
    parts = task.parts
    tokens = parts.text_encoder(input_ids=batch["ids"]).last_hidden_state
    empty = parts.text_encoder(input_ids=task.empty_prompt[None]).last_hidden_state
    config = {
        **parts.scheduler,
        "clip_sample": False,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    }
    fine, coarse = (DDIMScheduler.from_config(config) for _ in range(2))
    fine.set_timesteps(4 * substeps)
    coarse.set_timesteps(4)
    assert task.grid.tolist() == fine.timesteps.tolist()
    for k in range(4):
        x = fine.add_noise(batch["x0"][k : k + 1], batch["noise"][k : k + 1], batch["t"][k])
        with torch.no_grad():
            target = task._target(x, batch["step"][k : k + 1], tokens[k : k + 1])
            y = x
            for t in fine.timesteps[k * substeps : (k + 1) * substeps]:
                with_text, without = (task.teacher(y, t, each) for each in (tokens[k : k + 1], empty))
                y = fine.step(without + 2.5 * (with_text - without), t, y).prev_sample
        assert batch["t"][k] == coarse.timesteps[k]
        ours = coarse.step(target, coarse.timesteps[k], x).prev_sample
        assert ((ours - y).abs().max() / y.abs().max()).item() < 1e-4


def test_a_student_of_as_many_steps_and_no_guidance_has_nothing_to_learn(make_task):
    task = make_task(steps=4, substeps=1, guidance=1.0, object_weight=0.0)
    loss, _ = task(task.batch(torch.Generator().manual_seed(0), 4))
    assert loss.item() < 1e-9


def test_the_student_learns_and_the_teacher_stays(make_task):
    task = make_task(steps=2, substeps=2, guidance=3.0)
    teacher = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    trained = [p for p in task.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in task.unet.parameters()}
    before, after = learn(task, steps=40, size=8, lr=1e-3)
    assert after < 0.8 * before
    for name, value in task.teacher.state_dict().items():
        assert torch.equal(value, teacher[name])


def test_export_draws_in_its_steps_without_guidance(make_task, tmp_path):
    make_task(steps=2).export(tmp_path / "student")
    request = ldm.load(tmp_path / "student").resolve(ldm.Request(prompt="a red car"))
    assert (request.num_inference_steps, request.guidance_scale) == (2, 1.0)
    assert (request.sampler, request.spacing) == ("ddim", "trailing")


def test_a_schedule_that_ends_before_pure_noise_is_refused(tmp_path):
    parts = tiny_parts(tiny_tokenizer(tmp_path / "tokenizer"), "v_prediction")
    data = prepare(tiny_pictures(), parts.vae, parts.tokenizer, tmp_path / "cache")
    parts = replace(parts, scheduler={**parts.scheduler, "rescale_betas_zero_snr": False})
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        DistilTask(parts, data, data, {}, [])


@pytest.mark.parametrize("loss", [{"steps": 0}, {"substeps": 2.5}, {"steps": 500, "substeps": 3}])
def test_steps_that_the_schedule_does_not_have_are_refused(make_task, loss):
    with pytest.raises(UserError, match=r"loss\.steps and loss\.substeps must be whole numbers"):
        make_task(**loss)


def test_a_setting_that_it_does_not_have_is_named(make_task):
    with pytest.raises(UserError, match=r"loss\.step is unknown: this trainer has steps, substeps, guidance"):
        make_task(step=4)
