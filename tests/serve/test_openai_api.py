"""OpenAI's own client, which nobody here wrote, against a running server with the embedded model."""

import base64
import io

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image
from serve_server import png, running

import ldm
from ldm.images.png import read_request
from ldm.serve.guard import Rules

KEY = "a key"
MORE = {
    "seed": 7,
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "negative_prompt": "snow",
    "sampler": "euler",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    secret = b"x" * 32
    with running(tmp_path_factory.mktemp("openai"), Rules(KEY, secret=secret)) as (client, service):
        service.secret = secret
        yield str(client.base_url), service


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


def image_of(data):
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_are_those_of_the_pipeline(client, tmp_path):
    answer = client.images.generate(prompt="a red house", n=2, size="64x96", extra_body=MORE)
    assert (answer.size, answer.output_format, answer.background) == ("64x96", "png", "opaque")
    assert [each.seed for each in answer.data] == [7, 8]
    pipe = ldm.load()
    for k, each in enumerate(answer.data):
        file = tmp_path / f"{k}.png"
        file.write_bytes(base64.b64decode(each.b64_json))
        own = pipe(
            "a red house",
            height=96,
            width=64,
            num_inference_steps=3,
            guidance_scale=2.0,
            negative_prompt="snow",
            seed=7 + k,
            sampler="euler",
        ).images[0]
        assert abs(np.asarray(Image.open(file), int) - np.asarray(own, int)).max() <= 1
        assert read_request(file).negative_prompt == "snow"


def test_a_transparent_background_is_alpha(client):
    ask = {"prompt": "a red house", "size": "64x64", "background": "transparent", "extra_body": MORE}
    answer = client.images.generate(**ask)
    assert answer.background == "transparent"
    assert image_of(answer.data[0].b64_json).mode == "RGBA"


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_formats_keep_how_they_were_drawn(client, tmp_path, kind):
    ask = {"prompt": "a boat", "size": "64x64", "output_format": kind, "extra_body": MORE}
    data = [client.images.generate(**ask, output_compression=q).data[0].b64_json for q in (20, 95)]
    assert image_of(data[0]).format == kind.upper()
    assert len(data[0]) < len(data[1])
    file = tmp_path / f"a.{kind}"
    file.write_bytes(base64.b64decode(data[1]))
    assert read_request(file).prompt == "a boat"


def test_an_address_can_be_read_without_the_key_and_no_other(client):
    ask = {"prompt": "a boat", "size": "64x64", "response_format": "url", "extra_body": MORE}
    for kind in ("png", "webp"):
        address = client.images.generate(**ask, output_format=kind).data[0].url
        answer = httpx2.get(address)
        assert answer.headers["content-type"] == f"image/{kind}"
        assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
        assert httpx2.get(address.partition("?")[0]).status_code == 401


def test_a_stream_shows_pictures_on_the_way(client):
    more = {**MORE, "num_inference_steps": 12}
    events = list(
        client.images.generate(prompt="a boat", size="64x64", stream=True, partial_images=2, extra_body=more)
    )
    kinds = [each.type for each in events]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) == {"image_generation.partial_image"}
    assert [each.partial_image_index for each in events[:-1]] == list(range(len(events) - 1))
    whole = image_of(events[-1].b64_json)
    assert (whole.size, events[-1].usage.total_tokens) == ((64, 64), 0)
    again = client.images.generate(prompt="a boat", size="64x64", extra_body=more).data[0].b64_json
    assert again == events[-1].b64_json


