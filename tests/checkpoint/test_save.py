"""Models on disk and in diffusers: all of a family's entries, shards, and memory shared."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_families import FAMILIES

import ldm
from ldm.checkpoint import load_folder, save_model
from ldm.checkpoint.original.single import read_single
from ldm.errors import UserError
from ldm.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")
FIELDS = (
    "scheduler", "low_res_scheduler", "defaults", "words", "world", "force_zeros_for_empty_prompt",
    "requires_aesthetics_score", "max_noise_level",
)  # fmt: skip


def tensors_of(parts):
    modules = {part: getattr(parts, part, None) for part in MODULES}
    return {
        f"{part}.{name.removeprefix('text_model.')}": tensor  # as transformers has them from 5.6 on
        for part, module in modules.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }


def assert_same(ours, theirs):
    ours, theirs = tensors_of(ours), tensors_of(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_index_is_that_of_diffusers(families, tmp_path, name):
    folder, _ = families(name)
    save_model(tmp_path / "saved", load_folder(folder, RUNTIME))
    ours, theirs = (
        json.loads((each / "model_index.json").read_text()) for each in (tmp_path / "saved", folder)
    )
    del ours["_diffusers_version"], theirs["_diffusers_version"]
    assert ours == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_folder_to_file_to_folder_loses_nothing_and_guesses_nothing(families, tmp_path, name):
    parts = load_folder(families(name)[0], RUNTIME)
    save_model(tmp_path / "model.safetensors", parts)
    lines = []
    read, unused = read_single(tmp_path / "model.safetensors", log=lines.append)
    assert lines == []
    assert unused == []
    assert_same(read, parts)
    for field in FIELDS:
        assert getattr(read, field) == getattr(parts, field), field
    for part in ("unet", "vae"):
        assert getattr(read, part).config == getattr(parts, part).config
    for part in ("tokenizer", "tokenizer_2"):
        if getattr(parts, part) is not None:
            text = "the red boat, at sea"
            ids = [getattr(each, part)(text, padding="max_length").input_ids for each in (parts, read)]
            assert ids[0] == ids[1]


def test_xl_files_of_v_models_have_the_marks_that_others_look_for(families, tmp_path):
    save_model(tmp_path / "model.safetensors", load_folder(families("xl_v")[0], RUNTIME))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {"v_pred", "ztsnr"} <= {*file.keys()}
        assert file.metadata()["modelspec.prediction_type"] == "v"
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_shards_are_as_small_as_asked_and_open_in_diffusers(families, tmp_path, name):
    folder, pipe = families(name)
    parts = load_folder(folder, RUNTIME)
    save_model(tmp_path / "saved", parts, max_shard_size="100KB")
    shards = sorted((tmp_path / "saved" / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 120_000 for shard in shards)
    assert_same(load_folder(tmp_path / "saved", RUNTIME), parts)
    assert_same(type(pipe).from_pretrained(tmp_path / "saved", local_files_only=True), parts)


def test_dtype_of_what_is_written(families, tmp_path):
    parts = load_folder(families("sd1")[0], RUNTIME)
    for target in (tmp_path / "model.safetensors", tmp_path / "saved"):
        save_model(target, parts, torch.float16)
    read, _ = read_single(tmp_path / "model.safetensors")
    for other in (read, load_folder(tmp_path / "saved", None)):
        for name, tensor in tensors_of(other).items():
            assert tensor.dtype is torch.float16
            assert torch.equal(tensor, tensors_of(parts)[name].half())


def test_faults_of_saving_leave_nothing_behind(families, tmp_path):
    parts = load_folder(families("sd1")[0], RUNTIME)
    for path, options, said in (
        (tmp_path / "model.ckpt", {}, "pickles are not written"),
        (tmp_path / "model.safetensors", {"max_shard_size": "1MB"}, "no shards"),
        (tmp_path / "saved", {"max_shard_size": "much"}, "'much' is not a size"),
    ):
        with pytest.raises(UserError, match=said):
            save_model(path, parts, **options)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        save_model(tmp_path / "file" / "model.safetensors", parts)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_not_finished_replaces_nothing(families, tmp_path, monkeypatch):
    parts = load_folder(families("sd1")[0], RUNTIME)
    (tmp_path / "model.safetensors").write_text("the old one")
    monkeypatch.setattr(
        "ldm.checkpoint.save.write_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(UserError, match=r"cannot write to .*: full"):
        save_model(tmp_path / "model.safetensors", parts)
    assert (tmp_path / "model.safetensors").read_text() == "the old one"
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_takes_over_the_very_memory(families, name):
    folder, pipe = families(name)
    ours = ldm.load(folder, device="cpu", dtype="fp32")
    theirs = ours.to_diffusers()
    assert type(theirs) is type(pipe)
    shared, tensors = tensors_of(theirs), tensors_of(ours.parts)
    assert shared.keys() == tensors.keys()
    assert all(shared[each].data_ptr() == tensors[each].data_ptr() for each in tensors)
    for key, value in pipe.config.items():
        if not key.startswith("_"):
            assert theirs.config[key] == value, key


def test_a_pipeline_saves_itself_as_either(families, tmp_path):
    pipe = ldm.load(families("sd1")[0], device="cpu", dtype="fp32")
    pipe.save(tmp_path / "model.safetensors")
    pipe.save(tmp_path / "saved", max_shard_size="100KB")
    for target in ("model.safetensors", "saved"):
        assert_same(ldm.load(tmp_path / target, device="cpu", dtype="fp32").parts, pipe.parts)
