"""Every family's folder, and parts of one model in the place of another's."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, make_family
from tiny_pipeline import write_tokenizer

import ldm
from ldm.checkpoint import load_parts, load_tokenizer, save_model, save_module
from ldm.checkpoint.folder import load_folder
from ldm.runtime import choose

CPU = choose("cpu", "fp32")
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


def equal(module, reference):
    """Every tensor of diffusers' or transformers' module, by its name there."""
    ours = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in reference.state_dict().items()}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loads(tmp_path, name):
    theirs = make_family(name, tmp_path / "model")
    parts = load_folder(tmp_path / "model", CPU)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, reference = getattr(parts, part), getattr(theirs, part, None)
        assert (ours is None) == (reference is None)
        assert ours is None or equal(ours, reference)
    for part in ("tokenizer", "tokenizer_2"):
        ours, reference = getattr(parts, part), getattr(theirs, part, None)
        assert (ours is None) == (reference is None)
        for text in ("the red boat", ""):
            options = {"padding": "max_length", "truncation": True}
            assert ours is None or ours(text, **options).input_ids == reference(text, **options).input_ids
    config = theirs.config
    assert parts.force_zeros_for_empty_prompt == config.get("force_zeros_for_empty_prompt", False)
    assert parts.requires_aesthetics_score == config.get("requires_aesthetics_score", False)
    assert parts.max_noise_level == config.get("max_noise_level", 350)
    assert (parts.low_res_scheduler is None) == (name != "upscaler")
    assert dict(parts.scheduler) == json.loads(
        (tmp_path / "model/scheduler/scheduler_config.json").read_text()
    )


@pytest.mark.parametrize(("silent", "wanted"), [("sdxl", True), ("sd1", False)])
def test_zeros_for_empty_prompts_where_the_index_is_silent(tmp_path, silent, wanted):
    make_family(silent, tmp_path / "model")
    path = tmp_path / "model/model_index.json"
    index = json.loads(path.read_text())
    index.pop("force_zeros_for_empty_prompt", None)
    path.write_text(json.dumps(index))
    assert load_folder(tmp_path / "model", CPU).force_zeros_for_empty_prompt is wanted


def test_a_text_encoder_whose_config_does_not_name_its_class(tmp_path):
    theirs = make_family("sdxl", tmp_path / "model")
    for part in ("text_encoder", "text_encoder_2"):
        path = tmp_path / "model" / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": None}))
    parts = load_folder(tmp_path / "model", CPU)
    assert equal(parts.text_encoder, theirs.text_encoder)
    assert equal(parts.text_encoder_2, theirs.text_encoder_2)


def test_the_pad_token_of_an_old_folder(tmp_path):
    """SDXL's own tokenizer_2 is stored as vocab.json, merges.txt and special_tokens_map.json."""
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token == "!"
    assert tokenizer("", padding="max_length").input_ids[-1] == tokenizer.get_vocab()["!"]


# --- overrides -------------------------------------------------------------------------------------------


@pytest.fixture
def other(tiny_folder, tmp_path):
    """A pipeline folder whose every weight is another."""
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    for path in folder.rglob("*.safetensors"):
        save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)
    return folder


def place_of(kind, other, part, tmp_path):
    """Where the part of `other` is, in one of the ways to say it."""
    if kind == "pipeline":
        return other
    if kind == "folder":
        return str(other / part)
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    return shutil.copy(other / part / f"{stem}.safetensors", tmp_path / "loose.safetensors")


@pytest.mark.parametrize("kind", ["pipeline", "folder", "file"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_from_elsewhere(tiny_folder, other, tmp_path, kind, part):
    place = place_of(kind, other, part, tmp_path)
    parts = load_parts(tiny_folder, CPU, **{part: place})
    own, foreign = load_folder(tiny_folder, CPU), load_folder(other, CPU)
    for each in ("unet", "vae", "text_encoder"):
        assert equal(getattr(parts, each), getattr(foreign if each == part else own, each))
    if part == "unet":
        assert parts.weights.resolve() == (place if kind == "file" else other / UNET).resolve()


def test_the_second_text_encoder_from_elsewhere(tmp_path):
    make_family("sdxl", tmp_path / "model")
    make_family("sdxl", tmp_path / "other")
    path = tmp_path / "other/text_encoder_2/model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)
    parts = load_parts(tmp_path / "model", CPU, text_encoder_2=tmp_path / "other")
    assert equal(parts.text_encoder_2, load_folder(tmp_path / "other", CPU).text_encoder_2)


def test_the_command_line_takes_parts_from_elsewhere(tiny_folder, other, tmp_path):
    from ldm.cli import txt2img

    def draw(name, *flags):
        command = ["-p", "the red boat", "--steps", "2", "--device", "cpu", "--dtype", "fp32", "--quiet"]
        assert txt2img([*command, "-m", str(tiny_folder), "-o", str(tmp_path / name), *flags]) == 0
        return (tmp_path / name).read_bytes()

    vae = ["--vae", str(other / "vae")]
    assert draw("a.png", *vae, "--text-encoder", str(other)) != draw("b.png", *vae)
    assert draw("b.png", *vae) != draw("c.png")


def complaint(*args, **kwargs):
    with pytest.raises(ldm.UserError) as caught:
        load_parts(*args, CPU, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


def test_a_part_that_does_not_fit_names_both(tiny_folder, tmp_path):
    make_family("sd2", tmp_path / "sd2")
    message = complaint(tiny_folder, unet=tmp_path / "sd2")
    assert f"{tmp_path / 'sd2/unet'}: the U-Net takes text of width 40" in message
    assert str(tiny_folder / "text_encoder") in message
    message = complaint(tiny_folder, text_encoder=tmp_path / "sd2/text_encoder")
    assert str(tmp_path / "sd2/text_encoder") in message
    assert str(tiny_folder / "unet") in message


def test_a_vae_with_other_latents(tiny_folder, tmp_path):
    from diffusers import AutoencoderKL

    config = json.loads((tiny_folder / "vae/config.json").read_text()) | {"latent_channels": 16}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    message = complaint(tiny_folder, vae=tmp_path / "vae")
    assert f"the VAE's 16 ({tmp_path / 'vae'})" in message
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    assert str(file) in complaint(tiny_folder, vae=file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"text_encoder_2": "{tiny}"}, "a pipeline without text_encoder_2"),
        ({"text_encoder_2": "{tiny}/text_encoder"}, "has no text_encoder_2 to replace"),
        ({"unet": "{tiny}/vae"}, "AutoencoderKL, which cannot be the unet"),
        ({"vae": "{tiny}/nothing"}, "no such folder or file"),
        ({"ema": True}, "ema chooses between"),
        ({"revision": "main"}, "only models on the hub have revisions"),
        (
            {"prediction_type": "guess"},
            "prediction_type 'guess' is not allowed: choose one of epsilon, v_pred",
        ),
        ({"vae": "{tiny}/scheduler"}, "/scheduler: no vae in it: neither config.json nor"),
        ({"variant": "fp16"}, "fp16.safetensors: no such file"),
    ],
)
def test_what_cannot_be_asked_of_a_folder(tiny_folder, arguments, words):
    filled = {
        key: value.format(tiny=tiny_folder) if isinstance(value, str) else value
        for key, value in arguments.items()
    }
    assert words in complaint(tiny_folder, **filled)


