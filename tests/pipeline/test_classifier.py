"""Pictures led by a classifier, against guided-diffusion's formula on the same tiny weights."""

from dataclasses import replace

import pytest
import torch
from family_inputs import error, latents, picture
from tiny_classifier import save_classifier

import ldm
from ldm.errors import UserError

FEW = {"num_inference_steps": 4, "sampler": "ddim", "spacing": "leading", "seed": 3}
TO_DUCK = {"classifier_class": "duck", "classifier_scale": 30.0}


@pytest.fixture(scope="module")
def plain(models):
    return models("sd1")


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("classifiers") / "tiny", plain.vae)


@pytest.fixture(scope="module")
def pipe(plain, folder):
    return plain.with_classifier(folder)


def condition_score(pipe, number, scale, guidance_scale, prompt):
    """DDIM on diffusers' scheduler with guided-diffusion's ``eps - sqrt(1 - a) grad``, in DDPM's space."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(dict(pipe.parts.scheduler), clip_sample=False)
    scheduler.set_timesteps(FEW["num_inference_steps"])
    tokens = pipe.text.encode(["", prompt]).tokens.detach()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(FEW["seed"]))
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod[t]
        with torch.no_grad():
            uncond, cond = pipe.unet(x.repeat(2, 1, 1, 1), t, tokens).chunk(2)
        eps = uncond + guidance_scale * (cond - uncond)
        own = x.detach().requires_grad_()
        log_p = pipe.classifier.network(own / a.sqrt(), ((1 - a) / a).sqrt()).log_softmax(1)[:, number]
        grad = torch.autograd.grad(log_p.sum(), own)[0]
        x = scheduler.step(eps - (1 - a).sqrt() * scale * grad, t, x).prev_sample
    return x


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("prompt", ["", "the red boat"])
def test_equals_guided_diffusion_s_formula(pipe, prompt, guidance_scale):
    """Beside classifier-free guidance, without it, and without a prompt."""
    want = condition_score(pipe, 2, 30.0, guidance_scale, prompt)
    got = latents(pipe, prompt, guidance_scale=guidance_scale, **TO_DUCK, **FEW)
    assert error(got, want) < 1e-4
    assert error(latents(pipe, prompt, guidance_scale=guidance_scale, **FEW), want) > 1e-2


def test_a_scale_of_0_is_none_and_the_default_is_4(pipe):
    assert torch.equal(
        latents(pipe, classifier_class="duck", classifier_scale=0.0, **FEW), latents(pipe, **FEW)
    )
    request = pipe.resolve(ldm.Request(classifier_class="duck"))
    assert (request.classifier_scale, request.classifier_sha256) == (4.0, pipe.classifier.sha256)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "heun"])
def test_the_class_gets_likelier(pipe, sampler):
    level = torch.tensor(0.02)

    def sure(**changes):
        x = latents(pipe, "", **{**FEW, "sampler": sampler, "spacing": None, **changes})
        return float(pipe.classifier.network(x, level).log_softmax(1)[0, 2])

    scales = (0.0, 50.0, 200.0)
    steps = [sure(classifier_class="duck", classifier_scale=scale) for scale in scales]
    assert steps[0] + 0.02 < steps[1] < steps[2] - 0.02


def test_from_an_image_too(pipe):
    """pix2pix-like: a picture, noised to a strength, is denoised towards another class."""
    common = {**FEW, "image": picture(), "strength": 0.5, "num_inference_steps": 8}
    before, after = latents(pipe, "", **common), latents(pipe, "", **TO_DUCK, **common)
    number, level = 2, torch.tensor(0.02)
    sure = [pipe.classifier.network(x, level).log_softmax(1)[0, number] for x in (before, after)]
    assert float(sure[1] - sure[0]) > 0.05
    far = latents(pipe, "", **TO_DUCK, **FEW)
    assert error(after, before) < 0.8 * error(far, before)


def test_a_batch_equals_its_pictures_drawn_alone(pipe):
    common = {**FEW, **TO_DUCK}
    batch = latents(pipe, "the sea", num_images_per_prompt=3, **common)
    alone = torch.cat([latents(pipe, "the sea", **{**common, "seed": 3 + i}) for i in range(3)])
    assert error(batch, alone) < 1e-5
    assert error(batch[:1], batch[1:2]) > 1e-2


def test_at_zero_terminal_snr_the_first_step_is_finite(plain, folder):
    """There the noise level is infinite, and 1e10 stands for it."""
    scheduler = dict(plain.parts.scheduler) | {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    pipe = ldm.Pipeline.from_parts(replace(plain.parts, scheduler=scheduler)).with_classifier(folder)
    job = pipe.prepare(ldm.Request(classifier_class="duck", num_inference_steps=3, sampler="ddim"))
    assert float(job.grid.sigmas[0]) == 1e10
    common = {"num_inference_steps": 3, "sampler": "ddim", "seed": 1}
    guided, unguided = latents(pipe, **common, classifier_class="duck"), latents(pipe, **common)
    assert bool(guided.isfinite().all())
    assert 1e-3 < error(guided, unguided) < 3


def test_a_callback_that_changes_the_guidance_keeps_the_class(pipe):
    common = {**FEW, **TO_DUCK, "prompt": "the red boat"}

    def to_3(pipe, step, timestep, given):
        return {"guidance_scale": 3.0}

    def shows(pipe, step, timestep, given):
        assert len(given["prompt_embeds"]) == 2

    changed = latents(pipe, guidance_scale=3.0001, callback_on_step_end=to_3, **common)
    assert error(changed, latents(pipe, guidance_scale=3.0, **common)) < 1e-3
    tensors = {"callback_on_step_end": shows, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    latents(pipe, guidance_scale=3.0, **tensors, **common)


def test_own_guidance_and_a_class_go_together(pipe):
    from ldm.diffusion.guidance import CFG

    common = {**FEW, **TO_DUCK, "prompt": "the red boat"}
    assert torch.equal(
        latents(pipe, guidance=CFG(3.0), **common), latents(pipe, guidance_scale=3.0, **common)
    )


def test_it_goes_along_when_the_model_moves(pipe):
    moved = pipe.to("cpu", torch.bfloat16)
    weight = next(moved.classifier.network.parameters())
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    common = {**FEW, **TO_DUCK}
    assert error(latents(moved, **common), latents(pipe, **common)) < 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"classifier_class": "dragon"},
            "classifier_class dragon is unknown: .* knows boat, castle, duck",
        ),
        ({"classifier_scale": 2.0}, "classifier_scale is not allowed here: it goes with a classifier_class"),
        (
            {"classifier_class": "duck", "classifier_scale": float("inf")},
            "classifier_scale inf is not allowed",
        ),
    ],
)
def test_what_it_does_not_know_is_one_line(pipe, arguments, said):
    with pytest.raises(UserError, match=said) as raised:
        pipe("", **arguments)
    assert "\n" not in str(raised.value)


def test_a_class_without_a_classifier_is_one_line(plain):
    with pytest.raises(UserError, match="classifier_class duck is not allowed here: give the classifier"):
        plain("", classifier_class="duck")


def test_a_picture_of_another_classifier_is_not_drawn_again_with_this_one(plain, pipe, tmp_path):
    other = plain.with_classifier(save_classifier(tmp_path / "other", plain.vae, seed=1))
    request = pipe.resolve(ldm.Request(classifier_class="duck"))
    with pytest.raises(UserError, match="other is not the classifier that this picture was drawn with"):
        other.prepare(request)


def test_one_for_another_model_is_one_line(models, folder):
    with pytest.raises(UserError, match="a classifier for another model: it knows the latents"):
        models("sdxl").with_classifier(folder)
