"""`ldm train-control`: begins as the plain U-Net, learns beside it, goes on exactly, opens in diffusers."""

import json

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from tiny_finetune import QUICK, arguments, interrupted, result, write_pictures

from ldm.checkpoint import load_parts
from ldm.cli import main
from ldm.control.reading import read_control
from ldm.dataset.buckets import Sample, apply_crop, make_crop
from ldm.dataset.cache import open_and_crop
from ldm.dataset.controls import files_in, made_by
from ldm.dataset.findings import Example
from ldm.errors import UserError
from ldm.finetune import finetune as module
from ldm.finetune.finetune import finetune
from ldm.finetune.recipe import FinetuneRecipe
from ldm.finetune.task import FinetuneTask
from ldm.images.pixels import to_tensor
from ldm.runtime import Runtime
from ldm.train.recipe import validate

pytest.importorskip("cv2", reason="no OpenCV: pip install 'ldm[control]'", exc_type=ImportError)
CANNY = {"mode": "controlnet", "preprocess": "canny", "num_validation_images": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 8)


@pytest.fixture
def task(families, data, tmp_path, monkeypatch):
    """A factory: the task of a training that has not begun."""

    def make(family, **options):
        tasks = []
        monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task.train()))
        monkeypatch.setattr(module, "_report", lambda *_: None)
        given = {"model": str(families(family)[0]), "train_data_dir": data, "output_dir": tmp_path / "run"}
        finetune(FinetuneRecipe.model_validate(QUICK | given | {"train_batch_size": 3} | CANNY | options))
        return tasks[0]

    return make


def train_control(model, data, output, **options):
    given = {"preprocess": "canny", "num_validation_images": 0} | options
    argv = arguments(model, data, output, **given)
    return main(["train-control", *argv[1:]])


def held_out_losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["held_out_loss"] for row in rows if "held_out_loss" in row]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_begins_as_the_plain_u_net(task, families, family):
    """Bit for bit, whatever the control picture; and as diffusers' U-Net says it."""
    ours = task(family)
    batch = ours.batch(torch.Generator().manual_seed(1), 3, 0)
    batch |= {"t": torch.tensor([5, 500, 990])}
    with torch.no_grad():
        controlled = ours._predict(batch)
        plain = FinetuneTask._residuals(ours, batch, (), {})
        ours._residuals = lambda *_: plain
        assert torch.equal(controlled, ours._predict(batch))
    assert batch["control"].shape[1] == 3
    assert {*batch["control"].unique().tolist()} == {0.0, 1.0}


def test_only_the_controlnet_learns_and_all_of_it(task):
    ours = task("sd1")
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    trained = [p for group in ours.parameter_groups(1e-3) for p in group["params"]]
    optimiser = torch.optim.AdamW(trained, 1e-3)
    rng = torch.Generator().manual_seed(1)
    for number in range(3):  # what is below zeros has gradients from the second step on
        loss, _ = ours(ours.batch(rng, 3, number))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, p in ours.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("controlnet."), name


def test_the_held_out_loss_falls(families, data, tmp_path):
    options = {"max_train_steps": 10, "validation_steps": 10, "held_out": 0.15}
    assert train_control(families("sd1")[0], data, tmp_path / "run", **options, learning_rate=1e-2) == 0
    first, last = held_out_losses(tmp_path / "run")
    assert last < 0.95 * first


def test_stopped_it_goes_on_bit_for_bit(families, data, tmp_path, monkeypatch, capsys):
    model = families("sd1")[0]
    options = {"train_batch_size": 2, "max_train_steps": 3, "caption_dropout": 0.3, "random_flip": True}
    options |= {"checkpointing_steps": 2, "held_out": 0, "ema_decay": 0.9}
    assert train_control(model, data, tmp_path / "whole" / "run", **options) == 0
    forward = FinetuneTask.forward
    for call in (2, 0):
        monkeypatch.setattr(FinetuneTask, "forward", interrupted(forward, call))
        assert train_control(model, data, tmp_path / "parts" / "run", **options) == 0
    assert result(tmp_path / "parts" / "run") == result(tmp_path / "whole" / "run")
    options["max_train_steps"] = 4
    assert train_control(model, data, tmp_path / "parts" / "run", **options, preprocess_options="low=90") == 2
    assert "controls canny -> canny:low=90.0" in capsys.readouterr().err


