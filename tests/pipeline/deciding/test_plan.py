"""What a drawing will take: known before, chosen among ways that give the same pictures, or refused."""

import pytest
import torch
from tiny_adapters import save_diffusers

import ldm
from ldm.errors import UserError
from ldm.memory.residence import Sleeping, leave
from ldm.memory.sizes import parse_size
from ldm.pipeline.deciding import plan
from ldm.pipeline.deciding.plan import WAYS, Plan
from ldm.pipeline.deciding.prepare import plan_of
from ldm.request import Request

ASKED = {"prompt": ["the red boat", "sea"], "negative_prompt": "rain", "seed": 3, "num_inference_steps": 2}
ASKED |= {"height": 32, "width": 32, "output_type": "pt"}


@pytest.fixture
def limited(folder_of):
    yield lambda family, **more: ldm.load(
        folder_of(family), device="cpu", dtype="fp32", max_memory="64GiB", **more
    )
    leave()


# Each way adds to the one before: of most families the last will do.
CASES = [("sd1", way) for way in WAYS] + [(family, WAYS[-1]) for family in ("sdxl", "inpaint", "upscaler")]


@pytest.mark.parametrize(("family", "way"), CASES, ids=lambda case: getattr(case, "name", case))
def test_every_way_draws_the_same_pictures(family, way, models, limited, monkeypatch):
    asked = dict(ASKED)
    if family in ("inpaint", "upscaler"):
        asked |= {"image": torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))}
        if family == "upscaler":
            asked = {key: value for key, value in asked.items() if key not in ("height", "width")}
            asked["image"] = asked["image"][:, :16, :16]
        else:
            asked["mask_image"] = (asked["image"][:1] > 0.5).float()
    wanted = models(family)(**asked).images
    pipe = limited(family)

    def choose(self):
        if way is not WAYS[-1]:  # what is traced is the same: once is enough
            self._trace = lambda *_: (0, 0)
        predicted = self.predict(way)
        return plan.replace(predicted, budget=0 if way.bounded_vae else None)

    monkeypatch.setattr(Plan, "choose", choose)
    assert torch.allclose(pipe(**asked).images, wanted, atol=2e-5)


def test_a_lora_beside_layers_that_come_and_go_counts(models, limited, monkeypatch, tmp_path, families):
    file = save_diffusers(families("sd1")[1], tmp_path / "style.safetensors")
    wanted = models("sd1").with_lora(file, 0.8)(**ASKED).images
    pipe = limited("sd1").with_lora(file, 0.8)
    monkeypatch.setattr(Plan, "choose", lambda self: self.predict(WAYS[-1]))
    assert torch.allclose(pipe(**ASKED).images, wanted, atol=2e-5)


def test_nothing_is_read_before_it_is_known_to_fit(limited):
    pipe = plan.replace(limited("sd1"), max_memory=parse_size("1MiB"))
    with pytest.raises(UserError, match=r"would take .* at least .* but there is 1 MiB: .*--dtype bf16"):
        pipe(**ASKED)
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    sleeping = [each for module in networks for each in module.parameters()]
    assert all(isinstance(each, Sleeping) and not each.is_awake for each in sleeping)


def test_the_quickest_way_that_fits_is_chosen(limited, monkeypatch):
    job = limited("sd1").prepare(Request(prompt="sea", height=64, width=64, seeds=(1, 2, 3, 4)))
    monkeypatch.setattr(plan, "resident_memory", lambda: 500 << 20)
    known = plan_of(job, 64 << 30)  # one for all rooms: what it has traced it need not trace again
    peaks = [known.predict(way).peak for way in WAYS]
    assert peaks == sorted(peaks, reverse=True)  # each takes less than the one before
    for way, known.room in zip(WAYS, peaks, strict=True):
        if peaks.count(known.room) == 1:
            assert known.choose().way is way


def test_a_batch_and_a_size_take_more_and_guidance_too(limited):
    pipe = limited("sd1")

    def beside(**asked):
        job = pipe.prepare(Request(**({"prompt": "sea", "height": 32, "width": 32} | asked)))
        return {
            stage.name.split(",")[0]: stage.beside for stage in plan_of(job, 64 << 30).predict(WAYS[0]).stages
        }

    one, two, large = beside(), beside(seeds=(1, 2)), beside(height=64)
    assert two["VAE decode"] == pytest.approx(2 * one["VAE decode"], rel=0.1)
    assert large["VAE decode"] == pytest.approx(2 * one["VAE decode"], rel=0.1)
    assert beside(guidance_scale=1.0)["U-Net"] < 0.75 * one["U-Net"]
