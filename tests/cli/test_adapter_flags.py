"""--lora, --lora-dir, --embedding and tags, from the command line to a PNG and back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_adapters import save_diffusers
from tiny_families import NARROW, make_family

from ldm import cli
from ldm.images.png import read_request


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("flags")
    peer = make_family("sd1", root / "model")
    (root / "loras").mkdir()
    save_diffusers(peer, root / "loras" / "style.safetensors")
    save_file({"<cat>": torch.randn(2, NARROW)}, root / "cat.safetensors")
    return root


@pytest.fixture(autouse=True)
def _in_place(root, loaded_once, monkeypatch):
    monkeypatch.chdir(root)


MODEL = ("-m", "model", "--device", "cpu", "--dtype", "fp32")


def txt2img(prompt, output, *flags):
    return cli.txt2img(["-p", prompt, *MODEL, "--steps", "2", "-o", output, *flags])


def pixels(name):
    return np.asarray(Image.open(name))


def test_lora_by_flag_and_by_tag(capsys):
    assert txt2img("a boat", "plain.png") == 0
    capsys.readouterr()
    assert txt2img("a boat", "flag.png", "--lora", "loras/style.safetensors:0.5:0.8") == 0
    told = capsys.readouterr().out
    assert "style: LoRA, matched U-Net" in told
    assert "(weight 0.8)" in told
    assert txt2img("a boat <lora:style:0.5:0.8>", "tag.png") == 0
    assert "style: LoRA, matched U-Net" in capsys.readouterr().out
    assert (pixels("flag.png") == pixels("tag.png")).all()
    assert (pixels("flag.png") != pixels("plain.png")).any()
    assert read_request("tag.png").prompt == "a boat"
    assert read_request("tag.png").loras == read_request("flag.png").loras


def test_redraw(capsys, tmp_path):
    assert txt2img("a boat <lora:style:0.8>", "a.png") == 0
    assert cli.main(["redraw", "a.png", *MODEL]) == 0
    # The file is found by name in --lora-dir, or given; its weight is the picture's.
    (tmp_path / "style.safetensors").write_bytes(Path("loras/style.safetensors").read_bytes())
    assert cli.main(["redraw", "a.png", *MODEL, "--lora-dir", str(tmp_path)]) == 0
    assert cli.main(["redraw", "a.png", *MODEL, "--lora", str(tmp_path / "style.safetensors")]) == 0
    capsys.readouterr()
    tensors = load_file(tmp_path / "style.safetensors")
    next(iter(tensors.values())).mul_(2)
    save_file(tensors, tmp_path / "style.safetensors")
    assert cli.main(["redraw", "a.png", *MODEL, "--lora-dir", str(tmp_path)]) == 2
    assert "is not the file that this picture was drawn with" in capsys.readouterr().err
    assert cli.main(["redraw", "a.png", *MODEL, "--lora-dir", str(tmp_path / "none")]) == 2
    assert "no LoRA style in" in capsys.readouterr().err


def test_embedding(capsys):
    assert txt2img("a <cat>", "cat.png", "--embedding", "cat.safetensors") == 0
    assert "cat.safetensors: 2 vectors, written <cat> in prompts" in capsys.readouterr().out
    assert txt2img("a <dog>", "dog.png", "--embedding", "<dog>=cat.safetensors") == 0
    assert (pixels("cat.png") == pixels("dog.png")).all()
    assert cli.main(["redraw", "cat.png", *MODEL, "--embedding", "cat.safetensors"]) == 0
    capsys.readouterr()
    assert cli.main(["redraw", "cat.png", *MODEL]) == 2
    assert "give it by --embedding <cat>=FILE" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["clip_l", "clip_g", "clip_h", "emb_params", "string_to_param.*", "*"])
def test_a_key_that_is_no_word_gives_way_to_the_files_name(capsys, tmp_path, key):
    save_file({key: torch.randn(2, NARROW)}, tmp_path / "mycat.safetensors")
    assert txt2img("a mycat", "cat.png", "--embedding", str(tmp_path / "mycat.safetensors")) == 0
    assert "mycat.safetensors: 2 vectors, written mycat in prompts" in capsys.readouterr().out


def test_suffixes_of_any_case(capsys, tmp_path):
    style = load_file("loras/style.safetensors")
    save_file(style, tmp_path / "plain.safetensors")
    assert txt2img("a boat", "plain.png", "--lora", str(tmp_path / "plain.safetensors")) == 0
    for name, save in (("A.SAFETENSORS", save_file), ("B.Pt", torch.save), ("C.PTH", torch.save)):
        save(style, tmp_path / name)
        assert txt2img("a boat", "flag.png", "--lora", str(tmp_path / name)) == 0
        assert (pixels("flag.png") == pixels("plain.png")).all()
        tag = f"a boat <lora:{name[0]}:1>"
        assert txt2img(tag, "tag.png", "--lora-dir", str(tmp_path)) == 0
        assert (pixels("tag.png") == pixels("plain.png")).all()
    for name, save in (("CAT.SAFETENSORS", save_file), ("CAT.PT", torch.save)):
        save({"<cat>": torch.ones(1, NARROW)}, tmp_path / name)
        assert txt2img("a <cat>", "cat.png", "--embedding", str(tmp_path / name)) == 0
    assert "CAT.PT: 1 vector, written <cat> in prompts" in capsys.readouterr().out


def test_a_word_within_a_lora(capsys, tmp_path):
    word = {"bundle_emb.mycat.string_to_param.*": torch.randn(2, NARROW)}
    save_file(load_file("loras/style.safetensors") | word, tmp_path / "both.safetensors")
    assert txt2img("a mycat", "flag.png", "--lora", str(tmp_path / "both.safetensors:0.8")) == 0
    assert "; for what it learnt, write mycat in the prompt" in capsys.readouterr().out
    assert txt2img("a mycat <lyco:both:0.8>", "tag.png", "--lora-dir", str(tmp_path)) == 0
    assert (pixels("flag.png") == pixels("tag.png")).all()
    assert cli.main(["redraw", "tag.png", *MODEL, "--lora-dir", str(tmp_path)]) == 0


@pytest.mark.parametrize("tag", ["<lora:style:0.8", "<lora style:0.8>", "<hypernet:style:1>"])
def test_a_tag_that_is_not_whole(capsys, tag):
    assert txt2img(f"a boat {tag}", "broken.png") == 2
    assert f"{tag} in the prompt is " in capsys.readouterr().err
    assert not Path("broken.png").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora", "none.safetensors:0.8"], "none.safetensors: no such file"),
        (["--lora", "cat.safetensors"], "no LoRA, LoHa, LoKr or DoRA tensors"),
        (["--embedding", "loras/style.safetensors"], "not a textual inversion"),
    ],
)
def test_faults(capsys, flags, says):
    assert txt2img("a boat", "x.png", *flags) == 2
    assert says in capsys.readouterr().err


def test_a_missing_tag_is_told_and_its_line_fails_alone(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a boat\na <lora:absent:1>\n")
    argv = ["--from-file", str(tmp_path / "prompts.txt"), *MODEL, "--outdir", str(tmp_path / "out")]
    assert cli.txt2img(argv) == 2
    assert "prompts.txt, line 2: no LoRA absent in loras" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["00000.png"]
    assert cli.txt2img(["-p", "a <lora:absent:1>", *MODEL, "--outdir", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()
