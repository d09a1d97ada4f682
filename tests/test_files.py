"""What is written has the modes that the user's umask gives, whichever library wrote it."""

import contextlib
import os
import stat

import pytest
import torch
from PIL import Image

import ldm
from ldm.finetune.report import write_report
from ldm.images.png import save_numbered, save_png
from ldm.train.state import Position, State, save_state

pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")


@contextlib.contextmanager
def umask(mask):
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def write_png(folder, pipe):
    save_png(Image.new("RGB", (8, 8)), folder / "a.png")
    save_numbered(Image.new("RGB", (8, 8)), folder / "many", "%05d.png")


def write_folder(folder, pipe):
    pipe.save(folder / "model")
    pipe.save(folder / "shards", max_shard_size="20KB")


def write_single(folder, pipe):
    pipe.save(folder / "model.safetensors")


def write_state(folder, pipe):
    layer = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    save_state(folder / "run", Position(), State(dict(layer.named_parameters()), {}, optimiser), {}, {})


def write_page(folder, pipe):
    write_report(folder, title="a run", facts={}, prompts=[], outputs=[])


@pytest.mark.parametrize("write", [write_png, write_folder, write_single, write_state, write_page])
@pytest.mark.parametrize("mask", [0o077, 0o002, 0o022])
def test_files_and_folders_have_the_modes_of_the_umask(tiny_folder, tmp_path, write, mask):
    pipe = ldm.load(tiny_folder, device="cpu", dtype="fp32")
    (tmp_path / "made").mkdir()
    with umask(mask):
        write(tmp_path / "made", pipe)
    written = list((tmp_path / "made").rglob("*"))
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in written}
    assert any(path.is_file() for path in written)
    assert modes == {str(path): (0o777 if path.is_dir() else 0o666) & ~mask for path in written}


def test_what_replaces_a_file_has_them_too(tmp_path):
    with umask(0o002):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    with umask(0o077):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o600
