"""`parameters` texts of other programs: in several lines, odd, and hostile."""

import time

import pytest

from ldm.errors import UserError
from ldm.images.parameters import format_parameters, parse_parameters, split_parameters
from ldm.request import Request

ONE_LINE = (
    "a boat\nNegative prompt: fog\n"
    "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 64x96"
)


@pytest.mark.parametrize(
    "other",
    [
        ONE_LINE.replace("Euler a, ", "Euler a,\n"),
        ONE_LINE.replace(", CFG", "\nCFG").replace(", Seed", ",\n  Seed"),
        ONE_LINE.replace("\n", "\r\n").replace("Karras, ", "Karras,\r\n"),
        f"{ONE_LINE}\nTemplate: Steps, a boat\nNegative Template: fog, low",
        f'{ONE_LINE},\nTemplate: "a boat\nNegative prompt: fog\nSteps: 20", Version: other 1.10.1',
        f'{ONE_LINE}, Lora hashes: "a: 12,\nb: 34", Model hash (refiner): 12\n',
        f'{ONE_LINE}, Civitai resources: [{{"type":"checkpoint", "weight": 1}}], Steps: 3',
        ONE_LINE.replace("Steps: 20, ", "").replace("Seed: 5", "Seed: 5, Steps: 20"),
    ],
)
def test_settings_in_several_lines_are_those_of_one_line(other):
    assert parse_parameters(other) == parse_parameters(ONE_LINE)


@pytest.mark.parametrize(
    "request_",
    [
        Request(prompt="Steps: 3, b\nSteps: 4", num_inference_steps=9, negative_prompt="Steps: 5, low"),
        Request(prompt='Steps: 3, a: "b\nc', num_inference_steps=9, model='x: "y"'),
        Request(prompt="Steps: a few", num_inference_steps=9),
    ],
)
def test_prompts_that_look_like_settings_stay_prompts(request_):
    assert parse_parameters(format_parameters(request_)) == request_


@pytest.mark.parametrize("text", ["Steps: 3 of them\nin all", "a castle: big, old", "", "Steps:", '"'])
def test_a_text_without_settings_is_a_prompt(text):
    assert split_parameters(text) == (text, None, [])


@pytest.mark.parametrize("model", ["a:b", "a,b", "a\nb"])
def test_a_value_with_one_mark_alone_is_quoted(model):
    request = Request(num_inference_steps=9, model=model)
    assert f'Model: "{model.replace(chr(10), chr(92) + "n")}"' in format_parameters(request)
    assert parse_parameters(format_parameters(request)) == request


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("Sampler: SEEDS 3", "unknown sampler 'SEEDS 3'"),
        ("Schedule type: Bong tangent", "unknown spacing 'Bong tangent'"),
        ("Size: 500x333", "width '500' is not allowed"),
        ("Seed: -1", "seeds '-1' is not allowed"),
        ("Clip skip: two", "clip_skip 'two' is not allowed"),
        (f"Clip skip: {'9' * 5000}", "clip_skip '999.* is not allowed"),
        (f"CFG scale: {'9' * 5000}", "guidance_scale '999.* is not allowed"),
    ],
)
def test_values_that_cannot_be_drawn_are_named_and_kept_as_written(settings, message):
    text = f"a\nSteps: 3, {settings}"
    assert split_parameters(text)[2][1] == tuple(settings.split(": "))
    with pytest.raises(UserError, match=message):
        parse_parameters(text)


PIECES = [
    "a",
    "a,",
    "a: ",
    'a: "b, ',
    'a:"\\",',
    '"',
    "\\",
    " ",
    "\n",
    "Steps: 1\n",
    "Negative prompt: x\nSteps: 1,\n",
]


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("start", ["", "Steps: 1, ", 'Steps: 1, a: "', "Steps: "])
def test_any_text_is_split_in_linear_time(piece, start):
    start_time = time.process_time()
    split_parameters(start + piece * (200_000 // len(piece)))
    assert time.process_time() - start_time < 1


@pytest.mark.parametrize(
    ("settings", "noise"),
    [
        ("Version: v1.10.1", "gpu"),
        ("Version: f2.0.1v1.10.1-previous-669", "gpu"),
        ("Version: v1.10.1, RNG: CPU", None),
        ("RNG: NV", "gpu"),
        ("RNG: GPU", "gpu"),
        ("Version: stable-diffusion.cpp", None),
        ("Model: a", None),
    ],
)
def test_whose_noise_a_picture_began_with(settings, noise):
    request = parse_parameters(f"a boat\nSteps: 20, Seed: 5, {settings}")
    assert request.noise == noise
    assert parse_parameters(format_parameters(request)).noise == noise


def test_variations_of_automatic1111_are_read_and_written():
    text = (
        "a boat\nSteps: 20, Seed: 5, Size: 512x768, Variation seed: 9, Variation seed strength: 0.25, "
        "Seed resize from: 512x640, ENSD: 31337, Version: v1.10.1"
    )
    request = parse_parameters(text)
    assert (request.variation_seed, request.variation_strength) == (9, 0.25)
    assert (request.seed_resize, request.noise_seed_delta) == ((640, 512), 31337)
    assert parse_parameters(format_parameters(request)) == request
    assert parse_parameters("a\nSteps: 2, Variation seed: 9").variation_seed is None
    assert parse_parameters("a\nSteps: 2, Seed resize from: -1x-1").seed_resize is None
