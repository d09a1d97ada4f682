"""Units of ControlNet and IP-Adapter, by webuiapi and our API: the pipeline's pictures, bit for bit."""

import base64
import io

import numpy as np
import pytest
import torch
import webuiapi
from PIL import Image, ImageDraw
from serve_server import ASK, embedded, png, running, shelf, wait
from tiny_image_prompts import PROJECTED, make_encoder

import ldm
from ldm.adapters.image_prompt import ImageAdapter, cross_layers
from ldm.adapters.projections import ImageProjection
from ldm.checkpoint.save import save_module
from ldm.images.png import read_request
from ldm.models import ControlNet
from ldm.preprocess import preprocess
from ldm.serve.models import Shelf
from ldm.spelling import squash

pytest.importorskip("cv2", reason="no OpenCV: pip install 'ldm[control]'", exc_type=ImportError)
SMALL = {"width": 64, "height": 64, "steps": 2, "sampler_name": "Euler", "cfg_scale": 2.0}
OWN = {"height": 64, "width": 64, "num_inference_steps": 2, "sampler": "euler", "guidance_scale": 2.0}
EDGES, EYE = "Edges", "ip-adapter_eye"


def randomised(module, seed=0):
    torch.manual_seed(seed)
    for each in module.parameters():
        each.data += 0.1 * torch.randn_like(each)
    return module


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder with a ControlNet, an IP-Adapter and what encodes its pictures; and what is not listed."""
    root, unet = tmp_path_factory.mktemp("networks"), embedded().unet
    net = ControlNet.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    save_module(randomised(net), root / EDGES)
    layers = cross_layers(unet)
    adapter = ImageAdapter(ImageProjection(PROJECTED, layers[0].dim, 4), layers)
    randomised(adapter).save(root / f"{EYE}.safetensors")
    make_encoder(root / "image_encoder")
    (root / "old.pth").write_bytes(b"pickle")
    return root


@pytest.fixture(scope="module")
def server(networks, tmp_path_factory):
    shelves = [Shelf(embedded(), ldm.load, control_dir=networks)]
    with running(tmp_path_factory.mktemp("serve"), shelves=shelves) as made:
        yield made


@pytest.fixture(scope="module")
def api(server):
    url = server[0].base_url
    return webuiapi.WebUIApi(host=url.host, port=url.port)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A picture with edges, as a file."""
    image = Image.new("RGB", (64, 64), (90, 140, 200))
    ImageDraw.Draw(image).polygon([(10, 60), (10, 30), (32, 8), (54, 30), (54, 60)], fill=(200, 40, 40))
    path = tmp_path_factory.mktemp("house") / "house.png"
    image.save(path)
    return path


def own(**fields):
    return np.asarray(embedded()("a red house", seed=5, **OWN, **fields).images[0])


def drawn(api, unit, **fields):
    # webuiapi would write the units into its own default, and send them with every later call.
    ask = {"prompt": "a red house", "seed": 5, "alwayson_scripts": {}, **SMALL, **fields}
    result = api.txt2img(controlnet_units=[unit], **ask)
    return np.asarray(result.image)


def base64_of(path):
    return base64.b64encode(path.read_bytes()).decode()


def test_a_unit_draws_what_the_pipeline_draws(api, networks, house):
    """A preprocessor at the drawing's size, strength, steps and mode."""
    settings = {"module": "canny", "weight": 0.8, "guidance_start": 0.1, "control_mode": 2}
    settings |= {"threshold_a": 90, "threshold_b": 999, "pixel_perfect": True, "resize_mode": "Just Resize"}
    found = drawn(api, webuiapi.ControlNetUnit(Image.open(house), model="edges [0a1b2c3d]", **settings))
    use = {"model": str(networks / EDGES), "image": str(house), "preprocess": "canny:low=90"}
    expected = own(control=[use | {"scale": 0.8, "start": 0.1, "mode": "control"}])
    assert (found == expected).all()
    assert (expected != own()).any()


def test_a_finished_map_and_one_made_at_another_resolution(api, networks, house, tmp_path):
    """Without a module the picture is the map; processor_res 96 is of the shorter side, then made small."""
    plain = drawn(api, webuiapi.ControlNetUnit(Image.open(house), model=EDGES, resize_mode="Just Resize"))
    use = {"model": str(networks / EDGES), "image": str(house)}
    assert (plain == own(control=[use])).all()
    large = Image.open(house).resize((96, 96), Image.Resampling.LANCZOS)
    Image.fromarray(preprocess(np.asarray(large), "canny", low=64, high=64)).save(tmp_path / "map.png")
    unit = webuiapi.ControlNetUnit(Image.open(house), module="canny", model=EDGES, processor_res=96)
    assert (drawn(api, unit) == own(control=[use | {"image": str(tmp_path / "map.png")}])).all()


