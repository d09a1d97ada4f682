"""AUTOMATIC1111's API with a folder of models: VAEs, styles, resize modes; and what it does not have."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from serve_server import running, shelf, wait

import ldm
from ldm.checkpoint import save_module
from ldm.images.fitting import reshaped
from ldm.prompts.styles import Style

SMALL = {"width": 64, "height": 64, "steps": 2, "sampler_name": "Euler", "cfg_scale": 2.0, "seed": 5}


@pytest.fixture(scope="module")
def pipe():
    return ldm.load()


@pytest.fixture(scope="module")
def server(tmp_path_factory, pipe):
    folder = tmp_path_factory.mktemp("models")
    darker = ldm.load().vae
    with torch.no_grad():
        darker.decoder.layers[-1].bias.sub_(0.3)
    save_module(darker, folder / "vae" / "Darker")
    (folder / "vae" / "pickled.ckpt").write_bytes(b"")
    styles = {"Misty": Style("{prompt} in the fog", "sun"), "Late": Style("at night")}
    with running(tmp_path_factory.mktemp("s"), shelves=[shelf(folder, pipe)], styles=styles) as (
        client,
        service,
    ):
        yield client, service, folder


def drawn(client, path="txt2img", **given):
    answer = client.post(f"/sdapi/v1/{path}", json={"prompt": "a house", **SMALL, **given})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    image = Image.open(io.BytesIO(base64.b64decode(told["images"][0])))
    return np.asarray(image, int), json.loads(told["info"])


def test_vaes_are_listed_and_chosen(server, pipe):
    client, service, folder = server
    assert client.get("/sdapi/v1/sd-vae").json() == [
        {"model_name": "Darker", "filename": "Darker.safetensors"}
    ]
    assert client.get("/api/models").json()["vaes"] == ["Darker"]
    own, info = drawn(client)
    assert info["sd_vae_name"] is None
    darker, info = drawn(client, override_settings={"sd_vae": "darker.safetensors"})
    assert info["sd_vae_name"] == "Darker"
    assert darker.mean() < own.mean() - 20
    loaded = ldm.load(vae=folder / "vae" / "Darker")
    assert info["sd_model_hash"] == loaded.model_hash == pipe.with_vae(folder / "vae" / "Darker").model_hash
    request = service.store.page(1)[0][0].request
    alone = loaded(
        "a house", seed=5, height=64, width=64, sampler="euler", num_inference_steps=2, guidance_scale=2.0
    )
    assert request["model_hash"] == loaded.model_hash
    assert abs(np.asarray(alone.images[0], int) - darker).max() <= 1
    client.post("/sdapi/v1/options", json={"sd_vae": "Darker"}).raise_for_status()
    assert client.get("/sdapi/v1/options").json()["sd_vae"] == "Darker"
    assert np.array_equal(drawn(client)[0], darker)
    client.post("/sdapi/v1/options", json={"sd_vae": "Automatic"}).raise_for_status()
    assert np.array_equal(drawn(client)[0], own)
    job = client.post(
        "/api/jobs", json={"prompt": "a", "model": "postcard/Darker", "steps": 1, "W": 64, "H": 64}
    )
    assert wait(client, job.json()["id"])["model"] == "postcard/Darker"
    shared = service.shelf("postcard/Darker").pipe
    assert shared.unet is service.shelf("postcard").pipe.unet
    for wrong in ("nobody", "pickled", "../vae/Darker"):
        answer = client.post("/sdapi/v1/options", json={"sd_vae": wrong})
        assert (answer.status_code, "unknown VAE" in answer.json()["detail"]) == (404, True)


def test_styles_are_listed_and_put_around_prompts(server):
    client = server[0]
    assert client.get("/sdapi/v1/prompt-styles").json()[0] == {
        "name": "Misty", "prompt": "{prompt} in the fog", "negative_prompt": "sun"
    }  # fmt: skip
    _, info = drawn(client, styles=["Late", "Misty"], negative_prompt="snow")
    assert info["prompt"] == "a house, at night in the fog"
    assert (info["negative_prompt"], info["styles"]) == ("snow, sun", ["Late", "Misty"])
    told = client.post(
        "/api/jobs", json={"prompt": "a", "styles": ["Late"], "steps": 1, "W": 64, "H": 64}
    ).json()
    assert told["request"]["prompt"] == "a, at night"
    wait(client, told["id"])
    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "a", **SMALL, "styles": ["Lat"]})
    assert (answer.status_code, "did you mean Late" in answer.json()["detail"]) == (422, True)


def test_resize_modes_are_those_of_the_pipeline(server, pipe):
    client, service, _ = server
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 100, 3), dtype=np.uint8))
    data = io.BytesIO()
    wide.save(data, "PNG")
    given = {"init_images": [base64.b64encode(data.getvalue()).decode()], "denoising_strength": 0.5}
    ask = {"seed": 5, "height": 64, "width": 64, "sampler": "euler", "num_inference_steps": 2}
    ask |= {"guidance_scale": 2.0, "strength": 0.5}
    for mode, name in enumerate(("resize", "crop", "fill", "latent")):
        ours, _ = drawn(client, "img2img", resize_mode=mode, **given)
        alone = pipe("a house", image=wide, resize_mode=name, **ask).images[0]
        assert abs(np.asarray(alone, int) - ours).max() <= 1
        if name in ("crop", "fill"):
            before = pipe("a house", image=reshaped(wide, (64, 64), name), **ask).images[0]
            assert abs(np.asarray(before, int) - ours).max() <= 1
    for wrong in (4, -1, "fill"):
        answer = client.post(
            "/sdapi/v1/img2img", json={"prompt": "a", **SMALL, **given, "resize_mode": wrong}
        )
        assert answer.status_code == 422
    monkey = service.limits.side
    object.__setattr__(service.limits, "side", 80)
    try:
        answer = client.post("/sdapi/v1/img2img", json={"prompt": "a", **SMALL, **given, "resize_mode": 3})
    finally:
        object.__setattr__(service.limits, "side", monkey)
    assert (answer.status_code, "beyond 80 pixels" in answer.json()["detail"]) == (422, True)


def test_interrogate_is_a_clear_4xx(server):
    answer = server[0].post("/sdapi/v1/interrogate", json={"image": "", "model": "clip"})
    assert (answer.status_code, "no model that describes" in answer.json()["detail"]) == (422, True)
