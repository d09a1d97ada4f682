"""Finished pictures that a safety checker looks at: as in diffusers, and told through every door."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checker import make_checker
from transformers import CLIPImageProcessorPil

import ldm
from ldm.cli import main, txt2img
from ldm.errors import UserError
from ldm.images.png import read_request
from ldm.request import Request
from ldm.serve.drawing import Drawing
from ldm.serve.limits import Limits
from ldm.serve.models import Shelf
from ldm.serve.store import Store
from ldm.serve.ticket import Ticket

ASK = {"height": 16, "width": 16, "num_inference_steps": 2}
ALWAYS, NEVER = -2.0, 2.0  # thresholds of cosines


@pytest.fixture(scope="module")
def checked(tiny_folder, tmp_path_factory):
    """A folder with a checker that flags about half of the pictures, and diffusers' pipeline of it."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("checked") / "model"
    shutil.copytree(tiny_folder, folder)
    theirs = make_checker(folder, special=NEVER)
    processor = CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor")
    images = ldm.load(folder, dtype="fp32")("sea", seed=range(6), num_images_per_prompt=6, **ASK).images
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt").pixel_values
        embeds = theirs.visual_projection(theirs.vision_model(pixels)[1])
        near = torch.cosine_similarity(embeds[:, None], theirs.concept_embeds[None], dim=-1).max(1).values
        theirs.concept_embeds_weights.fill_(float(near.median()) + 1e-4)
    theirs.save_pretrained(folder / "safety_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=theirs, feature_extractor=processor
        )
    peer.scheduler = DDIMScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)
    return folder, peer


@pytest.fixture
def always(tiny_folder, tmp_path):
    folder = tmp_path / "always"
    shutil.copytree(tiny_folder, folder)
    make_checker(folder, ALWAYS)
    return folder


def test_pictures_and_what_is_found_are_diffusers_own(checked):
    folder, peer = checked
    pipe = ldm.load(folder, dtype="fp32").with_safety_checker()
    ask = {**ASK, "guidance_scale": 3.0}
    with pytest.warns(UserWarning, match="safety checker flags the pictures of the seeds"):
        ours = pipe("sea", seed=range(6), num_images_per_prompt=6, sampler="ddim", **ask)
    generators = [torch.Generator().manual_seed(k) for k in range(6)]
    theirs = peer("sea", num_images_per_prompt=6, generator=generators, **ask)
    assert ours.nsfw_content_detected == theirs.nsfw_content_detected
    assert {*ours.nsfw_content_detected} == {True, False}
    for own, other, flag in zip(ours.images, theirs.images, ours.nsfw_content_detected, strict=True):
        own, other = np.asarray(own, int), np.asarray(other, int)
        assert abs(own - other).max() <= 1
        assert (own == 0).all() == flag


def test_alone_is_as_in_a_batch_and_off_is_as_before(checked):
    folder, _ = checked
    plain = ldm.load(folder, dtype="fp32")
    pipe = plain.with_safety_checker()
    with pytest.warns(UserWarning, match="safety"):
        whole = pipe("sea", seed=range(6), num_images_per_prompt=6, output_type="pt", **ASK)
    before = plain("sea", seed=range(6), num_images_per_prompt=6, output_type="pt", **ASK)
    assert before.nsfw_content_detected is None
    assert before.request.safety_checker_sha256 is None
    for k, flag in enumerate(whole.nsfw_content_detected):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = pipe("sea", seed=k, output_type="pt", **ASK)
        assert alone.nsfw_content_detected == [flag]
        assert alone.request.nsfw_content_detected is flag
        assert torch.equal(whole.images[k], torch.zeros(3, 16, 16) if flag else before.images[k])
    latent = pipe("sea", seed=0, output_type="latent", **ASK)
    assert latent.nsfw_content_detected is None


def test_it_goes_with_the_model(checked, tmp_path):
    pipe = ldm.load(checked[0], dtype="fp32").with_safety_checker()
    moved = pipe.to("cpu", torch.bfloat16)
    assert moved.safety_checker is not None
    assert moved.safety_checker.network.concept_embeds.dtype == torch.float32
    assert pipe.seamless("x").safety_checker is pipe.safety_checker
    with pytest.raises(UserError, match="has no safety_checker"):
        ldm.load().with_safety_checker()


def test_a_second_pass_is_looked_at_once_at_its_end(always):
    pipe = ldm.load(always, dtype="fp32").with_safety_checker()
    with pytest.warns(UserWarning, match="safety"):
        drawn = pipe("sea", seed=0, hires_scale=2.0, hires={"strength": 0.5}, **ASK)
    assert drawn.images[0].size == (32, 32)
    assert np.asarray(drawn.images[0]).max() == 0
    told = json.loads(drawn.request.to_json())
    assert told["nsfw_content_detected"] is True
    assert "safety_checker_sha256" not in told["hires"]


def test_the_command_line_tells_writes_resumes_and_redraws(always, tmp_path, capsys):
    flags = ["-m", str(always), "--dtype", "fp32", "--steps", "2", "--H", "16", "--W", "16", "--seed", "3"]
    flags += ["-p", "sea", "--outdir", str(tmp_path / "out")]
    assert txt2img([*flags, "--safety-checker", "--quiet"]) == 0
    assert "the safety checker flags seed 3: its picture is black" in capsys.readouterr().err
    (path,) = (tmp_path / "out" / "samples").iterdir()
    request = read_request(path)
    assert request.nsfw_content_detected is True
    assert request.safety_checker_sha256 is not None
    assert np.asarray(Image.open(path)).max() == 0
    assert txt2img([*flags, "--safety-checker", "--resume"]) == 0
    assert "1 of 1 pictures are there already" in capsys.readouterr().out
    model = ["-m", str(always), "--dtype", "fp32"]
    assert main(["redraw", str(path), *model, "--safety-checker"]) == 0
    assert main(["redraw", str(path), *model]) == 1
    assert "a safety checker flagged it: give it by --safety-checker" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--safety-checker"], "has no safety_checker: give one by --safety-checker FOLDER"),
        (["--safety-checker", "nowhere"], "nowhere"),
        (["--safety-checker", "--preview", "p.png"], "--preview shows what no --safety-checker has seen"),
    ],
)
def test_what_cannot_be_is_said_before_drawing(tiny_folder, tmp_path, capsys, flags, said):
    assert txt2img(["-p", "sea", "-m", str(tiny_folder), "--outdir", str(tmp_path / "o"), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "o").rglob("*.png"))


def test_the_server_shows_no_previews_and_tells_what_it_flags(always, tmp_path):
    store = Store(tmp_path / "s")
    pipe = ldm.load(always, dtype="fp32").with_safety_checker()
    draw = Drawing(Shelf(pipe, ldm.load), store.folder, store.keep, Limits(), 4)
    ticket = Ticket(Request(prompt="sea", **ASK), pipe.name)
    seen = []
    ticket.watch(lambda: seen.append(ticket.glimpse))
    assert ticket.begin()
    draw([ticket])
    assert not any(seen)
    assert ticket.flagged == ticket.pictures != []
    kept = store.get(ticket.pictures[0])
    assert kept.request["nsfw_content_detected"] is True
    assert np.asarray(Image.open(kept.path)).max() == 0
    store.close()
