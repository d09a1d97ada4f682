"""Models by name: a small server speaks the hub's protocol, huggingface_hub does the rest."""

import hashlib
import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_adapters import save_diffusers

import ldm
from ldm.checkpoint import load_tokenizer
from ldm.checkpoint.hub import adapter_file, fetch, needed_files

NAME, COMMIT = "someone/postcard", "0123456789abcdef0123456789abcdef01234567"
PUSHED = COMMIT[::-1]
PICKLES = {
    "model.safetensors": "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.bin",
}
UNET = "unet/diffusion_pytorch_model"


class Hub(BaseHTTPRequestHandler):
    """Says of every repository but NAME what its name says, and serves `server.commits` as NAME."""

    def do_GET(self):
        path = urlsplit(self.path).path
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        refusals = {"someone/gated": (403, "GatedRepo"), "someone/none": (401, "RepoNotFound")}
        if name in refusals:
            return self.answer(refusals[name][0], b"{}", {"X-Error-Code": refusals[name][1]})
        commits = self.server.commits
        if "/revision/" in path and not path.endswith(("/main", "/v1", *commits)):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/") and not path.startswith("/api/models/"):  # huggingface_hub's own affairs
            return self.answer(404, b"{}")
        commit = next((each for each in commits if each in path), self.server.main)
        folder = commits[commit]
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if "/tree/" in path:
            listing = [
                {"type": "file", "path": f, "oid": oid(folder / f), "size": size(folder / f)} for f in files
            ]
            return self.answer(200, json.dumps(listing).encode())
        if path.startswith("/api/models/"):
            info = {"id": NAME, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(info).encode())
        file = path.removeprefix(f"/{NAME}/resolve/{commit}/")
        if self.command == "GET":
            self.server.fetched.append(file)
        content = (folder / file).read_bytes()
        return self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{oid(folder / file)}"'})

    do_HEAD = do_GET

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def oid(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def size(path):
    return path.stat().st_size


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The server, with the tiny pipeline and much that nobody needs."""
    for name in ("flax_model.msgpack", "model.onnx", "model.fp16.safetensors", "pipeline.py", "README.md"):
        (folder / name).write_text("not needed")
    torch.save(load_file(folder / f"{UNET}.safetensors"), folder / f"{UNET}.bin")
    halves = {name: tensor.half() for name, tensor in load_file(folder / f"{UNET}.safetensors").items()}
    save_file(halves, folder / f"{UNET}.fp16.safetensors")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_text("not needed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commits, server.main, server.fetched = {COMMIT: folder}, COMMIT, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    aim_at(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def aim_at(monkeypatch, endpoint, tmp_path):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)


def complaint(*args, **kwargs):
    start = time.perf_counter()
    with pytest.raises(ldm.UserError) as caught:
        ldm.load(*args, **kwargs, device="cpu")
    assert time.perf_counter() - start < 2
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


def latents(pipe):
    return pipe("the red boat", seed=1, num_inference_steps=2, output_type="latent").images


def test_only_what_is_needed_is_fetched_and_once(hub, tiny_folder):
    wanted = latents(ldm.load(tiny_folder, device="cpu", dtype="fp32"))
    pipe = ldm.load(NAME, device="cpu", dtype="fp32")
    assert torch.equal(latents(pipe), wanted)
    assert pipe.name == "postcard"
    expected = {"model_index.json", "scheduler/scheduler_config.json"}
    expected |= {f"unet/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    expected |= {f"vae/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    expected |= {f"text_encoder/{name}" for name in ("config.json", "model.safetensors")}
    tokenizer = {f"tokenizer/{path.name}" for path in (tiny_folder / "tokenizer").iterdir()}
    assert set(hub.fetched) == expected | tokenizer
    hub.fetched.clear()
    ldm.load(NAME, device="cpu")
    assert hub.fetched == []


def test_variant_and_revision(hub):
    pipe = ldm.load(NAME, device="cpu", dtype="fp32", variant="fp16", revision="v1")
    assert pipe.parts.weights.name == "diffusion_pytorch_model.fp16.safetensors"
    assert f"{UNET}.fp16.safetensors" in hub.fetched
    assert f"{UNET}.safetensors" not in hub.fetched


def test_a_push_in_between_mixes_no_commits(hub, tiny_folder, tmp_path, monkeypatch):
    """Between the list of files and their download comes a commit with other weights, in pickles."""
    pushed = shutil.copytree(tiny_folder, tmp_path / "pushed")
    for path in pushed.rglob("*.safetensors"):
        torch.save({name: t * 1.5 for name, t in load_file(path).items()}, path.parent / PICKLES[path.name])
        path.unlink()
    listed = huggingface_hub.HfApi.model_info

    def list_and_push(*args, **kwargs):
        info = listed(*args, **kwargs)
        if hub.main == COMMIT:
            hub.commits[PUSHED], hub.main = pushed, PUSHED
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", list_and_push)
    wanted = latents(ldm.load(tiny_folder, device="cpu", dtype="fp32"))
    assert torch.equal(latents(ldm.load(NAME, device="cpu", dtype="fp32")), wanted)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME).name == COMMIT
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert fetch(NAME).name == PUSHED  # the next time it is the new one
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME).name == PUSHED


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_found_without_network(hub, monkeypatch, revision):
    fetch(NAME, revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME, revision).name == COMMIT
    with pytest.raises(ldm.UserError, match="cannot be reached"):
        fetch(NAME, "v2")


def test_messages_name_the_model_and_not_the_cache(hub, tiny_folder):
    config = hub.commits[COMMIT] / "vae/config.json"
    config.write_text(config.read_text().replace('"latent_channels": 4', '"latent_channels": 5'))
    for message in (complaint(NAME), complaint(tiny_folder, vae=NAME)):
        assert message.startswith(f"{NAME}/vae/")
        assert "snapshots" not in message
    with pytest.warns(UserWarning, match=f"^{NAME}/text_encoder: no variant 'fp16'"):
        complaint(NAME, variant="fp16")


def test_tokens_that_were_added_are_fetched(hub, tmp_path):
    from transformers import CLIPTokenizer

    folder = hub.commits[COMMIT] / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    (folder / "added_tokens.json").write_text(json.dumps({"<cat>": size}))
    wanted = load_tokenizer(folder)
    fetched = load_tokenizer(fetch(NAME) / "tokenizer")
    assert len(fetched) == len(wanted) == size + 1
    assert fetched("a <cat>").input_ids == wanted("a <cat>").input_ids


def test_without_network_after_it_was_fetched(hub, tmp_path, monkeypatch):
    wanted = latents(ldm.load(NAME, device="cpu", dtype="fp32"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(latents(ldm.load(NAME, device="cpu", dtype="fp32")), wanted)
    aim_at(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path)
    assert torch.equal(latents(ldm.load(NAME, device="cpu", dtype="fp32")), wanted)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_part_of_a_model_on_the_hub(hub, tiny_folder):
    ldm.load(tiny_folder, vae=NAME, device="cpu")
    assert {str(Path(file).parent) for file in hub.fetched} == {"vae", "."}


def test_a_repository_that_holds_one_part(hub, tiny_folder, monkeypatch):
    hub.commits[COMMIT] = tiny_folder / "vae"
    ldm.load(tiny_folder, vae=NAME, device="cpu")
    assert sorted(hub.fetched) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert "not a diffusers pipeline" in complaint(NAME)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("someone/none", None, "the hub has none of that name"),
        ("someone/gated", None, "accepted: do so at https://huggingface.co/someone/gated"),
        (NAME, "v9", "no revision 'v9'"),
        ("some--one/postcard", None, "not a name that the hub can have"),
    ],
)
def test_what_the_hub_refuses(hub, name, revision, words):
    message = complaint(name, revision=revision)
    assert message.startswith(f"{name}: no such folder or file here")
    assert words in message


@pytest.mark.parametrize("offline", [True, False])
def test_no_network_says_how_to_get_the_model(tmp_path, monkeypatch, offline):
    aim_at(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    message = complaint(NAME, revision="v1")
    assert "the hub cannot be reached" in message
    assert f"`hf download {NAME} --revision v1`" in message


def test_an_interrupted_download_without_network(hub, monkeypatch):
    fetch(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    next(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("vae/*.safetensors")).unlink()
    assert "vae/diffusion_pytorch_model.safetensors: no such file; is the download" in complaint(NAME)


def test_needed_files_of_a_sharded_variant():
    unet = "diffusion_pytorch_model"
    shards = [f"unet/{unet}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = f"unet/{unet}.safetensors.index.fp16.json"
    plain = [f"unet/{unet}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    files = [
        "model_index.json",
        "unet/config.json",
        *shards,
        index,
        *plain,
        f"unet/{unet}.safetensors.index.json",
    ]
    assert set(needed_files(files, NAME, "fp16")) == {"model_index.json", "unet/config.json", index, *shards}
    with pytest.raises(ldm.UserError, match="no such file"):
        needed_files(files, NAME, "bf16")


def test_a_repository_with_single_files_only():
    with pytest.raises(ldm.UserError, match=r"`hf download someone/postcard a\.safetensors`"):
        needed_files(["a.safetensors", "b.ckpt", "README.md"], NAME)


def test_adapters_by_name(hub, tiny_folder, tmp_path, monkeypatch):
    theirs = StableDiffusionPipeline.from_pretrained(tiny_folder)
    file = save_diffusers(theirs, hub.commits[COMMIT] / "pytorch_lora_weights.safetensors")
    save_file({"<cat>": torch.randn(2, 24)}, hub.commits[COMMIT] / "learned_embeds.safetensors")
    pipe = ldm.load(tiny_folder, device="cpu", dtype="fp32")
    wanted = latents(pipe.with_lora(file, 0.5))
    assert torch.equal(latents(pipe.with_lora(NAME, 0.5)), wanted)
    assert set(hub.fetched) == {"pytorch_lora_weights.safetensors"}
    assert not torch.equal(wanted, latents(pipe))
    by_name = pipe.with_lora(NAME, weight_name="pytorch_lora_weights.safetensors")
    assert (
        by_name.adapted.loras[0].file.layers.keys()
        == pipe.with_lora(file).adapted.loras[0].file.layers.keys()
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(latents(pipe.with_lora(NAME, 0.5)), wanted)
    with pytest.raises(ldm.UserError, match=r"has no x\.safetensors; it has "):
        pipe.with_lora(NAME, weight_name="x.safetensors")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["README.md", "style.safetensors"], "style.safetensors"),
        (["style.safetensors", "style.bin"], "style.safetensors"),
        (["learned_embeds.bin", "token_identifier.txt"], "learned_embeds.bin"),
        (
            ["adapter_model.safetensors", "adapter_config.json", "other.safetensors"],
            "adapter_model.safetensors",
        ),
        (["a.safetensors", "b.safetensors"], "choose one by weight_name="),
        (["README.md"], "no weights"),
    ],
)
def test_which_file_of_a_repository_is_the_adapter(files, found):
    if found in files:
        assert adapter_file(files, NAME) == found
    else:
        with pytest.raises(ldm.UserError, match=found):
            adapter_file(files, NAME)