@pytest.mark.filterwarnings("ignore:.*it is stretched to fit")
def test_another_shape_is_stretched_cropped_or_filled(api, networks, tmp_path):
    wide = Image.effect_noise((96, 48), 60).convert("RGB")
    ImageDraw.Draw(wide).rectangle((0, 0, 95, 47), outline=(10, 20, 30))
    inside = Image.new("RGB", (64, 64), (10, 20, 30))
    inside.paste(wide.resize((64, 32), Image.Resampling.LANCZOS), (0, 16))
    for name, picture, resize in (
        ("Just Resize", wide, "stretch"),
        ("Crop and Resize", wide, "crop"),
        ("Resize and Fill", inside, "stretch"),
    ):
        path = tmp_path / f"{squash(name)}.png"
        picture.save(path)
        expected = own(control=[{"model": str(networks / EDGES), "image": str(path), "resize": resize}])
        unit = webuiapi.ControlNetUnit(wide, model=EDGES, resize_mode=name)
        assert (drawn(api, unit) == expected).all(), name


def test_an_ip_adapter_is_a_unit_too(api, networks, house):
    found = drawn(
        api, webuiapi.ControlNetUnit(Image.open(house), module="ip-adapter-auto", model=EYE, weight=0.6)
    )
    adapter = str(networks / f"{EYE}.safetensors")
    expected = own(image_prompts=[{"adapter": adapter, "images": [str(house)], "scale": 0.6}])
    assert (found == expected).all()
    assert (expected != own()).any()


def test_old_spellings_and_places_of_a_mask(server, networks, house, tmp_path):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    unit = {"input_image": base64_of(house), "model": EDGES, "guidance": 0.5, "guessmode": True}
    unit |= {"lowvram": True, "effective_region_mask": base64_of(tmp_path / "mask.png"), "resize_mode": 0}
    fields = {"prompt": "a red house", "seed": 5, **SMALL}
    args = {"args": [unit, {"enabled": False, "model": "nobody"}]}
    told = server[0].post("/sdapi/v1/txt2img", json={**fields, "alwayson_scripts": {"controlnet": args}})
    assert told.status_code == 200, told.text
    image = Image.open(io.BytesIO(base64.b64decode(told.json()["images"][0])))
    use = {"model": str(networks / EDGES), "image": str(house), "mask": str(tmp_path / "mask.png")}
    assert (np.asarray(image) == own(control=[use | {"end": 0.5, "mode": "control"}])).all()


def test_a_drawing_on_a_picture_shows_it(api, networks, house):
    """A unit without a picture of its own."""
    unit = webuiapi.ControlNetUnit(module="invert", model=EDGES)
    ask = {"prompt": "a red house", "seed": 5, "denoising_strength": 0.6, "alwayson_scripts": {}, **SMALL}
    found = api.img2img(images=[Image.open(house)], controlnet_units=[unit], **ask).image
    use = {"model": str(networks / EDGES), "preprocess": "invert"}
    expected = own(image=str(house), strength=0.6, control=[use])
    assert (np.asarray(found) == expected).all()


def test_what_programs_ask_first(api, server, networks, house):
    assert api.has_controlnet
    assert api.controlnet_version() >= 2
    first, second = api.controlnet_model_list()
    assert (first, second[:-11]) == (EDGES, EYE)
    modules = server[0].get("/controlnet/module_list").json()
    assert {"none", "canny", "tile_resample", "ip-adapter-auto"} <= {*modules["module_list"]}
    assert [each["name"] for each in modules["module_detail"]["canny"]["sliders"]] == [
        "Resolution",
        "Low",
        "High",
    ]
    types = server[0].get("/controlnet/control_types").json()["control_types"]
    assert types["IP-Adapter"]["default_model"] == second
    assert types["Canny"]["default_option"] == "canny"
    assert types["All"]["model_list"] == ["None", first, second]
    assert server[0].get("/controlnet/settings").json()["control_net_unit_count"] > 1
    expected = preprocess(np.asarray(Image.open(house)), "canny", low=64, high=200)
    for a, b in ((64, 200), (200, 64), (300, 64)):  # the wrong way round, and one beyond the bounds
        low_first = preprocess(np.asarray(Image.open(house)), "canny", low=64, high=100)
        found = api.controlnet_detect([Image.open(house)], "canny", 64, threshold_a=a, threshold_b=b)
        assert (np.asarray(found.image) == (expected if a < 255 else low_first)).all()


