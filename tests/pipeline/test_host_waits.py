"""From the first step to the last nothing makes the host wait for a card: rehearsed on one that is none.

All families go that way, so that operands on two devices show here too. A real card speaks in tests/cuda.
"""

import pytest
import torch
from fake_card import CARD, card
from family_inputs import INPUTS, error, mask, picture
from tiny_adapters import save_diffusers

import ldm
from ldm.pipeline import networks
from ldm.pipeline.sample import Counted, draw_latents

SAMPLERS = ["ddpm", "euler_a", "dpmpp_2m_sde", "lcm", "sa_solver", "restart"]  # these draw noise
SAMPLERS += ["heun", "dpmpp_2m", "unipc", "lms", "deis"]
WAYS = {
    "image": {"image": picture(), "strength": 0.9, "sampler": "euler_a"},
    "mask": {"image": picture(), "mask_image": mask(), "strength": 0.9},
    "soft mask": {"image": picture(), "mask_image": mask(), "soft_mask": True},
    "composed": {"prompt": "the red boat AND sea :0.7"},
    "rescaled": {"guidance_rescale": 0.7},
    "limited": {"guidance_interval": (0.2, 0.8)},
    "caching": {"cache_interval": 2},
    "merging": {"token_merging_ratio": 0.5},
    "decoded": {"output_type": "pt"},
    "two pictures": {"num_images_per_prompt": 2, "sampler": "ddpm"},
    "tiles": {"height": 32, "width": 48, "tile_size": 32},
}


@pytest.fixture
def fake(monkeypatch):
    with card(monkeypatch) as made:
        yield made


@pytest.fixture(scope="module")
def sent(folder_of):
    """Our pipelines on the card, by family and dtype. A card must be there when they are made."""
    made = {}

    def get(family, dtype="fp32"):
        if (family, dtype) not in made:
            made[family, dtype] = ldm.load(folder_of(family), device=CARD, dtype=dtype)
        return made[family, dtype]

    return get


@pytest.fixture
def both(models, sent, monkeypatch):
    """The relative error of a card's latents; in its drawing nothing waits between the U-Net's calls."""
    counts, unet = [], networks._unet

    def draw(family, change=lambda pipe: pipe, **arguments):
        call = {"prompt": "the red boat", "num_inference_steps": 4, "output_type": "latent", "seed": 5}
        theirs = change(models(family))(**call | arguments).images  # where no card slows it
        with card(monkeypatch) as fake:

            def counted(*args):
                counts.append(len(fake.waits))
                return unet(*args)

            pipe = change(sent(family))
            monkeypatch.setattr(networks, "_unet", counted)
            ours = pipe(**call | arguments).images
        assert len(counts) >= 3
        assert ours.device == CARD
        assert fake.waits[counts[0] : counts[-1]] == []
        return error(ours.own, theirs)

    return draw


@pytest.mark.parametrize(
    "family", ["sd1", "sd2_v", "sdxl", "refiner", "lcm", "inpaint", "inpaint_xl", "upscaler", "pix2pix"]
)
def test_no_family_waits_in_its_steps(both, family):
    inputs = INPUTS.get(family, {})
    inputs |= {"strength": 0.9} if "strength" in inputs else {}
    assert both(family, **inputs) < 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_does(both, sampler):
    assert both("sd1", sampler=sampler) < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_drawing_does(both, way):
    assert both("sdxl" if way == "tiles" else "sd1", **WAYS[way]) < 1e-4


def test_a_lora_does_not(both, families, tmp_path):
    file = save_diffusers(families("sd1")[1], tmp_path / "style.safetensors")
    assert both("sd1", lambda pipe: pipe.with_lora(file)) < 1e-4


def test_who_counts_steps_makes_nothing_wait(sent, fake):
    """The command's bar, over two models in one drawing."""
    pipe = sent("sdxl").with_refiner(sent("refiner"))
    job = pipe.prepare(ldm.Request(prompt="sea", num_inference_steps=5, seeds=(5,), refiner_switch_at=0.6))
    counts, waits = [], []
    step = Counted(lambda i: counts.append(i) or waits.append(len(fake.waits)))
    drawn = draw_latents(job, job.batches[0], step)
    assert counts == [0, 1, 2, 3, 4]
    assert waits[0] == waits[2] < waits[3] == waits[4]  # between them the refiner's texts are encoded
    assert error(drawn.own, pipe.generate(job.request, output_type="latent").images.own) == 0


@pytest.mark.parametrize(
    ("sampler", "given"), [("ddim", "a seed"), ("euler_a", "a seed"), ("euler_a", "a generator")]
)
def test_what_overflows_is_drawn_again_as_if_each_answer_had_been_read(
    sent, fake, monkeypatch, sampler, given
):
    """A callback reads each."""
    pipe = sent("sd1", "fp16")
    dtypes, unet = [], networks._unet

    def overflow(module, *args):
        dtypes.append(module.conv_in.weight.dtype)
        return tuple(each * (torch.inf if overflows() else 1) for each in unet(module, *args))

    def overflows():
        return dtypes[-1] is torch.float16 and len(dtypes) % 5 == 3

    monkeypatch.setattr(networks, "_unet", overflow)
    call = {"prompt": "sea", "num_inference_steps": 5, "sampler": sampler, "output_type": "latent"}

    def source():
        of_seed = {"seed": 5} if given == "a seed" else {"generator": torch.Generator().manual_seed(5)}
        return call | of_seed

    with pytest.warns(UserWarning, match="the U-Net gave NaN or Inf in float16: done again in float32"):
        read = pipe(**source(), callback_on_step_end=lambda *_: {}).images
    assert dtypes == [torch.float16] * 3 + [torch.float32] * 3
    dtypes.clear()
    with pytest.warns(UserWarning, match="done again in float32") as told:
        ahead = pipe(**source()).images
    assert len(told) == 1
    assert dtypes == [torch.float16] * 8 + [torch.float32] * 3
    assert ahead.own.isfinite().all()
    assert torch.equal(ahead.own, read.own)
