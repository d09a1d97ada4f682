"""Files are read strictly, written whole, and mapped without being changed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.checkpoint.io import DTYPES, Later, fill, read_json, read_tensors, write_tensors
from ldm.errors import UserError
from ldm.files import whole_folder


def test_tensors_come_back_as_they_were_written(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).t(),  # not contiguous
        "b": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "c": torch.arange(5),
        "d": torch.randn(7).bfloat16(),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    back = read_tensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert all(back[name].dtype == tensors[name].dtype for name in tensors)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_files_are_those_that_safetensors_writes(tmp_path):
    """Order, offsets and numbers; and tensors that are made when they are written."""
    tensors = {
        "half": torch.randn(3, dtype=torch.float16),
        "brain": torch.randn(5, 3).bfloat16(),
        "byte": torch.arange(7, dtype=torch.uint8),
        "double": torch.randn(2, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "float": torch.randn(4, 2),
        "long": torch.arange(3),
        "mark": torch.tensor([]),
        "number": torch.tensor(0.5),
        "tiny": torch.randn(9).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt", "title": "Schloß"})
    made = []

    def later(name):
        like = torch.empty_like(tensors[name], device="meta")
        return Later(like, lambda: made.append(name) or tensors[name])

    for name, given in (("ours", tensors), ("late", {name: later(name) for name in tensors})):
        write_tensors(tmp_path / f"{name}.safetensors", given, metadata={"title": "Schloß"})
        ours, theirs = (tmp_path / f"{each}.safetensors" for each in (name, "theirs"))
        with safe_open(ours, framework="pt") as a, safe_open(theirs, framework="pt") as b:
            assert a.metadata() == b.metadata()
            assert {*a.keys()} == {*b.keys()}
        back = load_file(ours)
        assert all(back[each].dtype == tensor.dtype for each, tensor in tensors.items())
        same = (torch.equal(back[each].float(), tensor.float()) for each, tensor in tensors.items())
        assert all(same)
    assert sorted(made) == sorted(tensors)
    for entry in json.loads(_header(tmp_path / "ours.safetensors")).values():
        if "dtype" in entry:
            width = DTYPES[entry["dtype"]].itemsize
            assert entry["data_offsets"][0] % width == 0
    assert (8 + len(_header(tmp_path / "ours.safetensors"))) % 8 == 0


def _header(path):
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def test_only_floats_are_cast(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2), "n": torch.arange(2)}, torch.float16)
    back = load_file(tmp_path / "x.safetensors")
    assert (back["a"].dtype, back["n"].dtype) == (torch.float16, torch.int64)


def test_training_a_mapped_module_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, torch.nn.Linear(64, 64).state_dict())
    before = path.read_bytes()
    with torch.device("meta"):
        layer = torch.nn.Linear(64, 64)
    fill(layer, read_tensors(path), path)
    assert layer.weight.requires_grad
    with torch.no_grad():
        layer.weight.add_(1)
    assert path.read_bytes() == before
    assert not torch.equal(layer.weight, read_tensors(path)["weight"])


def test_a_module_is_filled_or_left_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(4), "scale": torch.ones(1)}, path)
    with torch.device("meta"):
        layer = torch.nn.Linear(2, 3)
    with pytest.raises(UserError) as caught:
        fill(layer, read_tensors(path), path)
    for word in (str(path), "not of this model: scale", "bias is [4], config.json says [3]"):
        assert word in str(caught.value)
    assert layer.weight.is_meta


def test_many_faults_still_make_two_lines(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({str(i): torch.ones(1) for i in range(50)}, path)
    with pytest.raises(UserError, match="0, 1 and 48 more") as caught:
        fill(torch.nn.Linear(2, 3), read_tensors(path), path)
    assert len(str(caught.value).splitlines()) == 2


def test_json_in_another_encoding(tmp_path):
    (tmp_path / "x.json").write_bytes(json.dumps({"a": "ü"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("before", [None, "old"])
def test_a_folder_is_replaced_whole(tmp_path, before):
    folder = tmp_path / "deep" / "model"
    if before:
        folder.mkdir(parents=True)
        (folder / "kept").write_text(before)
    with whole_folder(folder) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "new").write_text("new")
        assert folder.exists() == bool(before)
    assert [path.name for path in folder.rglob("*")] == ["sub", "new"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failure_while_writing_changes_nothing(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "kept").write_text("old")

    def write(error):
        with whole_folder(folder) as aside:
            (aside / "half").write_text("new")
            raise error

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    with pytest.raises(UserError, match=r"cannot write to .*model: No space left"):
        write(OSError(28, "No space left on device"))
    assert (folder / "kept").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder, rename = tmp_path / "model", Path.rename
    folder.mkdir()
    (folder / "kept").write_text("old")

    def fail(path, target):
        if target == folder and not path.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="Input/output error"), whole_folder(folder) as aside:
        (aside / "new").write_text("new")
    assert (folder / "kept").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), whole_folder(tmp_path / "file" / "model"):
        pass
