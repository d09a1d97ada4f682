"""What is trained and what is not, at which rates, and whether what comes out draws as what was trained."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_finetune import QUICK, WORD, write_pictures

import ldm
from ldm.finetune import finetune as module
from ldm.finetune.finetune import finetune
from ldm.finetune.recipe import FinetuneRecipe
from ldm.pipeline import Pipeline
from ldm.runtime import Runtime
from ldm.train.loop import train

CPU = Runtime(torch.device("cpu"), torch.float32)
ENCODERS = ("text_encoder", "text_encoder_2")
TEXT_WORD = WORD | {"instance_prompt": "red <it>"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 6)


@pytest.fixture
def trained(families, data, tmp_path, monkeypatch):
    """A factory: the task of a fine-tuning that has ended; its tensors before; the folder."""
    from accelerate.state import AcceleratorState

    def make(family, **options):
        seen = {}

        def kept(task, recipe, run_dir):
            seen["task"], seen["before"] = task, tensors(task)
            train(task, recipe, run_dir)

        monkeypatch.setattr(module, "train", kept)
        AcceleratorState._reset_state(reset_partial_state=True)
        given = {"model": str(families(family)[0]), "train_data_dir": data, "output_dir": tmp_path / "run"}
        settings = {"validation_prompts": (), "adam_weight_decay": 0.1, "train_batch_size": 2} | options
        finetune(FinetuneRecipe.model_validate(QUICK | given | settings))
        return seen["task"], seen["before"], tmp_path / "run" / "export"

    return make


@pytest.fixture
def task_of(families, data, tmp_path, monkeypatch):
    """A factory: the task of a fine-tuning that has not begun."""

    def make(family, **options):
        tasks = []
        monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task.train()))
        monkeypatch.setattr(module, "_report", lambda *_: None)
        given = {"model": str(families(family)[0]), "train_data_dir": data, "output_dir": tmp_path / "run"}
        finetune(FinetuneRecipe.model_validate(QUICK | given | {"train_batch_size": 2} | options))
        return tasks[0]

    return make


def tensors(task):
    """Copies of all parameters and buffers, the VAE's too."""
    parts = {name: getattr(task.parts, name) for name in ("unet", "vae", *ENCODERS)}
    return {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in parts.items()
        if module is not None
        for name, tensor in module.state_dict().items()
    }


def changed(task, before):
    after = tensors(task)
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def draw(pipe, prompt="red boat", **more):
    return np.asarray(pipe(prompt, seed=3, height=64, width=64, num_inference_steps=2, **more).images[0])


def live(task):
    return Pipeline.from_parts(task.eval().parts, CPU)


def loaded(*args, **kwargs):
    return ldm.load(*args, dtype="fp32", device="cpu", **kwargs)


# --- full ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "text"), [("sd1", False), ("sd1", True), ("sdxl", True)])
def test_full_trains_all_of_what_it_should_and_nothing_else(trained, family, text):
    task, before, export = trained(family, mode="full", train_text_encoder=text)
    moved = changed(task, before)
    assert {name for name in moved if name.startswith("unet.")} == {
        n for n in before if n.startswith("unet.")
    }
    assert not any(name.startswith("vae.") for name in moved)
    own = {name for name in moved if name.startswith("text_encoder")}
    if not text:
        assert own == set()
    else:
        still = {name for name in before if name.startswith("text_encoder")} - own
        assert all("position_ids" in n or "layers.2" in n or "final_layer_norm" in n for n in still)
        assert any(name.startswith("text_encoder.") for name in own)
        assert bool(still - {n for n in still if "position_ids" in n}) == (family == "sdxl")
        assert not any(name.startswith("text_encoder_2.") for name in still if "position_ids" not in name)
    pipe = loaded(export)
    np.testing.assert_array_equal(draw(pipe), draw(live(task)))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_full_does_not_train_goes_out_as_it_came_in(trained, families, precision):
    """Rounding it to what networks compute in would make the model worse each time."""
    _, _, export = trained("sd1", mode="full", mixed_precision=precision, max_train_steps=1)
    model, same = families("sd1")[0], []
    for part in ("vae", "text_encoder", "unet"):
        (old,), (new,) = ([*(place / part).glob("*.safetensors")] for place in (model, export))
        old, new = ({k.removeprefix("text_model."): v for k, v in load_file(f).items()} for f in (old, new))
        assert old.keys() - {"embeddings.position_ids"} == new.keys()
        assert {name: v.dtype for name, v in new.items()} == {name: old[name].dtype for name in new}
        same.append(all(torch.equal(old[name], new[name]) for name in new))
    assert same == [True, True, False]