def test_what_comes_out_opens_in_diffusers(families, data, tmp_path):
    """And adds to diffusers' U-Net what ours adds to ours."""
    folder = families("sd1")[0]
    assert train_control(folder, data, tmp_path / "run", learning_rate=1e-2) == 0
    theirs, info = ControlNetModel.from_pretrained(tmp_path / "run" / "export", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    rng = torch.Generator().manual_seed(0)
    latents, tokens = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 16, 24, generator=rng)
    side = 8 * 2 ** (len(theirs.config.conditioning_embedding_out_channels) - 1)
    picture = torch.rand(2, 3, side, side, generator=rng)
    ours = load_parts(folder, None).unet
    own = read_control(
        tmp_path / "run" / "export", "", ours, Runtime(torch.device("cpu"), torch.float32)
    ).network
    with torch.no_grad():
        down, middle = theirs(latents, 7, tokens, picture, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        expected = unet(latents, 7, tokens, **added).sample
        found = ours(latents, 7, tokens, residuals=own(latents, 7, tokens, picture))
        assert not torch.allclose(expected, unet(latents, 7, tokens).sample, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- control pictures ------------------------------------------------------------------------------------


def example(path, size):
    return Example(path, "red boat", size, "0" * 64)


def shown(path, size, flipped, at=(0.3, 0.8)):
    """A picture's sample, cropped and mirrored, and what of it is shown."""
    each = Sample(example(path, size), make_crop(size, (64, 48), at, flipped), "red boat")
    return each, open_and_crop(each.example, each.crop)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_control_picture_is_of_what_is_shown(tmp_path, flipped):
    """Made on the fly, and from a folder: the same crop, mirrored alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC)
    for name, picture in (("a/1.png", image), ("b/1_invert.png", Image.eval(image, lambda x: 255 - x))):
        (tmp_path / name).parent.mkdir()
        picture.save(tmp_path / name)
    path = tmp_path / "a" / "1.png"
    sample, seen = shown(path, (90, 120), flipped)
    made = made_by("invert", ()).of(sample.example, sample.crop, seen)
    torch.testing.assert_close(made, 0.5 - seen / 2, rtol=0, atol=1e-6)
    paired = files_in(tmp_path / "b", [sample.example], tmp_path / "a")
    told = paired.of(sample.example, sample.crop, seen)
    torch.testing.assert_close(told, made, rtol=0, atol=1.5 / 255)


def test_control_pictures_of_a_folder(families, tmp_path, capsys):
    data = write_pictures(tmp_path / "data", 3)
    assert main(["preprocess", "canny", str(data), "-o", str(tmp_path / "edges"), "-q"]) == 0
    pairs = {"preprocess": None, "control_data_dir": tmp_path / "edges", "num_validation_images": 2}
    pairs |= {"validation_prompts": "red boat, sea, number 0"}
    assert train_control(families("sd1")[0], data, tmp_path / "run", **pairs) == 0
    grid = Image.open(tmp_path / "run" / "grids" / "00000002.png")
    edges = apply_crop(Image.open(tmp_path / "edges" / "0_canny.png"), make_crop((64, 64), (64, 64)))
    left = to_tensor(grid.crop((2, 2, 66, 66)))[0]
    assert (left - (edges / 2 + 0.5)).abs().max() < 0.01, "the control picture, then what is drawn"
    assert grid.width == 3 * 66 + 2
    Image.new("RGB", (20, 90)).save(tmp_path / "edges" / "1_canny.png")
    assert train_control(families("sd1")[0], data, tmp_path / "other", **pairs) == 2
    assert "1_canny.png is 20 x 90 pixels" in capsys.readouterr().err
    (tmp_path / "edges" / "2_canny.png").unlink()
    assert train_control(families("sd1")[0], data, tmp_path / "third", **pairs) == 2
    assert "no control picture for 2.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preprocess": None}, "give one of them"),
        ({"preprocess": "cany"}, "did you mean canny"),
        ({"preprocess": "depth"}, "give their folder"),
        ({"preprocess": "inpaint"}, "needs more than the picture"),
        ({"preprocess_options": ("low=300",)}, "low 300 is above high 200"),
        ({"preprocess_options": ("high=x",)}, "high x is not allowed"),
        ({"control_data_dir": "gone", "preprocess": None}, "gone is no folder"),
        ({"preprocess": "canny", "control_data_dir": "gone"}, "give one of them"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(families, data, tmp_path, capsys, options, said):
    assert train_control("nowhere", data, tmp_path / "run", **options) == 2
    assert said in capsys.readouterr().err


def test_an_inpainting_model_is_refused(families, data, tmp_path, capsys):
    assert train_control(families("inpaint")[0], data, tmp_path / "run") == 2
    assert "is an inpainting model: train in mode controlnet beside" in capsys.readouterr().err


def test_flags_of_other_modes_are_none_of_this_command(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_control("m", data, tmp_path / "run", rank=4)
    assert "unrecognized arguments: --rank" in capsys.readouterr().err
    given = {"train_data_dir": data, "output_dir": tmp_path, "preprocess": "canny"}
    with pytest.raises(UserError, match="preprocess is not allowed in mode lora"):
        validate(FinetuneRecipe, given, "here")
