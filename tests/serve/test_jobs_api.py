"""Our own API, over a real server with the embedded model."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image
from serve_server import ASK, png, running, shelf, wait

import ldm
import ldm.serve.drawing
from ldm.images.png import read_request
from ldm.images.provenance import COMPOSITE, SOURCE, TRAINED, VOCABULARY, marks_in
from ldm.serve.ticket import State

BLUE = "a blue boat"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve")) as made:
        yield made


@pytest.fixture
def client(server):
    return server[0]


def ask(client, **fields):
    answer = client.post("/api/jobs", json={**ASK, **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()


def fault(answer):
    return answer.json()["error"]


def test_a_job_is_drawn_as_the_pipeline_draws_it(client, tmp_path):
    told = wait(client, ask(client, n=2)["id"])
    assert (told["status"], told["progress"], told["error"]) == ("completed", 1.0, None)
    pipe = ldm.load()
    for k, name in enumerate(told["pictures"]):
        file = tmp_path / f"{k}.png"
        file.write_bytes(client.get(f"/api/pictures/{name}.png").content)
        own = pipe(ASK["prompt"], 64, 64, 2, seed=7 + k, sampler="euler").images[0]
        levels = np.asarray(Image.open(file), int) - np.asarray(own, int)
        assert abs(levels).max() <= 1  # a batch rounds otherwise than a picture alone
        request = read_request(file)
        assert (request.seeds, request.model) == ((7 + k,), "postcard")
        assert client.get(f"/api/pictures/{name}").json()["request"]["seeds"] == [7 + k]


def test_a_models_world_is_told_and_its_words_are_kept(client):
    world = client.get("/api/models").json()["worlds"]["postcard"]
    assert world["things"][0][:2] == [["house", "houses"], ["cottage", "cottages"]]
    assert "words" not in world
    told = wait(client, ask(client, prompt="a limousine", steps=1)["id"])
    request = client.get(f"/api/pictures/{told['pictures'][0]}").json()["request"]
    assert (request["prompt"], request["drawn_as"]) == ("a limousine", [["limousine", "car"]])


def test_requests_name_what_is_wrong_with_them(client):
    for given, param, words in (
        ({"height": 641}, "height", "multiple of 8"),
        ({"height": 4096}, "height", "at most 2048"),
        ({"steps": 151}, "num_inference_steps", "at most 150"),
        ({"n": 17}, "n", "from 1 to 16"),
        ({"seeds": list(range(17)), "seed": None}, None, "two names"),
        ({"nonsense": 1}, "nonsense", "is not a field"),
        ({"sampler": "nonsense"}, None, "unknown sampler"),
        ({"model": 3}, "model", "must be a name"),
        ({"prompt": "a <lora:nobody:1>"}, "loras", "no LoRA of that name"),
        ({"hires_upscaler": "/etc/passwd"}, "hires_upscaler", "must be one of"),
        ({"image_prompts": [{"adapter": "/etc/passwd"}]}, "image_prompts", "has no IP-Adapters"),
        ({"hires": {"image_prompts": [{"adapter": "a/b"}]}}, "image_prompts", "has no IP-Adapters"),
        ({"hires_scale": 8, "hires": {}, "width": 512}, "hires_scale", "at most 2048"),
        ({"prompt": "a" * 20_001}, "prompt", "too long"),
        ({"prompt": " AND ".join("abcdefghi")}, "prompt", "too many parts"),
        ({"seed_resize": [2**20, 8]}, "seed_resize", "at most 2048"),
        ({"tile_size": 8}, "tile_size", "at least 64"),
        ({"hires": {"hires": {}}}, "hires", "another request within"),
        ({"not_kept": ["image"]}, "not_kept", "notes it"),
    ):
        answer = client.post("/api/jobs", json={**ASK, **given})
        assert answer.status_code == 400, given
        assert words in fault(answer)["message"], given
        assert fault(answer)["param"] == param, given
    answer = client.post("/api/jobs", json={**ASK, "model": "../x"})
    assert (answer.status_code, fault(answer)["code"]) == (404, "model_not_found")
    for body in (b"[]", b"{", b"3", b"\xff"):
        answer = client.post("/api/jobs", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert fault(answer)["type"] == "invalid_request_error"


def test_what_the_model_refuses_is_told_by_the_job(client):
    told = wait(client, ask(client, prompt_2="x")["id"])
    assert told["status"] == "failed"
    assert told["error"].startswith("prompt_2 is not allowed here")


def test_events_tell_each_step_with_a_preview(client):
    job, seen = ask(client, steps=5)["id"], []
    with client.stream("GET", f"/api/jobs/{job}/events?preview=true") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            seen += [json.loads(line[6:])] if line.startswith("data: ") else []
    assert seen[-1]["status"] == "completed"
    assert [each["progress"] for each in seen] == sorted(each["progress"] for each in seen)
    previews = [each["preview"] for each in seen if "preview" in each]
    assert previews
    assert all(each.startswith("data:image/webp;base64,") for each in previews)
    again = client.get(f"/api/jobs/{job}/events").text  # of one that is over: its last word
    assert json.loads(again.partition("data: ")[2])["status"] == "completed"


def test_jobs_are_cancelled_while_they_wait_and_while_they_are_drawn(client):
    drawn, waiting = ask(client, steps=150, width=128), ask(client, guidance_scale=3)
    told = client.post(f"/api/jobs/{waiting['id']}/cancel").json()
    assert (told["status"], told["pictures"]) == ("cancelled", [])
    assert client.post(f"/api/jobs/{drawn['id']}/cancel").json()["status"] == "cancelled"
    assert wait(client, ask(client)["id"])["status"] == "completed"
    assert client.post("/api/jobs/nobody/cancel").status_code == 404
    assert client.get("/api/jobs/nobody").status_code == 404


def test_the_gallery_has_pages_search_and_an_end(client):
    for _ in range(3):
        wait(client, ask(client, prompt=BLUE)["id"])
    first = client.get("/api/pictures?limit=2&search=BLUE").json()
    second = client.get("/api/pictures", params={"limit": 2, "search": BLUE, "before": first["next"]}).json()
    names = [each["id"] for each in first["pictures"] + second["pictures"]]
    assert len(set(names)) == 3
    assert second["next"] is None
    assert client.delete(f"/api/pictures/{names[0]}").status_code == 204
    assert client.get(f"/api/pictures/{names[0]}.png").status_code == 404
    assert client.delete(f"/api/pictures/{names[0]}").status_code == 404
    assert client.get("/api/pictures?limit=0").status_code == 400
    assert {each["status"] for each in client.get("/api/jobs").json()["jobs"]} <= {*State}


def test_pictures_to_draw_from_are_uploads_pictures_or_data(client):
    data = png((64, 64), colour=(200, 30, 30))
    name = client.post("/api/uploads", content=data, headers={"content-type": "image/png"}).json()["id"]
    own = wait(client, ask(client)["id"])["pictures"][0]
    encoded = base64.b64encode(data).decode()
    assert client.post("/api/uploads", json={"image": encoded}).json()["id"] == name
    results = []
    for image in (name, f"data:image/png;base64,{encoded}", own):
        told = wait(client, ask(client, image=image, strength=0.6, steps=3, width=None, height=None)["id"])
        assert told["error"] is None
        results.append(client.get(f"/api/pictures/{told['pictures'][0]}.png").content)
    assert results[0] == results[1] != results[2]


def test_health_metrics_and_the_description(client):
    assert client.get("/healthz").json()["status"] == "ok"
    lines = client.get("/metrics").text.splitlines()
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    sample = re.compile(r'[a-z_]+(\{status="\w+"\})? [0-9.e+]+')
    assert all(sample.fullmatch(line) for line in lines if not line.startswith("#"))
    assert 'ldm_jobs_finished_total{status="completed"}' in "".join(lines)
    told = client.get("/openapi.json").json()
    assert told["components"]["schemas"]["Request"]["properties"]["num_inference_steps"]
    page = client.get("/docs").text
    assert "/api/jobs/{job}/events" in page
    assert not re.search(r"(src|href)=\"?(https?:)?//", page)


def test_alike_requests_that_wait_are_drawn_as_one_batch(server, monkeypatch):
    client, _ = server
    sizes, real = [], ldm.serve.drawing.draw_batch
    monkeypatch.setattr(
        "ldm.serve.drawing.draw_batch",
        lambda job, batch, *a: sizes.append(len(batch)) or real(job, batch, *a),
    )
    first = ask(client, steps=20)["id"]
    names = [ask(client, seed=k, prompt=f"a {c} house")["id"] for k, c in enumerate(("red", "blue", "white"))]
    assert [wait(client, name)["status"] for name in (first, *names)] == ["completed"] * 4
    assert sizes == [1, 3]


def test_a_full_queue_answers_429_with_a_time(tmp_path):
    with running(tmp_path, capacity=2) as (client, service):
        asked = [
            client.post("/api/jobs", json={**ASK, "steps": 100, "guidance_scale": 1 + k}) for k in range(5)
        ]
        statuses = [each.status_code for each in asked]
        assert statuses[:2] == [202, 202]
        assert statuses[-1] == 429
        assert int(asked[-1].headers["retry-after"]) >= 1
        assert fault(asked[-1])["code"] == "queue_full"
        assert service.counts["refused"] == statuses.count(429)


def test_a_server_that_stops_tells_what_it_did_not_draw(tmp_path):
    with running(tmp_path) as (client, _):
        names = [ask(client, steps=150, guidance_scale=1 + k)["id"] for k in range(2)]
    with running(tmp_path, shelves=[shelf()]) as (client, _):
        for name in names:
            assert client.get(f"/api/jobs/{name}").json()["status"] == "interrupted"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_each_file_says_that_a_model_drew_it(client, kind):
    drawn = wait(client, ask(client)["id"])["pictures"][0]
    upload = client.post("/api/uploads", content=png(), headers={"content-type": "image/png"}).json()["id"]
    edited = wait(client, ask(client, image=upload, strength=0.5)["id"])["pictures"][0]
    for name, source in ((drawn, TRAINED), (edited, COMPOSITE)):
        said = marks_in(client.get(f"/api/pictures/{name}.{kind}").content)
        assert said[SOURCE] == VOCABULARY + source
