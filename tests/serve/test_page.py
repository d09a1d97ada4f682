"""The page as files: what is served, that it asks nothing of elsewhere, that its fields are a Request's."""

import configparser
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from serve_server import png, running

from ldm.images.png import save_png
from ldm.request import Request
from ldm.serve.front import FOLDER, TYPES
from ldm.serve.guard import Rules

FILES = sorted(FOLDER.iterdir())
TEXTS = {path.name: path.read_text("utf-8") for path in FILES}
OF_THE_API = {"seed", "n"}  # beside a Request's fields


class Fields(HTMLParser):
    """The `name`s of a page's fields, and what no page of ours has: scripts and handlers within it."""

    def __init__(self, text):
        super().__init__()
        self.names, self.ids, self.inline, self.labelled = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.ids.append(told.get("id"))
        self.names += [told["name"]] if tag in ("input", "select", "textarea") and "name" in told else []
        self.inline += [name for name in told if name.startswith("on") or name == "style"]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in told) else []


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve")) as (made, _):
        yield made


def test_all_its_files_are_served_with_their_types_and_a_policy(client):
    for path in FILES:
        answers = [client.get(f"/page/{path.name}"), *([client.get("/")] if path.stem == "index" else [])]
        for answer in answers:
            assert answer.content == path.read_bytes()
            assert answer.headers["content-type"].split(";")[0] == TYPES[path.suffix]
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "script-src" not in policy  # so that of all scripts only our own files run
    for name in ("nothing.js", "..%2Ffront.py", "%2e%2e/front.py", "../front.py"):
        assert client.get(f"/page/{name}").status_code == 404
    assert client.get("/docs").status_code == 200


def test_with_a_key_the_browser_asks_for_it(tmp_path):
    with running(tmp_path, Rules(key="sesame")) as (client, _):
        answer = client.get("/")
        assert (answer.status_code, answer.headers["www-authenticate"][:5]) == (401, "Basic")
        assert client.get("/", auth=("anyone", "sesame")).status_code == 200
        assert client.get("/page/page.js", auth=("anyone", "sesame")).status_code == 200


@pytest.mark.parametrize("name", TEXTS)
def test_it_asks_nothing_of_elsewhere_and_makes_no_markup_of_texts(name):
    text = TEXTS[name].replace("http://www.w3.org/2000/svg", "")  # a name, which nobody fetches
    assert re.findall(r"""https?:|["'(]//\w|@import|\bws:""", text) == []
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
    assert re.findall(markup, text) == []
    assert len(text.splitlines()) <= 400


def test_every_file_that_it_names_is_there():
    named = set(re.findall(r'"(?:/page/|\./)([\w.]+)"', "".join(TEXTS.values())))
    assert named | {"index.html"} == set(TEXTS)


def test_every_field_is_one_of_a_request_or_of_the_api():
    page = Fields(TEXTS["index.html"])
    assert page.inline == []
    assert len(page.names) == len(set(page.names)) > 15
    for name in page.names:
        parts = name.split(".")  # hires.strength: of the request within
        assert all(part in {*Request.model_fields, *OF_THE_API} for part in parts), name
    # What the scripts reach by its id is in the page.
    used = set(re.findall(r'\$\("([\w-]+)"\)', "".join(TEXTS.values())))
    assert used <= set(page.ids)


def test_the_lists_that_it_shows_are_names_that_requests_take(client):
    told = client.get("/api/limits").json()
    for name in told["samplers"]:
        assert Request(sampler=name).sampler == name
    for name in told["spacings"]:
        assert Request(spacing=name).spacing == name
    assert {"latent", "lanczos"} <= told["upscalers"].keys()


def test_an_upload_says_how_it_was_drawn_and_can_be_seen(client, tmp_path):
    ours = tmp_path / "ours.png"
    save_png(Image.new("RGB", (64, 64)), ours, Request(prompt="a boat", seeds=(5,), num_inference_steps=9))
    told = client.post("/api/uploads", content=ours.read_bytes()).json()
    assert (told["request"]["prompt"], told["request"]["seeds"]) == ("a boat", [5])
    assert client.get(f"/api/uploads/{told['id']}").content == ours.read_bytes()

    text = (
        "a castle\nNegative prompt: fog\nSteps: 12, Sampler: Euler a, CFG scale: 6.5, Seed: 77, Size: 64x64"
    )
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    theirs = tmp_path / "theirs.png"
    Image.new("RGB", (64, 64)).save(theirs, pnginfo=info)
    told = client.post("/api/uploads", content=theirs.read_bytes()).json()["request"]
    assert (told["prompt"], told["negative_prompt"], told["guidance_scale"]) == ("a castle", "fog", 6.5)
    assert (told["num_inference_steps"], told["sampler"]) == (12, Request(sampler="Euler a").sampler)

    plain = client.post("/api/uploads", content=png(kind="JPEG")).json()
    assert plain["request"] is None
    assert client.get(f"/api/uploads/{plain['id']}").headers["content-type"] == "image/jpeg"
    for name in ("0" * 64 + ".png", "..%2Findex.sqlite", "index.sqlite"):
        assert client.get(f"/api/uploads/{name}").status_code == 404


def test_it_travels_with_the_package():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8")
    assert config["options.package_data"]["ldm.serve"].split() == ["page/*"]
    assert {path.suffix for path in FILES} <= TYPES.keys()