def test_messages_name_what_was_given(tiny_folder, tmp_path, monkeypatch):
    assert complaint("postcard", text_encoder_2=tiny_folder / "text_encoder").startswith("postcard: has no")
    message = complaint(tiny_folder, vae="postcard")
    assert message.endswith("does not go with the VAE's 16 (postcard/vae)")
    shutil.copytree(tiny_folder, tmp_path / "postcard")  # goes before the one of the package
    monkeypatch.chdir(tmp_path)
    assert complaint("postcard", ema=True).startswith("postcard: ema chooses")
    assert complaint(tmp_path / "postcard", ema=True).startswith(f"{tmp_path / 'postcard'}: ema chooses")


def test_a_scheduler_in_the_header_of_a_single_file(tiny_folder, tmp_path):
    """No file that is called scheduler_config.json has to do with it."""
    path = tmp_path / "model.safetensors"
    save_model(path, load_folder(tiny_folder, CPU))
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["ldm.config"])
    header["scheduler"]["beta_schedule"] = "odd"
    save_file(load_file(path), path, {"ldm.config": json.dumps(header)})
    assert complaint(path).startswith(f"{path}: beta_schedule='odd' is not supported")


def test_another_prediction_type(tiny_folder):
    assert load_parts(tiny_folder, CPU, prediction_type="v_prediction").scheduler["prediction_type"] == (
        "v_prediction"
    )


def test_a_single_file_is_recognised(tiny_folder, tmp_path):
    """What it then is, `test_single` tells; a U-Net by itself is not a model."""
    message = complaint(tiny_folder / UNET)
    assert str(tiny_folder / UNET) in message
    assert "variants are files of a folder" in complaint(tiny_folder / UNET, variant="fp16")
    assert "give a pipeline folder, a single file, a hub name" in complaint("not here.safetensors")


def test_nothing_of_the_model_changes(tiny_folder, tmp_path):
    """A part saved by us comes back as an override."""
    parts = load_folder(tiny_folder, CPU)
    save_module(parts.unet, tmp_path / "unet")
    again = load_parts(tiny_folder, CPU, unet=tmp_path / "unet")
    assert equal(again.unet, parts.unet)
    assert replace(again, unet=None, weights=None).scheduler == parts.scheduler


def test_the_hash_tells_what_was_taken_from_elsewhere(tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder / "vae", tmp_path / "vae")
    tensors = load_file(other / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_out.bias"] += 1
    save_file(tensors, other / "diffusion_pytorch_model.safetensors")
    hashes = [
        ldm.load(tiny_folder, device="cpu", **changes).model_hash
        for changes in ({}, {"vae": other}, {"vae": tiny_folder / "vae"}, {"prediction_type": "v_prediction"})
    ]
    assert len(set(hashes)) == 4
    assert ldm.load(tiny_folder, device="cpu", vae=other).model_hash == hashes[1]


@pytest.mark.parametrize(
    "name", ["LOOSE.SAFETENSORS", "loose.SafeTensors", "LOOSE.CKPT", "loose.PT", "LOOSE.BIN"]
)
def test_suffixes_in_any_case(tiny_folder, other, tmp_path, name):
    path, tensors = tmp_path / name, load_file(other / VAE)
    if name.lower().endswith("safetensors"):
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    parts = load_parts(tiny_folder, CPU, vae=path)
    assert equal(parts.vae, load_folder(other, CPU).vae)


def test_a_whole_model_in_upper_case(tiny_folder, tmp_path):
    """Written as one file, with the configs in its header, and read again."""
    parts, path = load_folder(tiny_folder, CPU), tmp_path / "MODEL.SAFETENSORS"
    save_model(path, parts)
    assert path.is_file()
    again = load_parts(path, CPU, log=lambda line: None)
    assert equal(again.unet, parts.unet)
    assert again.scheduler == parts.scheduler
    with pytest.raises(ldm.UserError, match="pickles are not written"):
        save_model(tmp_path / "MODEL.CKPT", parts)