def test_our_own_api_and_what_a_picture_keeps(server, networks, house, tmp_path):
    """Names of the server's, not its paths, with which files they were; sent back, the same again."""
    client, service = server
    upload = client.post("/api/uploads", content=house.read_bytes()).json()["id"]
    asked = {
        **ASK,
        "control": [{"model": EDGES, "image": upload, "preprocess": "canny"}],
        "image_prompts": [{"adapter": EYE, "images": [f"data:image/png;base64,{base64_of(house)}"]}],
    }
    job = wait(client, client.post("/api/jobs", json=asked).json()["id"])
    assert job["error"] is None
    data = client.get(f"/api/pictures/{job['pictures'][0]}.png").content
    (tmp_path / "kept.png").write_bytes(data)
    kept = read_request(tmp_path / "kept.png")
    control, prompt = kept.control[0], kept.image_prompts[0]
    assert (control.model, control.image, prompt.adapter) == (EDGES, f"uploads/{upload}", EYE)
    assert control.sha256
    assert prompt.sha256
    assert prompt.image_encoder is None
    assert str(networks) not in kept.to_json()
    again = wait(client, client.post("/api/jobs", json=kept.filled_in("json")).json()["id"])
    assert client.get(f"/api/pictures/{again['pictures'][0]}.png").content == data
    assert {EDGES, EYE} == {*client.get("/api/models").json()["networks"]}
    assert service.uploads.place(upload)


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        ({"model": "nobody"}, "the server has Edges"),
        ({}, "args must be"),
        ({"model": "None"}, "needs one of"),
        ({"model": "../../etc/passwd"}, "the server has"),
        ({"module": "depth_midas"}, "needs weights"),
        ({"module": "nonsense"}, "unknown preprocessor"),
        ({"image": "http://127.0.0.1/a.png"}, "base64"),
        ({"image": "", "module": "ip-adapter-auto", "model": EYE}, "reads a picture"),
        ({"module": "ip-adapter-auto", "model": EYE, "guidance_end": 0.5}, "guidance_end"),
        ({"advanced_weighting": [1.0] * 13}, "cannot do that"),
        ({"resize_mode": 7}, "0, 1 or 2"),
        ({"mask": base64.b64encode(png()).decode()}, "effective_region_mask"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, "never acts"),
        ({"weight": "much"}, "scale"),
        ({"control_mode": "nonsense"}, "mode"),
        ({"module": "canny", "image": base64.b64encode(png((4, 9000))).decode()}, "processor_res"),
    ],
)
def test_what_cannot_be_done_is_a_clear_422(server, house, unit, words):
    unit = {"model": EDGES, "image": base64_of(house), **unit}
    units = {"args": [unit]} if words != "args must be" else "units"
    fields = {"prompt": "a", **SMALL, "alwayson_scripts": {"controlnet": units}}
    answer = server[0].post("/sdapi/v1/txt2img", json=fields)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"control": [{"model": "/etc"}]}, "control", "the server has"),
        ({"control": [{"model": EDGES, "image": "/etc/passwd"}]}, "control", "paths are not opened"),
        ({"control": [{"model": EDGES, "mask": "../x.png"}]}, "control", "paths are not opened"),
        (
            {"image_prompts": [{"adapter": EYE, "images": ["/a.png"]}]},
            "image_prompts",
            "paths are not opened",
        ),
        ({"image_prompts": [{"adapter": EYE, "image_encoder": "/x"}]}, "image_prompts", "give adapter alone"),
        ({"control": [{"model": EDGES}] * 9}, "control", "at most 8"),
        ({"control": "Edges"}, "control", ""),
        ({"hires": {"control": [{"model": EDGES}]}}, "control", "second pass"),
    ],
)
def test_no_file_of_the_server_is_named(server, fields, param, words):
    answer = server[0].post("/api/jobs", json={**ASK, **fields})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


def test_without_a_folder_units_are_refused_and_nothing_is_listed(tmp_path):
    with running(tmp_path, shelves=[shelf()]) as (client, _):
        assert client.get("/controlnet/model_list").status_code == 404
        assert client.get("/sdapi/v1/scripts").json()["txt2img"] == []
        args = {"args": [{"model": EDGES}]}
        answer = client.post("/sdapi/v1/txt2img", json={**SMALL, "alwayson_scripts": {"ControlNet": args}})
        assert (answer.status_code, "alwayson_scripts" in answer.json()["detail"]) == (422, True)
