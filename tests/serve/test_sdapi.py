"""AUTOMATIC1111's API, by clients that nobody here wrote: webuiapi; sd-backend-client, which checks types."""

import base64
import io
import json
import threading

import numpy as np
import pytest
import sd_backend_client
import webuiapi
from PIL import Image, ImageDraw
from serve_server import running, wait

import ldm
from ldm.images.parameters import parse_parameters

SMALL = {"width": 64, "height": 64, "steps": 3, "sampler_name": "Euler a", "cfg_scale": 2.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("sdapi")) as made:
        yield made


@pytest.fixture(scope="module")
def api(server):
    url = server[0].base_url
    return webuiapi.WebUIApi(host=url.host, port=url.port)


def levels(a, b):
    return abs(np.asarray(a, int) - np.asarray(b, int)).max()


def test_txt2img_draws_what_the_pipeline_draws(api):
    result = api.txt2img(prompt="a red house", negative_prompt="snow", seed=5, n_iter=2, **SMALL)
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.info["all_seeds"] == [5, 6]
    assert result.info["sampler_name"] == "Euler a"
    assert result.info["sd_model_hash"] == ldm.load().model_hash
    own = ldm.load()(
        "a red house",
        64,
        64,
        3,
        guidance_scale=2.0,
        negative_prompt="snow",
        seed=6,
        sampler="euler_a",
        eta=1.0,
    ).images[0]
    assert levels(result.images[1], own) <= 1
    read = parse_parameters(result.info["infotexts"][1])
    assert (read.prompt, read.negative_prompt, read.seeds) == ("a red house", "snow", (6,))
    assert api.png_info(result.images[0]).info in ("", result.info["infotexts"][0])  # webuiapi saves it anew


def test_hires_has_two_passes(api):
    result = api.txt2img(
        prompt="a boat",
        seed=5,
        enable_hr=True,
        hr_scale=1.5,
        hr_upscaler="Latent",
        denoising_strength=0.5,
        **SMALL,
    )
    assert result.image.size == (96, 96)
    assert result.info["denoising_strength"] == 0.5


def test_img2img_and_its_masks(api):
    red = Image.new("RGB", (64, 64), (200, 40, 40))
    whole = api.img2img(images=[red], prompt="a boat", seed=1, denoising_strength=0.6, **SMALL).image
    assert levels(whole, red) > 10
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((32, 0, 64, 64), fill=255)
    ask = {
        "images": [red],
        "mask_image": mask,
        "prompt": "sea",
        "seed": 1,
        "denoising_strength": 0.9,
        **SMALL,
    }
    for full in (True, False):
        drawn = np.asarray(api.img2img(mask_blur=0, inpaint_full_res=full, **ask).image)
        assert (drawn[:, :31] == (200, 40, 40)).all()
        assert levels(drawn[:, 33:], np.asarray(red)[:, 33:]) > 10
    inverted = np.asarray(api.img2img(mask_blur=0, inpainting_mask_invert=1, inpainting_fill=2, **ask).image)
    assert (inverted[:, 33:] == (200, 40, 40)).all()


def test_extras_enlarge_by_interpolation_only(server, api):
    picture = Image.effect_noise((24, 16), 80).convert("RGB")
    result = api.extra_single_image(picture, upscaler_1="Nearest", upscaling_resize=2)
    assert levels(result.image, picture.resize((48, 32), Image.Resampling.NEAREST)) == 0
    ask = {"upscaler_1": "Lanczos", "resize_mode": 1, "upscaling_resize_w": 40, "upscaling_resize_h": 40}
    results = api.extra_batch_images([picture, picture], **ask).images
    assert [image.size for image in results] == [(40, 40)] * 2
    encoded = webuiapi.raw_b64_img(picture)
    for wrong in (
        {"upscaler_1": "ESRGAN"},
        {"gfpgan_visibility": 1},
        {"upscaling_resize": 1e6},
        {"image": "x"},
    ):
        answer = server[0].post("/sdapi/v1/extra-single-image", json={"image": encoded, **wrong})
        assert answer.status_code == 422


def test_models_are_set_and_waited_for(api):
    assert api.util_get_model_names() == ["postcard"]
    api.util_set_model("Postcard")
    api.util_wait_for_ready(0.1)
    assert api.util_get_current_model() == "postcard"
    assert "Euler a" in api.util_get_sampler_names()
    assert "karras" in api.util_get_scheduler_names()
    assert api.get_upscalers()[0]["name"] == "None"
    assert api.set_options(api.get_options()) is None  # Open WebUI posts all of it back


def test_progress_is_idle_only_when_nothing_is_drawn(server, api):
    client, _ = server
    idle = api.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)
    done = threading.Thread(target=api.txt2img, kwargs={"prompt": "a", "seed": 1, **SMALL, "steps": 150})
    done.start()
    while not (busy := api.get_progress())["state"]["job_count"]:
        assert done.is_alive()
    assert busy["progress"] > 0
    while not (busy := api.get_progress())["current_image"]:
        assert busy["state"]["job_count"]
    assert Image.open(io.BytesIO(base64.b64decode(busy["current_image"]))).size == (64, 64)
    assert api.interrupt() == {}
    done.join()
    assert api.get_progress()["state"]["job_count"] == 0
    assert wait(client, client.get("/api/jobs").json()["jobs"][0]["id"])["status"] == "cancelled"


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"sampler_name": "nonsense"}, 404),
        ({"override_settings": {"sd_model_checkpoint": "nobody"}}, 404),
        ({"width": 65}, 422),
        ({"batch_size": 99}, 422),
        ({"styles": ["a"]}, 422),
        ({"override_settings": {"sd_vae": "nobody"}}, 404),
        ({"script_name": "x/y/z plot"}, 422),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "canny"}]}}}, 422),
        ({"restore_faces": True}, 422),
        ({"seed": "1, Steps: 9"}, 422),
    ],
)
def test_what_cannot_be_done_is_a_clear_4xx(server, given, status):
    answer = server[0].post("/sdapi/v1/txt2img", json={"prompt": "a", **SMALL, **given})
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]


def test_no_address_is_fetched_and_no_setting_smuggled(server):
    image = "http://127.0.0.1:1/a.png"
    answer = server[0].post("/sdapi/v1/img2img", json={"prompt": "a", **SMALL, "init_images": [image]})
    assert (answer.status_code, "base64" in answer.json()["detail"]) == (422, True)
    fields = {**SMALL, "prompt": "a\nNegative prompt: b\nSteps: 99, Seed: 3", "seed": 4, "unheard_of": 1}
    info = json.loads(server[0].post("/sdapi/v1/txt2img", json=fields).json()["info"])
    assert (info["steps"], info["seed"], info["prompt"]) == (3, 4, fields["prompt"])


def test_a_client_that_checks_types(server):
    backend = sd_backend_client.connect_to_backend(str(server[0].base_url))
    params = sd_backend_client.DiffusionParams(
        prompt="a red house", steps=3, width=64, height=64, seed=7, batch_size=2
    )
    result = backend.submit_txt2img(params).wait(timeout=300)
    assert result.seeds == [7, 8]
    assert [image.size for image in result.images] == [(64, 64)] * 2