def test_what_is_transparent_is_drawn_anew_and_nothing_else(client):
    picture = Image.new("RGB", (64, 64), (200, 40, 40))
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (32, 0, 64, 64))
    files = [io.BytesIO(), io.BytesIO()]
    for each, file, name in zip((picture, mask), files, ("a.png", "mask.png"), strict=True):
        each.save(file, "PNG")
        file.name = name
    answer = client.images.edit(image=files[0], mask=files[1], prompt="a blue sea", extra_body=MORE)
    drawn = np.asarray(image_of(answer.data[0].b64_json), int)
    assert (drawn[:, :32] == (200, 40, 40)).all()
    assert abs(drawn[:, 32:] - (200, 40, 40)).mean() > 10
    picture.putalpha(mask.getchannel("A"))  # without a mask the picture's own
    own = io.BytesIO()
    picture.save(own, "PNG")
    again = client.images.edit(image=[("a.png", own.getvalue())], prompt="a blue sea", extra_body=MORE)
    assert (np.asarray(image_of(again.data[0].b64_json))[:, :32] == (200, 40, 40)).all()


def test_edits_without_a_mask_variations_and_streams_of_edits(client):
    file = ("a.png", png(colour=(200, 40, 40)), "image/png")
    ask = {"image": file, "prompt": "a boat", "extra_body": MORE}
    whole = client.images.edit(**ask).data[0].b64_json
    assert image_of(whole).size == (64, 64)
    events = list(client.images.edit(**ask, stream=True, partial_images=1))
    assert events[-1].type == "image_edit.completed"
    assert events[-1].b64_json == whole
    with pytest.warns(DeprecationWarning, match="deprecated"):
        varied = client.images.create_variation(image=file, n=2, extra_body=MORE)
    assert len({each.b64_json for each in varied.data}) == 2


def test_models(client):
    assert [each.id for each in client.models.list()] == ["postcard"]
    assert client.models.retrieve("postcard").owned_by == "ldm"
    assert client.images.generate(model="postcard", prompt="a", size="64x64", extra_body=MORE).data
    with pytest.raises(openai.NotFoundError) as refused:
        client.images.generate(model="gpt-image-2", prompt="a")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        ({"size": "641x640"}, "size"),
        ({"size": "4096x4096"}, "size"),
        ({"size": "large"}, "size"),
        ({"n": 11_000}, "n"),
        ({"quality": "nice"}, "quality"),
        ({"background": "transparent", "output_format": "jpeg"}, "background"),
        ({"output_format": "svg"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "partial_images": 9}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"extra_body": {"image": "/etc/passwd"}}, "image"),
        ({"extra_body": {"seed": 2**70}}, "seed"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
    ],
)
def test_what_cannot_be_done_is_named(client, ask, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a boat", **ask)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_forms_are_checked_as_well(client):
    file = ("a.png", png(), "image/png")
    for ask, param in (
        ({"image": [file, file]}, "image"),
        ({"image": ("a.svg", b"<svg/>", "image/png")}, "image"),
        ({"image": file, "mask": ("m.png", png(), "image/png")}, "mask"),
        ({"image": file, "mask": ("m.png", b"no", "image/png")}, "mask"),
        ({"image": file, "n": 0}, "n"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.edit(prompt="a boat", **ask)
        assert refused.value.param == param


def test_other_faults_have_their_classes(server, client):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").images.generate(prompt="a")
    with pytest.raises(
        openai.BadRequestError, match="strength is not allowed"
    ):  # which only the model can tell
        client.images.generate(prompt="a", size="64x64", extra_body={"strength": 0.5})
    queue = server[1].queue
    capacity, queue.capacity = queue.capacity, 0
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            client.images.generate(prompt="a", size="64x64", extra_body=MORE)
        assert int(refused.value.response.headers["retry-after"]) >= 1
    finally:
        queue.capacity = capacity


def test_who_hangs_up_cancels_what_he_asked_for(server, client):
    before = {each["id"] for each in server[1].store.jobs(1000)}
    slow = {"seed": 1, "num_inference_steps": 150, "sampler": "euler"}
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).images.generate(prompt="a boat", extra_body=slow)
    (told,) = (each for each in server[1].store.jobs(1000) if each["id"] not in before)
    ticket = server[1].ticket(told["id"])
    assert ticket.wait(30)
    assert ticket.state.value == "cancelled"
    assert ticket.progress < 1
