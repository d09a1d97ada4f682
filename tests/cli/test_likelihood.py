"""`ldm likelihood`: what it says of pictures, and one line for what is wrong."""

import json

import numpy as np
import pytest
from PIL import Image

import ldm
from ldm import cli
from ldm.diffusion import likelihood as ode
from ldm.evaluate import likelihood
from ldm.evaluate.bound import picture_bounds
from ldm.evaluate.likelihood import content_errors, denoising_bounds, log_likelihoods
from ldm.evaluate.outliers import robust_scores


@pytest.fixture
def model(tiny_folder, tmp_path, monkeypatch):
    """The flags of a tiny model; the ODE goes over a few levels only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(likelihood, "ends", lambda schedule: (0.5, 1.0))
    return ["-m", str(tiny_folder), "--device", "cpu"]


@pytest.fixture(scope="module")
def pipe(tiny_folder):
    return ldm.load(tiny_folder, device="cpu", dtype="fp32")


def save(path, seed=0, size=None, caption=None):
    size = size or (16, 16)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def run(*argv):
    return cli.main(["likelihood", *map(str, argv)])


def test_a_picture_under_a_prompt_and_without(model, pipe, tmp_path, capsys):
    path = save(tmp_path / "one.png")
    assert run(path, "-p", "the red boat", "--rtol", "0.1", "-s", "7", "--json", "out.json", *model) == 0
    image = Image.open(path)
    own, none = log_likelihoods(pipe, image, ["the red boat", ""], seed=7, rtol=0.1)
    gain, error = own.gain_over(none)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{path}: log p of its latents"
    assert out[1].strip() == (
        f'{own.nats:.1f} nats +- {own.std_error:.1f}, {own.bits_per_dim:.4f} bits/dim, "the red boat"'
    )
    assert out[2].endswith("bits/dim, no prompt")
    assert out[3] == f"the prompt is worth {gain:.1f} nats +- {error:.1f}"
    written = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [each["nats"] for each in written["figures"]] == pytest.approx([own.nats, none.nats])
    assert written["gain"]["nats"] == pytest.approx(gain)


def test_which_prompt_fits(model, pipe, tmp_path, capsys):
    path = save(tmp_path / "one.png", size=(40, 24))
    flags = ["--by", "error", "--levels", "3", "--probes", "1", "--json", "out.json"]
    texts = ["the red boat", "the sea", "a cat"]
    assert run(path, *(word for text in texts for word in ("--among", text)), *flags, *model) == 0
    found = denoising_bounds(pipe, Image.open(path), texts, levels=3, noises=1)
    nats = np.array([each.nats for each in found])
    chances = np.exp(nats - nats.max()) / np.exp(nats - nats.max()).sum()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "1 of 1 fitted to the model's 16 x 16: resized, its middle taken"
    assert out[2].endswith(texts[int(nats.argmax())])
    written = json.loads((tmp_path / "out.json").read_text("utf-8"))["figures"]
    assert [each["probability"] for each in written] == pytest.approx(chances.tolist())
    assert [each["std_error"] for each in written] == [None] * 3  # of one estimate: not known


def test_a_folder_with_a_stranger_in_it(model, pipe, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(4):
        values = 120 + 3 * np.random.default_rng(i).integers(0, 3, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("the red boat", encoding="utf-8")
    save(folder / "noise.png")
    (folder / "page.png").write_text("no picture", encoding="utf-8")
    flags = ["--by", "error", "--levels", "2", "--json", "out.json"]
    assert run(folder, *flags, *model, "-q") == 0
    written = json.loads((tmp_path / "out.json").read_text("utf-8"))["pictures"]
    names = [each["path"] for each in written]
    assert len(names) == 5
    scores = [each["score"] for each in written]
    assert [abs(score) for score in scores] == sorted((abs(score) for score in scores), reverse=True)
    by_name = {each["path"]: each for each in written}
    errors = []
    for name in sorted(names):
        prompts = [each["prompt"] for each in by_name[name]["figures"]]
        assert prompts == ([""] if name.endswith("noise.png") else ["the red boat", ""])
        errors += content_errors(pipe, Image.open(name), prompts[:1])
        found = denoising_bounds(pipe, Image.open(name), prompts, levels=2)
        told = [each["nats"] for each in by_name[name]["figures"]]
        assert told == pytest.approx([each.nats for each in found], rel=1e-4)
    wanted = robust_scores(errors)
    assert [by_name[name]["score"] for name in sorted(names)] == pytest.approx(wanted.tolist(), rel=1e-3)
    assert run(folder, *flags, *model) == 0
    out = capsys.readouterr().out
    assert f"1 left out: ldm folder {folder} says why" in out
    assert out.splitlines()[3].split()[-1] == names[0].rpartition("/")[2] or "<- stands apart" in out


def test_the_bound_term_by_term(model, pipe, tmp_path, capsys):
    path = save(tmp_path / "one.png")
    assert run(path, "--bound", "4", "-p", "the sea", "--json", "out.json", *model) == 0
    found = picture_bounds(pipe, [Image.open(path)], ["the sea"], steps=4)
    out = capsys.readouterr().out
    for name, (latents, pixels) in found.terms().items():
        assert f"{name:>17} {latents:9.4f} {pixels:9.4f}\n" in out
    assert f"-log P of the pixels: at most {float(found.pictures):.4f}" in out
    assert f"{found.pixel_std:.4g} of 255 of pixels" in out
    written = json.loads((tmp_path / "out.json").read_text("utf-8"))["bound"]
    curve = [each["bits_per_latent_dim"] for each in written["curve"]]
    assert [each["timestep"] for each in written["curve"]] == pytest.approx([999, 666, 333])
    assert sum(curve) == pytest.approx(found.terms()["steps"][0], rel=1e-5)
    assert written["latents"] == pytest.approx(float(found.latents), rel=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.png"], "cannot read the picture none.png: No such file"),
        (["page.png"], "cannot read the picture page.png: it is not a picture"),
        (["deep.tiff"], "cannot read the picture deep.tiff: it has 32 bits a channel"),
        (["empty"], "empty: no picture to train on in empty"),
        (["one.png", "--among", "a cat"], "--among takes one picture and two prompts or more"),
        (["empty", "--among", "a", "--among", "b"], "--among takes one picture and two prompts or more"),
        (["one.png", "--bound", "5", "--by", "error"], "--bound has no use for --by error"),
        (["one.png", "--bound", "1"], "a bound of 1 steps is not allowed: give at least 2"),
        (["one.png", "--bound", "2000"], "it must be a whole number from 1 to 1000"),
        (["one.png", "--json", "empty"], "--json empty is a folder: name a file"),
        (["one.png", "-s", "-1"], "seed -1 is out of range"),
    ],
)
def test_mistakes_are_told(argv, message, model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "one.png")
    (tmp_path / "page.png").write_text("<html>", encoding="utf-8")
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / "deep.tiff")
    assert run(*argv, *model) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("value", ["0", "nan", "1", "much"])
def test_a_tolerance_is_a_small_number(value, model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("one.png", "--rtol", value, *model)
    assert f"{value} is not a number from 1e-10 to 0.1" in capsys.readouterr().err


def test_a_tolerance_that_is_missed(model, tmp_path, capsys, monkeypatch):
    """How far it came is said; without a traceback."""
    monkeypatch.setattr(ode, "MAX_EVALUATIONS", 20)
    path = save(tmp_path / "one.png")
    assert run(path, "--rtol", "1e-9", "--probes", "1", *model) == 2
    error = capsys.readouterr().err
    assert "the likelihood's solver stopped at noise level 0.5" in error
    assert "of 1 after 20 evaluations: give a larger tolerance than 1e-09" in error


def test_the_exact_trace_is_for_small_latents(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ode, "MAX_EXACT", 100)
    assert run(save(tmp_path / "one.png"), "--trace", "exact", *model) == 2
    assert "the exact trace of 256 dimensions needs as many gradients a step" in capsys.readouterr().err


def test_damaged_weights_give_no_figure(folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_norm_out.weight"] = tensors["conv_norm_out.weight"] * 1e10
    tensors["conv_out.weight"] = tensors["conv_out.weight"] * 1e36
    save_file(tensors, weights)
    path = save(tmp_path / "one.png")
    flags = ["--by", "error", "--json", tmp_path / "out.json", "-m", folder, "--device", "cpu"]
    assert run(path, *flags) == 1
    assert "the U-Net gives NaN or Inf, in float32 too" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