def test_full_keeps_averages_and_exports_them(trained):
    """EMA as Polyak: after two steps of decays min(d, 1 / 10) and min(d, 2 / 11)."""
    task, before, export = trained("sd1", mode="full", ema_decay=0.15, checkpointing_steps=1)
    name = "conv_in.weight"
    average = load_file(next((export / "unet").glob("*.safetensors")))[name]
    state = load_file(export.parent / "state-00000002" / "ema.safetensors")
    assert torch.equal(state[f"unet.{name}"], average)
    now = task.unet.conv_in.weight.detach()
    was = before[f"unet.{name}"]
    assert not torch.equal(average, now)
    nearness = float((average - now).norm() / (now - was).norm())
    assert 0 < nearness < 0.5  # near to the last step's, and not the same


def test_rates_of_the_parts(trained):
    task, _, _ = trained(
        "sdxl", mode="full", train_text_encoder=True, text_encoder_lr=1e-5, learning_rate=3e-4
    )
    groups = task.parameter_groups(3e-4)
    assert [group["lr"] for group in groups] == [3e-4, 1e-5, 1e-5]
    assert [p for group in groups for p in group["params"]] == [
        p for p in task.parameters() if p.requires_grad
    ]
    task, _, _ = trained(
        "sd1",
        train_text_encoder=True,
        learning_rate=2e-4,
        max_train_steps=3,
        force=True,
        output_dir=task.recipe.output_dir / "b",
    )
    assert [group["lr"] for group in task.parameter_groups(2e-4)] == [2e-4, 2e-4]


@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
@pytest.mark.parametrize("options", [{"mode": "full"}, {"lora_conv": True}, TEXT_WORD])
def test_all_that_is_trained_has_a_gradient(task_of, family, options):
    """Several processes wait for those of all that is trained."""
    text = {} if "placeholder_token" in options else {"train_text_encoder": True}
    task = task_of(family, **options, **text)
    task(task.batch(torch.Generator().manual_seed(0), 2, 0))[0].backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in task.named_parameters() if p.grad is not None and not p.requires_grad] == []


# --- lora ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd1", {}),
        ("sd2_v", {"train_text_encoder": True, "lora_conv": True, "lora_alpha": 8}),
        ("sdxl", {"train_text_encoder": True, "use_dora": True}),
        ("inpaint", {"inpainting": True, "lora_targets": ("to_k", "ff.net.2")}),
    ],
)
def test_lora_trains_its_matrices_alone_and_draws_the_same_from_both_files(
    trained, families, family, options
):
    task, before, export = trained(family, learning_rate=0.02, **options)
    moved = changed(task, before)
    assert moved
    assert all("lora_" in name for name in moved)
    assert any(name.startswith("text_encoder.") for name in moved) == options.get("train_text_encoder", False)
    if "lora_targets" in options:
        assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in moved} == {"to_k", "2"}
    more = {}
    if family == "inpaint":
        more = {"image": Image.new("RGB", (64, 64), "red"), "mask_image": Image.new("L", (64, 64), 255)}
    base, drawn = loaded(families(family)[0]), draw(live(task), **more)
    assert np.abs(drawn.astype(int) - draw(base, **more)).max() > 3
    assert {path.name for path in export.iterdir()} == {"pytorch_lora_weights.safetensors", "run.safetensors"}
    for place in (export, export / "run.safetensors"):
        again = draw(base.with_lora(place), **more)
        assert np.abs(drawn.astype(int) - again).max() <= 1, place


# --- textual inversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_word_is_all_that_is_learnt(trained, families, family):
    task, before, export = trained(family, **TEXT_WORD | {"num_vectors": 2}, learning_rate=0.1)
    moved = changed(task, before)
    assert moved == {name for name in before if name.endswith(".learnt.weight")}
    assert len(moved) == (2 if family == "sdxl" else 1)
    (path,) = export.iterdir()
    assert path.name == "learned_embeds.safetensors"
    drawn = draw(live(task), "red <it>")
    np.testing.assert_array_equal(drawn, draw(loaded(families(family)[0]).with_embedding(path), "red <it>"))
    assert np.abs(drawn.astype(int) - draw(live(task), "red boat")).max() > 3
