"""What strangers, and pages elsewhere, may try; over a real server whose models are never drawn with."""

import base64
import contextlib
import hashlib
import hmac
import io
import os
import socket
import struct
import time
import zlib
from types import SimpleNamespace

import httpx2
import pytest
from PIL import Image
from serve_server import ASK, png, running

from ldm.cli import main
from ldm.request import Request
from ldm.serve.guard import Rules, signed
from ldm.serve.models import Shelf
from ldm.serve.ticket import State, Ticket, as_json

KEY = "a long key"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "secret.png").write_bytes(png())
    pipe = SimpleNamespace(name="fake", lora_dir=folder / "loras", adapted=SimpleNamespace(loras=()))
    rules = Rules(origins=("https://friend.example",), hosts=("friend.local",), body=2**20, seconds=0.5)
    with running(folder / "served", rules, [Shelf(pipe, None)]) as made:
        yield made


@pytest.fixture
def client(server):
    return server[0]


def refused(client, **fields):
    """The message of a job that is not taken."""
    answer = client.post("/api/jobs", json={**ASK, **fields})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["message"]


def upload(client, data):
    return client.post("/api/uploads", content=data, headers={"content-type": "image/png"})


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width, height):
    """A small PNG that says it is large."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


# --- files and addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["image", "mask_image"])
def test_no_path_and_no_address_of_a_request_is_opened(client, field):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    here = f"127.0.0.1:{listener.getsockname()[1]}/a.png"
    for place in (
        *(
            "/etc/passwd",
            "../secret.png",
            "uploads/../../secret.png",
            "pictures/../../secret.png",
            "secret.png",
        ),
        *("file:///etc/passwd", f"http://{here}", f"HTTPS://{here}", f"ftp://{here}", f"//{here}"),
        *("//host/share/a.png", "\\\\host\\share\\a.png", "uploads/" + "0" * 64 + ".png", "-", ""),
        *("data:text/html;base64,PGI+", "data:image/svg+xml;base64,PHN2Zy8+", 3, ["a"]),
    ):
        assert f"{field} " in refused(client, **{field: place})
    with pytest.raises(BlockingIOError):  # nobody came
        listener.accept()
    listener.close()


def test_no_address_leads_to_files_beside_the_pictures(client):
    for path in (
        "../secret",
        "..%2fsecret",
        "%2e%2e/secret",
        "..%5csecret",
        "%2fetc%2fpasswd",
        "....//secret",
    ):
        answer = client.get(f"/api/pictures/{path}.png")
        assert answer.status_code == 404
    host, port = client.base_url.host, client.base_url.port
    raw = talk(host, port, b"GET /api/pictures/../../secret.png HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 404 " in raw.partition(b"\r\n")[0]


def test_loras_and_models_are_names_never_paths(client, server, tmp_path):
    lora_dir = server[1].shelf._lora_dir
    lora_dir.mkdir(exist_ok=True)
    (tmp_path / "out.safetensors").write_bytes(b"")
    (lora_dir / "pickled.pt").write_bytes(b"")
    if not (lora_dir / "linked.safetensors").is_symlink():
        os.symlink(tmp_path / "out.safetensors", lora_dir / "linked.safetensors")
    for name in ("pickled", "linked", "../out", str(tmp_path / "out")):
        assert "no LoRA of that name" in refused(client, loras=[{"name": name}])
    assert client.post("/api/jobs", json={**ASK, "model": "../../model"}).status_code == 404
    assert "hires_upscaler" in refused(client, hires_upscaler=str(tmp_path / "net.pth"))


# --- pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"<html><img src=x onerror=alert(1)></html>",
        b"\x80\x04\x95cos\nsystem\n(S'touch owned'\ntR.",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        png(kind="GIF"),
        png(kind="TIFF"),
        png(kind="BMP"),
        png()[:60],
        b"",
    ],
    ids=["svg", "html", "pickle", "eps", "gif", "tiff", "bmp", "cut", "empty"],
)
def test_only_whole_png_jpeg_and_webp_are_pictures(client, server, data):
    before = set(server[1].uploads.folder.iterdir())
    assert upload(client, data).status_code == 400
    assert "image" in refused(client, image="data:image/png;base64," + base64.b64encode(data).decode())
    assert set(server[1].uploads.folder.iterdir()) == before


@pytest.mark.parametrize("size", [(60_000, 60_000), (1_000_000, 1), (1, 1_000_000), (5000, 5000)])
def test_a_bomb_is_refused_by_its_head(client, size, monkeypatch):
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self.size))
    answer = upload(client, bomb(*size))
    assert answer.status_code == 400
    assert decoded == []


def test_an_animation_is_refused(client):
    data, frames = io.BytesIO(), [Image.new("RGB", (8, 8), (50 * k, 0, 0)) for k in range(5)]
    frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:])
    assert "animation" in upload(client, data.getvalue()).json()["error"]["message"]


def test_uploads_take_no_more_than_their_room(server):
    uploads = server[1].uploads
    monkey, uploads.kept = uploads.kept, 600
    try:
        names = [uploads.put(png(colour=(k, 0, 0))) for k in range(8)]
        assert sum(path.stat().st_size for path in uploads.folder.iterdir()) <= 600
        assert uploads.place(names[-1]) is not None
    finally:
        uploads.kept = monkey


def test_what_strangers_write_is_never_html(client):
    evil = "<script>alert(1)</script>"
    answer = client.post("/api/jobs", json={**ASK, "sampler": evil})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "script-src" not in answer.headers["content-security-policy"].replace("default-src 'self'", "")
    for path in (f"/{evil}", f"/docs?x={evil}", f"/api/pictures?search={evil}"):
        answer = client.get(path)
        assert "text/html" not in answer.headers["content-type"] or evil not in answer.text


# --- who asks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", ""]
)
def test_another_host_is_refused(client, host):
    answer = client.get("/healthz", headers={"host": host})
    assert answer.status_code == 403


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:7860", "10.0.0.7:80", "FRIEND.local:3"])
def test_its_own_names_and_addresses_are_not(client, host):
    assert client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "https://friend.example.evil.example"]
)
def test_pages_elsewhere_may_not_ask(client, origin):
    for method, path in (("POST", "/api/jobs"), ("GET", "/api/pictures"), ("OPTIONS", "/api/jobs")):
        answer = client.request(method, path, headers={"origin": origin})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert client.post("/api/jobs", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.get("/api/pictures", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_its_own_pages_and_named_ones_may(client):
    own = f"http://{client.base_url.host}:{client.base_url.port}"
    assert client.get("/api/pictures", headers={"origin": own}).status_code == 200
    friend = {"origin": "https://friend.example"}
    answer = client.get("/api/pictures", headers=friend)
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    asking = {**friend, "access-control-request-method": "POST"}
    assert client.options("/api/jobs", headers=asking).status_code == 204
    answer = client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})
    assert answer.status_code == 200  # a link may lead here


def test_a_wrong_key_is_refused_and_compared_in_constant_time(monkeypatch):
    rules, compared, real = Rules(KEY), [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    basic = {
        name: base64.b64encode(name.encode()).decode() for name in (f"me:{KEY}", "me:no", f"{KEY}:", KEY)
    }
    right = [f"Bearer {KEY}", f"bearer {KEY}", f"Basic {basic[f'me:{KEY}']}"]
    wrong = [
        None,
        "",
        "Bearer",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        KEY,
        f"Token {KEY}",
        "Basic !",
        "Basic",
    ]
    wrong += [f"Basic {basic[each]}" for each in ("me:no", f"{KEY}:", KEY)]
    assert all(rules.knows(each) for each in right)
    assert not any(rules.knows(each) for each in wrong)
    assert set(compared) == {(32, 32)}  # digests, whose lengths say nothing
    assert len(compared) == len(right) + len(wrong)
    assert hashlib.sha256().digest_size == 32


def test_with_a_key_only_health_and_signed_addresses_are_open(server, tmp_path):
    secret = os.urandom(32)
    with running(tmp_path, Rules(KEY, secret=secret), [server[1].shelf]) as (client, _):
        assert client.get("/healthz").status_code == 200
        for path in (
            "/",
            "/docs",
            "/metrics",
            "/api/jobs",
            "/openapi.json",
            "/api/pictures/a.png",
            "/nothing",
        ):
            answer = client.get(path)
            assert answer.status_code == 401
            assert "Bearer" in answer.headers["www-authenticate"]
        assert client.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        path = signed(secret, "/api/pictures/a.png")
        assert client.get(path).status_code == 404  # it may look, and there is none
        for changed in (
            path[:-1] + "g",
            path.replace("a.png", "b.png"),
            signed(secret, "/api/pictures/a.png", -1),
        ):
            assert client.get(changed).status_code == 401
        assert client.delete(path).status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "example.org"])
def test_without_a_key_nobody_else_is_listened_to(host, monkeypatch, capsys):
    monkeypatch.delenv("LDM_API_KEY", raising=False)
    assert main(["serve", "--host", host]) == 2
    assert "give a key (--api-key, or LDM_API_KEY)" in capsys.readouterr().err


# --- bodies ----------------------------------------------------------------------------------------------


def talk(host, port, data, wait=5.0):
    with socket.create_connection((host, port), timeout=wait) as line:
        line.sendall(data)
        return line.recv(4096)


def test_a_body_that_says_it_is_a_gigabyte_is_not_read(client):
    head = f"POST /api/uploads HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**30}\r\n\r\n"
    raw = talk(client.base_url.host, client.base_url.port, head.encode())
    assert b" 413 " in raw.partition(b"\r\n")[0]


def test_a_body_without_a_length_is_read_to_the_limit_only(client, server):
    sent = []

    def endless():
        while True:
            sent.append(2**16)
            yield bytes(2**16)

    with contextlib.suppress(httpx2.TransportError):  # the server hangs up on what goes on
        assert client.post("/api/uploads", content=endless()).status_code == 413
    assert sum(sent) < 64 * 2**20
    assert client.get("/healthz").status_code == 200


def test_a_slow_client_is_hung_up_on(client):
    start = time.perf_counter()
    head = b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    raw = talk(client.base_url.host, client.base_url.port, head)
    assert b" 408 " in raw.partition(b"\r\n")[0]
    assert time.perf_counter() - start < 4


def test_the_log_and_the_refusals_hold_no_prompt(server, caplog):
    caplog.set_level("DEBUG", "ldm.serve")
    ticket = Ticket(Request(prompt="a secret"), "fake", on_over=server[1]._over)
    ticket.end(State.FAILED, "secret is not allowed")
    server[0].get("/api/pictures?search=secret")
    assert ticket.id in caplog.text
    assert "secret" not in caplog.text
    assert as_json(ticket)["request"]["prompt"] == "a secret"
