"""Areas of a picture with prompts of their own."""

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import cli
from ldm.errors import UserError
from ldm.images.png import read_request
from ldm.pipeline.steering.regions import areas_of, regional
from ldm.request import Region, Request

ONE = {"num_inference_steps": 1, "output_type": "latent", "sampler": "euler"}
FEW = {"num_inference_steps": 2, "output_type": "pt", "width": 64, "height": 32, "seed": 4}
HALVES = ["0,0,0.5,1: a red boat", "0.5,0,0.5,1: a green tree"]

GREY = Image.new("RGB", (64, 32))


@pytest.fixture(scope="module")
def pipe():
    return ldm.load(dtype="fp32")


def near(a, b):
    return torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("sampler", "scale", "area"),
    [("euler", 1.0, "0,0,1,1"), ("dpmpp_2m_sde", 3.0, "0,0,64,32"), ("ddim_cfg_pp", 3.0, "0,0,1,1")],
)
def test_a_region_over_the_whole_picture_is_a_plain_drawing(pipe, sampler, scale, area):
    few = {**FEW, "num_inference_steps": 2, "sampler": sampler, "guidance_scale": scale}
    few["negative_prompt"] = "snow"
    plain = pipe("a red boat", **few).images
    assert torch.equal(pipe("a blue sea", regions=[f"{area}: a red boat"], **few).images, plain)
    assert not torch.equal(plain, pipe("a blue sea", **few).images)


def test_one_of_no_strength_is_a_plain_drawing_and_half_of_it_is_the_mean(pipe):
    plain = pipe("a blue sea", **FEW).images
    assert torch.equal(pipe("a blue sea", regions=["0,0,1,1,strength=0: a red boat"], **FEW).images, plain)
    one = {
        **FEW,
        "num_inference_steps": 1,
        "output_type": "latent",
        "sampler": "euler",
        "guidance_scale": 1.0,
    }
    half = pipe("a blue sea", regions=["0,0,1,1,strength=0.5: a red boat"], **one).images
    mean = (pipe("a blue sea", **one).images + pipe("a red boat", **one).images) / 2
    assert near(half, mean)


def test_one_step_is_each_prompts_own_away_from_the_edge_and_any_scale_multiplies_it(pipe):
    one = {
        **FEW,
        "num_inference_steps": 1,
        "output_type": "latent",
        "sampler": "euler",
        "guidance_scale": 3.0,
    }
    both = pipe("", regions=HALVES, **one).images
    boat, tree = (pipe(text, **one).images for text in ("a red boat", "a green tree"))
    middle, edge = both.shape[-1] // 2, 4  # one latent's Gaussian, and its tail
    assert near(both[..., : middle - edge], boat[..., : middle - edge])
    assert near(both[..., middle + edge :], tree[..., middle + edge :])
    assert not near(both[..., middle - 1 : middle + 1], tree[..., middle - 1 : middle + 1])


def test_shares_sum_to_one_and_weights_decide_where_regions_overlap(pipe):
    def areas(*regions):
        return areas_of(
            pipe.resolve(Request(regions=regions, width=128, height=64)), ldm.pipeline.Inputs(), 8
        )

    shares = areas("0,0,0.75,1: a", "0.5,0,0.5,1,weight=3: b", "0,0,0.25,0.5,strength=0.5: c")
    assert shares.shape == (4, 1, 8, 16)
    assert torch.allclose(shares.sum(0), torch.ones(1, 8, 16), atol=1e-6)
    assert shares[:, 0, 4, 10] == pytest.approx([0, 0.25, 0.75, 0], abs=0.02)  # 1 to 3
    assert shares[:, 0, 0, 0] == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.02)
    column = areas("64,0,64,64: a")[1, 0, 0]
    assert column[:4].max() == 0
    assert column[12:].min() == 1
    assert 0.05 < column[7] < 0.5 < column[8] < 0.95  # softly


def test_a_mask_from_a_file_is_its_white_part_and_its_digest_is_noted(pipe, tmp_path):
    path = tmp_path / "mask.png"
    pixels = np.zeros((32, 64), np.uint8)
    pixels[:, :32] = 255
    Image.fromarray(pixels).save(path)
    box = pipe("sea", regions=[HALVES[0]], **FEW)
    mask = pipe("sea", regions=[f"{path}: a red boat"], **FEW)
    assert torch.equal(box.images, mask.images)
    (region,) = mask.request.regions
    assert len(region.mask_sha256) == 64
    assert torch.equal(pipe.generate(mask.request, output_type="pt").images, mask.images)
    Image.fromarray(255 - pixels).save(path)
    with pytest.raises(UserError, match="has changed"):
        pipe.generate(mask.request)


def test_each_picture_of_a_batch_is_the_one_drawn_alone(pipe):
    few = {**FEW, "seed": [7, 8], "regions": HALVES}
    prompts = ["a calm sea", "a red house AND a blue sky :2"]
    both = pipe(prompts, num_images_per_prompt=1, **few).images
    for k, prompt in enumerate(prompts):
        alone = pipe(prompt, **{**few, "seed": 7 + k}).images
        assert near(both[k : k + 1], alone)


