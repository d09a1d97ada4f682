"""`ldm merge`, against the same sums in float64 on what the files hold."""

import json
import re
import signal
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from tiny_merge import state, varied
from tiny_pipeline import randomise, tiny_unet

import ldm
from ldm.checkpoint.convert import convert
from ldm.checkpoint.merge import merge, merging
from ldm.cli import main
from ldm.errors import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders a, b, c of one family, and a.safetensors, b.safetensors: a in fp32, b in fp16, c in bf16."""
    root = tmp_path_factory.mktemp("merge")
    make_family("sd1", root / "base")
    for seed, (name, dtype) in enumerate({"a": None, "b": torch.float16, "c": torch.bfloat16}.items()):
        varied(root / "base", root / name, seed, dtype)
        convert(root / name, root / f"{name}.safetensors", log=lambda _: None)
    return root


def quiet(*args, **kwargs):
    merge(*args, log=lambda _: None, **kwargs)


def assert_sum(found, models, formula, tolerance=1e-6):
    """Every tensor of `found` is the formula of those of the models, in float64."""
    states = [state(model) if model.is_dir() else load_file(model) for model in models]
    found = state(found) if found.is_dir() else load_file(found)
    assert len(found) > 100
    assert found.keys() <= states[0].keys()
    for name, tensor in found.items():
        exact = formula(*(each[name].double() for each in states))
        assert (tensor.double() - exact).abs().max() <= tolerance * exact.abs().max(), name


def test_a_weighted_sum_of_two(tmp_path, models, capsys):
    a, b = models / "a", models / "b"
    code = main(["merge", str(a), str(b), "--weights", "0.7", "0.3", "-o", str(tmp_path / "out")])
    assert (code, capsys.readouterr().out) == (0, f"{tmp_path / 'out'}\n")
    assert_sum(tmp_path / "out", [a, b], lambda a, b: 0.7 * a + 0.3 * b)
    assert state(tmp_path / "out").keys() == state(a).keys()
    assert {tensor.dtype for tensor in state(tmp_path / "out").values()} == {torch.float32}


def test_three_models_of_any_form_into_one_file(tmp_path, models):
    given = [models / "a.safetensors", models / "b", models / "c.safetensors"]
    quiet(given, tmp_path / "out.safetensors", weights=(0.5, 0.3, 0.2))
    files = [models / f"{name}.safetensors" for name in "abc"]
    assert_sum(tmp_path / "out.safetensors", files, lambda a, b, c: 0.5 * a + 0.3 * b + 0.2 * c)
    quiet([models / "a", models / "b", models / "c"], tmp_path / "out", weights=(0.5, 0.3, 0.2))
    convert(tmp_path / "out", tmp_path / "same.safetensors", log=lambda _: None)
    ours, theirs = (load_file(tmp_path / name) for name in ("out.safetensors", "same.safetensors"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_difference_is_added_and_rounded_once(tmp_path, models):
    given = [models / "b", models / "a", models / "c"]  # the first is fp16, and so is what comes out
    quiet(given, tmp_path / "half", add_difference=0.8)
    quiet(given, tmp_path / "full", add_difference=0.8, dtype=torch.float32)
    assert_sum(tmp_path / "full", given, lambda b, a, c: b + 0.8 * (a - c), 2e-6)
    half, full = state(tmp_path / "half"), state(tmp_path / "full")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert all(torch.equal(half[name], full[name].half()) for name in full)


def test_block_by_block(tmp_path, models, capsys):
    """By names in files, as those have it who began with it."""
    a, b = models / "a.safetensors", models / "b.safetensors"
    listed = (
        {f"IN{i:02}": 0.1 * i for i in range(4)}
        | {"M00": 0.45}
        | {f"OUT{i:02}": 1 - 0.2 * i for i in range(4)}
    )
    numbers = ",".join(map(str, [0.9, *listed.values()]))
    code = main(
        ["merge", str(a), str(b), "--block-weights", numbers, "-o", str(tmp_path / "out.safetensors")]
    )
    assert code == 0
    found, ours, theirs = (load_file(path) for path in (tmp_path / "out.safetensors", a, b))
    seen = set()
    for name, tensor in found.items():
        w = 0.9
        if name.startswith("model.diffusion_model."):
            inner = name.removeprefix("model.diffusion_model.")
            if block := re.match(r"(in|out)put_blocks\.(\d+)\.", inner):
                w = listed[f"{block[1].upper()}{int(block[2]):02}"]
            else:
                w = {"middle_block": 0.45, "time_embed": 0.0, "out": listed["OUT03"]}[inner.partition(".")[0]]
        exact = (1 - w) * ours[name].double() + w * theirs[name].double()
        assert (tensor.double() - exact).abs().max() <= 1e-6 * exact.abs().max(), name
        seen.add(w)
    assert seen == {0.9, *listed.values()}
    named = [f"{block}={weight}" for block, weight in listed.items()]
    arguments = ["--weights", "0.9", "--block-weights", *named, "-o", str(tmp_path / "named.safetensors")]
    assert main(["merge", str(a), str(b), *arguments]) == 0
    again = load_file(tmp_path / "named.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())
    capsys.readouterr()


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_all_weight_on_one_gives_its_bits(tmp_path, models, target):
    for weights, which in (((1, 0), "b"), ((0, 1), "c")):
        quiet(
            [models / "b", models / "c"], tmp_path / target, weights=weights, dtype=torch.float32, force=True
        )
        convert(models / which, tmp_path / "plain" / target, dtype=torch.float32, force=True)
        read = state if target == "out" else load_file
        ours, theirs = read(tmp_path / target), read(tmp_path / "plain" / target)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_parts_and_the_vae_of_another(tmp_path, models):
    a, b, c = (models / name for name in "abc")
    quiet([a, b], tmp_path / "unet", weights=[0.5], parts=["unet"])
    quiet([a, b], tmp_path / "vae", weights=[0.5], vae=c)
    ours, theirs, others = state(a), state(b), state(c)
    for name, tensor in state(tmp_path / "unet").items():
        if not name.startswith("unet."):
            assert torch.equal(tensor, ours[name])
        else:
            assert torch.allclose(tensor, 0.5 * (ours[name] + theirs[name].float()), atol=1e-6)
    for name, tensor in state(tmp_path / "vae").items():
        if name.startswith("vae."):
            assert torch.equal(tensor, others[name])
        else:
            assert torch.allclose(tensor, 0.5 * (ours[name] + theirs[name].float()), atol=1e-6)


def test_an_inpainting_model_of_any_other(tmp_path, models, families):
    wide = varied(families("inpaint")[0], tmp_path / "wide", 5)
    lines = []
    given = [wide, models / "b", models / "c"]
    merge(given, tmp_path / "out", add_difference=1.0, log=lines.append)
    a, b, c = (state(path) for path in given)
    name = "unet.conv_in.weight"
    found = state(tmp_path / "out")
    exact = a[name].double()
    exact[:, :4] += b[name].double() - c[name].double()
    assert found[name].shape[1] == 9
    assert (found[name] - exact).abs().max() < 1e-6
    assert torch.equal(found[name][:, 4:], a[name][:, 4:])
    other = "unet.conv_out.weight"
    assert (found[other] - (a[other].double() + b[other].double() - c[other].double())).abs().max() < 1e-6
    assert lines == [f"{each}: its U-Net takes 4 channels; 5 more are {wide}'s" for each in given[1:]]
    with pytest.raises(UserError, match="give the model with more"):
        quiet([models / "a", wide], tmp_path / "not")
    with pytest.raises(UserError, match="only the first model may have more"):
        quiet([wide, models / "a", wide], tmp_path / "not", add_difference=1)
    assert not (tmp_path / "not").exists()


def test_what_comes_out_draws_as_in_diffusers(tmp_path, models):
    quiet([models / "a", models / "b"], tmp_path / "out", weights=(0.7, 0.3))
    quiet([models / "a", models / "b"], tmp_path / "out.safetensors", weights=(0.7, 0.3))
    asked = {"num_inference_steps": 2, "guidance_scale": 2.0}
    ours, file, unmerged = (
        np.asarray(
            ldm.load(each, device="cpu", dtype="fp32")("a boat", seed=3, **asked).images[0], np.float32
        )
        for each in (tmp_path / "out", tmp_path / "out.safetensors", models / "a")
    )
    assert np.array_equal(ours, file)
    assert np.abs(ours - unmerged).mean() > 1
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipe("a boat", latents=latents, output_type="np", **asked).images[0]
    drawn = ldm.load(tmp_path / "out", device="cpu", dtype="fp32")("a boat", latents=latents, **asked).images[
        0
    ]
    assert np.abs(np.asarray(drawn, np.float64) / 255 - theirs).max() < 0.01


def test_xl_merges_too(tmp_path, families):
    folder = families("sdxl")[0]
    a, b = (varied(folder, tmp_path / name, seed) for seed, name in enumerate("ab"))
    quiet([a, b], tmp_path / "out", weights=[0.25], dtype=torch.float32)
    assert_sum(tmp_path / "out", [a, b], lambda a, b: 0.75 * a + 0.25 * b)
    quiet([a, b], tmp_path / "out.safetensors", weights=[0.25])
    convert(tmp_path / "out.safetensors", tmp_path / "back", log=lambda _: None)
    ours, theirs = state(tmp_path / "out"), state(tmp_path / "back")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_shards_and_in_place(tmp_path, models):
    a = varied(models / "base", tmp_path / "a", 7)
    before = state(a)
    quiet([a, models / "b"], a, weights=[0.5], max_shard_size="50KB", force=True)
    assert (a / "unet/diffusion_pytorch_model.safetensors.index.json").exists()
    after, theirs = state(a), state(models / "b")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.allclose(tensor, 0.5 * (before[name] + theirs[name].float()), atol=1e-6)


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("sd2", ("different models", "unet has cross_attention_dim 24", "40")),
        ("sdxl", ("different models", "unet has")),
        ("sd1_deeper", ("layers_per_block", "1 in the first, 2 in the other")),
    ],
)
def test_models_of_another_kind(tmp_path, models, families, other, words):
    folder = tmp_path / "deeper"
    if other == "sd1_deeper":
        varied(models / "base", folder, 1)
        tiny_unet(layers_per_block=2).save_pretrained(folder / "unet")
    else:
        folder = families(other)[0]
    with pytest.raises(UserError) as caught:
        quiet([models / "a", folder], tmp_path / "out")
    for word in (str(models / "a"), str(folder), *words):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_text_encoders_that_differ_may_be_left_out(tmp_path, models, families):
    other = varied(models / "base", tmp_path / "other", 3)
    config = json.loads((other / "text_encoder/config.json").read_text())
    (other / "text_encoder/config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(UserError, match="text_encoder has hidden_act 'quick_gelu' in the first, 'gelu' in"):
        quiet([models / "a", other], tmp_path / "out")
    quiet([models / "a", other], tmp_path / "out", parts=["unet", "vae"])
    (other / "text_encoder/config.json").write_text(json.dumps(config))
    path = other / "tokenizer/tokenizer.json"
    described = json.loads(path.read_text())
    words = described["model"]["vocab"]
    words["red</w>"], words["the</w>"] = words["the</w>"], words["red</w>"]
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"different vocabularies: '(red|the)</w>' is token"):
        quiet([models / "a", other], tmp_path / "not")


def test_predictions_do_not_mix(tmp_path, models, families):
    eps, v = (families(name)[0] for name in ("sd2", "sd2_v"))
    with pytest.raises(UserError, match=r"predicts epsilon, .* v_prediction: .*--prediction-type"):
        quiet([eps, v], tmp_path / "out")
    lines = []
    merge([eps, v], tmp_path / "out", prediction_type="v_prediction", log=lines.append)
    assert lines == []
    assert '"v_prediction"' in (tmp_path / "out/scheduler/scheduler_config.json").read_text()


def test_another_noise_schedule_is_said(tmp_path, models):
    other = varied(models / "base", tmp_path / "other", 3)
    path = other / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.02}))
    lines = []
    merge([models / "a", other], tmp_path / "out", log=lines.append)
    assert lines == [f"{other}: has another noise schedule than {models / 'a'}, whose schedule is written"]


def test_a_sum_that_its_dtype_cannot_hold(tmp_path, models):
    with pytest.raises(UserError, match=r"(unet|vae): tensor \S+ is too large for float16"):
        quiet([models / "a", models / "b"], tmp_path / "out", weights=(1e6, 1 - 1e6), dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_nan_in_a_model(tmp_path, models):
    other = varied(models / "base", tmp_path / "other", 3)
    path = other / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"conv_out\.bias holds NaN"):
        quiet([models / "a", other], tmp_path / "out", weights=(1, 0))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--weights", "nan", "0.5"], "nan is not a number"),
        (["--weights", "0.7", "0.7"], "the weights' sum is 1.4"),
        (["--block-weights", "M00=0.5", "0.3", "--weights", "0.5"], "name all weights or none"),
        (["--block-weights", "M00=0.5", "m00=0.3", "--weights", "0.5"], "no block twice"),
        (["--block-weights", "0.5", "--weights", "0.5"], "1 block weights, and the U-Net has 9 blocks"),
        (["--parts", "clip"], "clip is not one of unet"),
        (["--parts", "text-encoder-2"], "has no text_encoder_2 to merge"),
        (["--parts", "vae", "--vae", "b"], "either merged or taken"),
        (["--add-difference", "1"], "takes three models"),
    ],
)
def test_flags_that_make_no_merge(tmp_path, models, capsys, monkeypatch, arguments, word):
    monkeypatch.chdir(models)
    target = tmp_path / "out"
    try:
        code = main(["merge", "a", "b", "-o", str(target), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert word in capsys.readouterr().err
    assert not target.exists()


def test_one_model_and_a_target_that_is_there(tmp_path, models, capsys):
    target = tmp_path / "out.safetensors"
    assert main(["merge", str(models / "a"), "-o", str(target)]) == 2
    assert "give two or more" in capsys.readouterr().err
    target.write_text("mine")
    assert main(["merge", str(models / "a"), str(models / "b"), "-o", str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["merge", str(models / "a"), str(models / "nowhere"), "-o", str(tmp_path / "x")]) == 2
    assert "nowhere" in capsys.readouterr().err


# --- while it is written ---------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, models, target):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing on is an error and not the end
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(UserError) as caught:
            quiet([models / "a", models / "b"], tmp_path / target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, was)
    assert str(caught.value) == f"cannot write to {tmp_path / target}: File too large"
    assert list(tmp_path.iterdir()) == []


def test_each_tensor_is_gone_before_the_next_is_made(tmp_path, models, monkeypatch):
    made, plain = [], merging._make

    def make(*args):
        assert [ref for ref in made if ref() is not None] == []
        made.append(weakref.ref(tensor := plain(*args)))
        return tensor

    monkeypatch.setattr(merging, "_make", make)
    quiet([models / "a", models / "b"], tmp_path / "out", weights=[0.3])
    assert len(made) == len(state(tmp_path / "out"))
    made.clear()
    quiet([models / "a", models / "b.safetensors"], tmp_path / "out.safetensors", weights=[0.3])
    assert len(made) == len(load_file(tmp_path / "out.safetensors"))


PEAK = """
import resource, sys
from pathlib import Path
import torch
from ldm.checkpoint.merge import merge
torch.set_num_threads(1)
merge(["small", "small"], Path("warm"), log=lambda _: None)  # imports what takes memory
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for target in ("out", "out.safetensors"):
    merge(["a", "b"], Path(target), weights=[0.3], log=lambda _: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes there, bytes elsewhere")
def test_never_more_than_few_tensors_in_memory(tmp_path, models):
    """Two models of 60 MB become one of 60 MB, within a fraction of that."""
    varied(models / "base", tmp_path / "small", 1)
    big = varied(models / "base", tmp_path / "a", 1)
    deep = tiny_unet(block_out_channels=(256, 256), transformer_layers_per_block=4, attention_head_dim=8)
    randomise(deep).save_pretrained(big / "unet")
    varied(big, tmp_path / "b", 2)
    size = sum(path.stat().st_size for path in big.glob("*/*.safetensors")) / 1024
    assert size > 60_000
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(int(line) < size / 3 for line in done.stdout.split()), (done.stdout, size)
    assert (tmp_path / "out.safetensors").stat().st_size > 1024 * 0.99 * size
