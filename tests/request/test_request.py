"""Request: what is refused, and in which words; its JSON form; that it needs no torch."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.request import Request
from ldm.request.fields import MAX_SEED, consecutive_seeds

WHOLE = Request(
    watermark="ldm",
    prompt_grammar="comfy",
    prompt='a "red" boat,\nnach Süden ⛵',
    negative_prompt="blurry: yes",
    height=64,
    width=128,
    num_inference_steps=7,
    guidance_scale=7.5,
    guidance="apg:eta=0",
    guidance_rescale=0.25,
    seeds=(3, MAX_SEED),
    sampler="DPM++ 2M",
    spacing="karras",
    eta=0.5,
    clip_skip=1,
    prompt_2="ein Boot",
    negative_prompt_2="Nebel",
    target_prompt="ein Haus",
    image="pictures/boat.png",
    image_sha256="0" * 64,
    mask_image="pictures/mask.png",
    mask_image_sha256="f" * 64,
    strength=0.6,
    noise="gpu",
    sampler_options={"s_churn": 2.0},
    variation_seed=8,
    variation_strength=0.25,
    seed_resize=(64, 48),
    noise_seed_delta=31337,
    extend=(8, 0, 8, 16),
    mask_invert=True,
    mask_grow=-2,
    mask_blur=1.5,
    soft_mask=True,
    mask_fill="blur",
    padding_mask_crop=32,
    image_guidance_scale=1.5,
    noise_level=20,
    classifier_class="castle",
    classifier_scale=4.0,
    classifier_sha256="1" * 64,
    original_size=(640, 480),
    crops_coords_top_left=(8, 0),
    target_size=(512, 512),
    negative_original_size=(64, 48),
    negative_crops_coords_top_left=(0, 1),
    negative_target_size=(64, 64),
    aesthetic_score=6.5,
    negative_aesthetic_score=2.0,
    model="postcard",
    model_hash="0123456789",
    upscaling=Request(num_inference_steps=3, noise_level=7, model="upscaler", model_hash="9876543210"),
    hires_scale=2.0,
    hires_upscaler="upscaler.safetensors",
    hires_upscaler_sha256="2" * 64,
    hires=Request(height=128, width=256, strength=0.5, prompt="a boat, sharp"),
    tile_size=64,
    tile_overlap=16,
    tiling="x",
    guidance_interval=(0.2, 0.8),
    fast=True,
    cache_interval=3,
    cache_branch_id=1,
    token_merging_ratio=0.5,
    denoising_start=0.1,
    denoising_end=0.9,
    refiner_switch_at=0.8,
    freeu=(1.3, 1.4, 0.9, 0.2),
    cross_replace_steps=0.8,
    self_replace_steps=0.4,
    word_weights={"boat": 2.0},
    regions=[{"box": (0, 0, 0.5, 1), "prompt": "a tree", "weight": 2.0, "strength": 0.5}],
    refining=Request(guidance_scale=3.0, model="refiner", model_hash="9876543211"),
    control=[{"model": "canny", "image": "edges.png", "scale": 0.5, "end": 0.6, "mode": "prompt"}],
    image_prompts=[{"adapter": "plus.safetensors", "images": ["boat.png"], "scale": {"mid": 1}}],
    safety_checker_sha256="3" * 64,
    nsfw_content_detected=False,
    resize_mode="crop",
    drawn_as={"ark": "boat"},
    transparent=True,
)

NOT_IN_WHOLE = {"timesteps", "sigmas", "loras", "embeddings"}


def test_json_round_trip_keeps_every_field():
    assert Request.from_json(WHOLE.to_json()) == WHOLE
    assert {name for name in Request.model_fields if getattr(WHOLE, name) is None} == NOT_IN_WHOLE
    given = Request(timesteps=[999, 500.5, 1])
    assert Request.from_json(given.to_json()) == given
    assert json.loads(WHOLE.to_json())["version"] == 4


def test_json_leaves_out_what_the_model_decides():
    assert json.loads(Request(prompt="a boat").to_json()) == {
        "version": 4,
        "prompt": "a boat",
        "guidance_rescale": 0.0,
        "seeds": [0],
    }


def test_no_negative_prompt_and_an_empty_one_differ():
    assert Request.from_json(Request(negative_prompt="").to_json()).negative_prompt == ""
    assert Request.from_json(Request().to_json()).negative_prompt is None


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 0),
        ({"num_inference_steps": 7}, 7),
        ({"num_inference_steps": 7, "strength": 0.75}, 5),
        ({"num_inference_steps": 7, "strength": 0.1}, 0),
        ({"timesteps": (9, 5, 1), "strength": 0.7}, 2),
        ({"sigmas": (9, 5, 1, 0), "num_inference_steps": 50}, 3),
    ],
)
def test_steps_that_are_drawn(fields, steps):
    assert Request(**fields).num_steps == steps


def test_a_request_never_changes():
    with pytest.raises(ValueError, match="frozen"):
        WHOLE.prompt = "another"
    assert hash(WHOLE) == hash(WHOLE.replace())


def test_replace_validates_again():
    assert WHOLE.replace(seeds=(5,)).seeds == (5,)
    assert WHOLE.replace(seeds=(5,)).sampler == WHOLE.sampler
    with pytest.raises(UserError, match="height 63"):
        WHOLE.replace(height=63)


@pytest.mark.parametrize(
    ("name", "canonical", "spacing"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("dpmpp_2m", "dpmpp_2m", None),
        ("plms", "pndm", None),
        ("Euler a", "euler_a", None),
    ],
)
def test_sampler_names_become_canonical(name, canonical, spacing):
    request = Request(sampler=name)
    assert (request.sampler, request.spacing) == (canonical, spacing)


def test_a_spacing_of_its_own_wins_over_the_one_in_the_sampler_name():
    assert Request(sampler="DPM++ 2M Karras", spacing="trailing").spacing == "trailing"


SIDE = "it must be a multiple of 8 from 8 to 4096"
SEEDS = r"it must be at least one seed, each from 0 to 2\*\*63 - 1"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 100}, f"height 100 is not allowed: {SIDE}"),
        ({"height": 0}, f"height 0 is not allowed: {SIDE}"),
        ({"width": -8}, f"width -8 is not allowed: {SIDE}"),
        (
            {"width": 4104},
            rf"width 4104 is not allowed: {SIDE} \(at 4104 x 4104 one .* takes 8 GiB in 16 bits",
        ),
        ({"width": 65536}, "at 65536 x 65536 one feature map of Stable Diffusion's VAE takes 2,048 GiB"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 is not allowed: it must be a whole number"),
        ({"num_inference_steps": 1001}, "num_inference_steps 1001 is not allowed"),
        ({"num_inference_steps": 2.5}, "num_inference_steps 2.5 is not allowed"),
        ({"guidance_scale": math.nan}, "guidance_scale nan is not allowed: it must be a finite number"),
        ({"guidance_scale": math.inf}, "guidance_scale inf is not allowed: it must be a finite number"),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5 is not allowed: it must be a number from 0 to 1"),
        ({"eta": -0.1}, "eta -0.1 is not allowed: it must be a number from 0 to 1"),
        ({"eta": math.nan}, "eta nan is not allowed"),
        ({"seeds": ()}, rf"seeds \(\) is not allowed: {SEEDS}"),
        ({"seeds": (1, -1)}, f"seeds -1 is not allowed: {SEEDS}"),
        ({"seeds": (2**63,)}, f"seeds 9223372036854775808 is not allowed: {SEEDS}"),
        ({"clip_skip": -1}, "clip_skip -1 is not allowed: it must be how many last text layers to skip"),
        ({"timesteps": (1, 2)}, r"timesteps \(1, 2\) is not allowed: .* strictly falling"),
        ({"sigmas": (2.0, math.nan)}, "sigmas nan is not allowed"),
        ({"timesteps": ()}, r"timesteps \(\) is not allowed"),
        ({"timesteps": (1,), "sigmas": (1,)}, "give timesteps or sigmas, not both"),
        ({"prompt": "a\0b"}, "prompt 'a.x00b' is not allowed: it must be valid Unicode text without NUL"),
        ({"prompt": "\udcff"}, "prompt .* is not allowed"),
        ({"prompt": ["a"]}, "prompt .* is not allowed"),
        ({"steps": 20}, "steps is not a field of a Request"),
        ({"sampler": 3}, "sampler 3 is not allowed: it must be a name"),
        ({"image": "a\0.png"}, "image 'a.x00.png' is not allowed"),
        ({"image_sha256": "abc"}, "image_sha256 'abc' is not allowed: it must be a SHA-256 in 64 hex digits"),
        ({"strength": 1.5}, "strength 1.5 is not allowed: it must be a number from 0 to 1"),
        ({"noise_level": -1}, "noise_level -1 is not allowed: it must be a whole number from 0 up"),
        ({"original_size": (64,)}, "original_size .* is not allowed: it must be two whole numbers of pixels"),
        ({"target_size": (64, -1)}, "target_size -1 is not allowed"),
        ({"aesthetic_score": math.nan}, "aesthetic_score nan is not allowed: it must be a finite number"),
        ({"sampler": "dpm++ 2n"}, "(?i)dpm"),
        ({"spacing": "karas"}, "(?i)karras"),
    ],
)
def test_bad_fields_are_told_in_one_line(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        Request(**fields)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_bad_field_of_the_upscaling_is_told():
    with pytest.raises(UserError, match="num_inference_steps 0 is not allowed"):
        Request.from_json('{"version": 1, "upscaling": {"num_inference_steps": 0}}')


def test_all_bad_fields_are_told_at_once():
    with pytest.raises(UserError, match=r"height 1 .*; num_inference_steps 0 "):
        Request(height=1, num_inference_steps=0)


def test_json_of_before_keeps_its_version():
    old = Request.from_json('{"version": 1, "prompt": "a boat", "upscaling": {"num_inference_steps": 3}}')
    assert (old.version, old.upscaling.version) == (1, 1)
    assert old.replace(seeds=(5,)).version == 1
    assert Request.from_json(old.to_json()) == old
    assert Request.from_json('{"version": 2, "upscaling": {}}').upscaling.version == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"version": 5}', '{"version": "2"}', '{"prompt": "no version"}']
)
def test_damaged_and_newer_json_is_refused(text):
    with pytest.raises(UserError, match="this request"):
        Request.from_json(text)


def test_what_is_not_kept_is_written_only_where_there_is_some():
    lacking = WHOLE.replace(not_kept=("latents",))
    assert "not_kept" not in WHOLE.to_json()
    assert Request.from_json(lacking.to_json()) == lacking
    lacking.check_given(["latents", "image"])
    with pytest.raises(UserError, match="drawn in Python with latents from memory, which is not kept"):
        lacking.check_given(["image"])


@pytest.mark.parametrize(
    "fields",
    [
        '"upscaling": 5',
        '"upscaling": [{"prompt": "a"}]',
        '"loras": 5, "prompt": "<lora:a>"',
        '"loras": {"a": 1}, "prompt": "<lora:a>"',
        '"seeds": {"a": 1}',
        '"not_kept": 3',
        '"prompt": ' + "[" * 300 + "]" * 300,
        '"upscaling": ' + '{"upscaling": ' * 400 + "5" + "}" * 400,
        '"version": 1, "upscaling": ' + "[" * 100_000,
    ],
)
def test_any_json_is_a_request_or_a_clear_error(fields):
    with pytest.raises(UserError) as caught:
        Request.from_json(f'{{"version": 1, {fields}}}')
    assert len(str(caught.value)) < 500


def test_consecutive_seeds():
    assert consecutive_seeds(42, 3) == (42, 43, 44)
    assert consecutive_seeds([7, 9], 2) == (7, 9)
    assert consecutive_seeds(0) == (0,)
    for whole in (np.int64(3), np.array(3), torch.tensor(3)):
        assert consecutive_seeds(whole, 2) == (3, 4)
    for several in (np.array([7, 9]), torch.tensor([7, 9]), (np.uint8(7), torch.tensor(9)), iter([7, 9])):
        seeds = consecutive_seeds(several, 2)
        assert seeds == (7, 9)
        assert {type(seed) for seed in seeds} == {int}
    for none in (3.0, "3", [1, "a"], torch.tensor(3.5), np.array(1.5), {"a": 1}):
        with pytest.raises(UserError, match="whole number"):
            consecutive_seeds(none)
    with pytest.raises(UserError, match="2 seeds for 3 pictures"):
        consecutive_seeds([7, 9], 3)


def test_negative_and_absent_seeds_are_random():
    drawn = {consecutive_seeds(seed)[0] for seed in [None, -1] * 10}
    assert len(drawn) > 15
    assert all(0 <= seed < 2**32 for seed in drawn)
    first, second = consecutive_seeds(-1, 2)
    assert second == first + 1


def test_importing_request_loads_no_torch():
    code = "import sys, ldm.request; ldm.request.Request(prompt='a'); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