def test_texts_change_over_the_steps_and_may_be_of_several_windows(pipe):
    first = pipe("sea", regions=["0,0,1,1: [a red boat:a tree:1]"], **FEW).images
    assert not torch.equal(first, pipe("sea", regions=["0,0,1,1: a red boat"], **FEW).images)
    long = " and ".join(["a red boat"] * 30)
    with pytest.warns(UserWarning, match="read in"):
        told = pipe("sea", regions=[f"0,0,1,1: {long}"], **FEW).images
    with pytest.warns(UserWarning, match="read in"):
        alone = pipe(long, **FEW).images
    assert torch.equal(told, alone)


def test_the_second_pass_has_the_regions_at_its_own_size(pipe):
    job = pipe.prepare(Request(regions=["32,0,32,32: a red boat"], width=64, height=32, hires_scale=2))
    first, second = job.steering.areas, job.then.job.steering.areas
    assert second.shape[-2:] == (2 * first.shape[-2], 2 * first.shape[-1])
    assert job.then.job.request.regions == job.request.regions
    assert job.request.regions[0].box == (0.5, 0, 0.5, 1)
    assert pipe.prepare(job.request).then.job.request == job.then.job.request


def test_tiles_and_saved_features_are_mixed_too(pipe):
    for more in ({"tile_size": 32}, {"cache_interval": 2}, {"token_merging_ratio": 0.5}):
        few = {**FEW, **more}
        plain = pipe("a red boat", **few).images
        assert torch.equal(pipe("sea", regions=["0,0,1,1: a red boat"], **few).images, plain)


def test_what_no_place_shows_is_not_asked_for(pipe):
    asked = []

    def predict(x, sigma, names):
        asked.append(names)
        return dict.fromkeys(names, x)

    call = regional(predict, torch.tensor([0.0, 0.5, 0.5, 0.0])[:, None, None, None])
    call(torch.zeros(1, 4, 2, 2), torch.tensor(1.0), ("uncond", "cond"))
    call(torch.zeros(1, 4, 2, 2), torch.tensor(1.0), ("uncond",))
    assert asked == [("uncond", "region_0", "region_1"), ("uncond",)]


def test_two_encoders_are_told_sizes_and_pooled_text(models):
    xl = models("sdxl")
    few = {"num_inference_steps": 2, "output_type": "pt", "seed": 1}
    assert torch.equal(xl("sea", regions=["0,0,1,1: red"], **few).images, xl("red", **few).images)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"regions": ["0,0,1: a"]}, "write .x,y,width,height: text"),
        ({"regions": ["0,0,0,1: a"]}, "box"),
        ({"regions": [{"prompt": "a"}]}, "a box or a mask"),
        ({"regions": ["0.5,0,0.6,1: a"]}, "goes beyond the picture"),
        ({"regions": ["64,0,128,128: a"]}, "64x32 pixels"),
        ({"regions": ["0,0,1,1: a AND b"]}, "shows one prompt"),
        ({"regions": ["none.png: a"]}, "none.png"),
        ({"regions": ["0,0,1,1,weight=0: a"]}, "weight"),
        (
            {"regions": ["0,0,1,1: a"], "image": Image.new("RGB", (64, 32)), "target_prompt": "b"},
            "target_prompt",
        ),
        ({"regions": ["0,0,1,1: a"], "prompt_embeds": torch.zeros(1, 77, 8)}, "not as prompt_embeds"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_drawn(pipe, asked, line, monkeypatch):
    monkeypatch.setattr("ldm.pipeline.drawing.draw_batch", None)
    with pytest.raises(UserError, match=line):
        pipe(**{**FEW, "prompt": "sea", **asked})


def test_flags_the_pictures_metadata_and_a_redrawing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["txt2img", "-p", "sea", "--region", HALVES[0], "--region", HALVES[1], "--steps", "1"]
    assert cli.main([*argv, "-W", "64", "-H", "32", "-q", "-o", "a.png", "--dtype", "fp32"]) == 0
    assert read_request("a.png").regions == (
        Region(prompt="a red boat", box=(0, 0, 0.5, 1)),
        Region(prompt="a green tree", box=(0.5, 0, 0.5, 1)),
    )
    assert cli.main(["redraw", "a.png", "-q", "--dtype", "fp32"]) == 0
    assert "equal" in capsys.readouterr().out


def test_a_mask_that_a_stranger_named_on_another_computer_is_not_opened(tmp_path, capsys):
    from ldm.images.png import save_png

    request = Request(prompt="sea", regions=[{"mask": "//host/mask.png", "prompt": "a boat"}])
    save_png(GREY, tmp_path / "a.png", request)
    assert cli.main(["redraw", str(tmp_path / "a.png"), "-q"]) == 2
    assert "which is not here" in capsys.readouterr().err


def test_a_server_takes_boxes_alone():
    from ldm.serve.limits import Limits

    Limits().check(Request(prompt="sea", regions=HALVES), ())
    for regions in (["mask.png: a"], HALVES * 5, ["0,0,1,1: " + 30_000 * "a"]):
        with pytest.raises(UserError, match="regions are"):
            Limits().check(Request(prompt="sea", regions=regions), ())
