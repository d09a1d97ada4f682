"""Single files: what is taken, what is left, and what is refused by name."""

import re
from pathlib import Path

import pytest
import torch
from original_layout import CHECKPOINTS, AutoencoderKL, Clip, UNetModel, checkpoint
from safetensors.torch import load_file, save_file
from tiny_families import make_family

from ldm.checkpoint import load_folder, save_model
from ldm.checkpoint.original.component import load_component
from ldm.checkpoint.original.sections import _choose_average
from ldm.checkpoint.original.single import load_single, read_single
from ldm.errors import UserError
from ldm.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
ROWS = 49408  # of CLIP's vocabulary: such a file needs no other tokenizer
UNET = {"channels": 64, "mult": (1, 2), "depths": (1, 0), "middle": 1, "context": 64, "in_channels": 4}
UNET |= {"linear": False, "blocks": 1}
TEXT = {"width": 64, "layers": 2, "vocabulary": ROWS, "inner": 64}
SD1 = {
    "model.diffusion_model": (UNetModel, UNET),
    "first_stage_model": (AutoencoderKL, {"ch": 32, "mult": (1, 2), "blocks": 1}),
    "cond_stage_model.transformer": (Clip, TEXT),
}
EMA = "model_ema.diffusion_modelinput_blocks00weight"


@pytest.fixture(scope="module")
def sd1():
    return checkpoint(SD1)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Folders and single files of tiny families: name -> (folder, file)."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def make(name):
        if name not in made:
            make_family(name, root / name)
            save_model(root / f"{name}.safetensors", load_folder(root / name, RUNTIME))
            made[name] = root / name, root / f"{name}.safetensors"
        return made[name]

    return make


def write(tmp_path, tensors, name="model.safetensors", metadata=None):
    save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / name, metadata)
    return tmp_path / name


def read(path, **options):
    lines = []
    parts, unused = read_single(path, log=lines.append, **options)
    return parts, unused, lines


def complaint(path, fails=None, **options):
    """What is said of `path`, when it or `fails` is loaded."""
    with pytest.raises(UserError) as error:
        load_single(fails or path, RUNTIME, log=lambda line: None, **options)
    message = str(error.value)
    assert path.name in message
    assert message.count("\n") <= 1
    return message


# --- what is taken ---------------------------------------------------------------------------------------


def test_a_file_loads_offline_with_the_vocabulary_of_the_package(tmp_path, sd1):
    parts, unused, lines = read(write(tmp_path, sd1))
    assert parts.tokenizer("a photo of a cat").input_ids[1:-1] == [320, 1125, 539, 320, 2368]
    assert parts.unet.config.attention_head_dim == 8
    assert parts.vae.scaling_factor == 0.18215
    weight = sd1["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"]
    ours = parts.unet.state_dict()["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    assert torch.equal(ours, weight)
    assert unused == ["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    (line,) = lines
    assert line.startswith("model.safetensors (Stable Diffusion 1): the prediction type is not in the file")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_files_and_of_runtimes(tmp_path, sd1, dtype):
    path = write(tmp_path, {name: t.to(dtype) if t.is_floating_point() else t for name, t in sd1.items()})
    assert {p.dtype for p in read(path)[0].unet.parameters()} == {dtype}
    loaded = load_single(path, RUNTIME, log=lambda line: None)
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.float32}
    assert loaded.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_training_checkpoint_is_read_and_what_is_no_tensor_ignored(tmp_path, sd1):
    nested = {"state_dict": dict(sd1), "epoch": 3, "global_step": 875000, "callbacks": {}}
    torch.save(nested, tmp_path / "model.ckpt")
    parts, _, _ = read(tmp_path / "model.ckpt")
    assert torch.equal(parts.unet.conv_in.weight, sd1["model.diffusion_model.input_blocks.0.0.weight"])


def test_known_leftovers_are_dropped_and_listed(tmp_path, sd1):
    names = ["betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1"]
    names += ["log_one_minus_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "lvlb_weights", "logvar"]
    names += ["model_ema.decay", "model_ema.num_updates", "cond_stage_model.logit_scale"]
    names += ["first_stage_model.loss.discriminator.main.0.weight", "low_scale_model.betas"]
    _, unused, _ = read(write(tmp_path, sd1 | {name: torch.zeros(1) for name in names}))
    assert {*names} <= {*unused}


def test_old_names_of_the_text_encoder(tmp_path, sd1):
    """Files of 2022 lack `text_model.`."""
    old = {name.replace("transformer.text_model.", "transformer."): t for name, t in sd1.items()}
    ours, theirs = read(write(tmp_path, old, "old.safetensors"))[0], read(write(tmp_path, sd1))[0]
    ours, theirs = ours.text_encoder.state_dict(), theirs.text_encoder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Names in a file, and the 1s that their shapes get: none of them changes a number or their order.
ONES = {
    "the biases of a VAE's attention": (r"first_stage_model\..*attn_1\.(q|k|v|proj_out)\.bias", (1, 1)),
    "one 1": (r"first_stage_model\..*attn_1\.(q|k|v|proj_out)\.bias", (1,)),
    "all vectors": (r".*\.(bias|norm1\.weight|ln_1\.weight)", (1, 1)),
    "linear layers": (r".*(emb_layers\.1|time_embed\.0|fc1|c_fc|attn2\.to_k)\.weight", (1, 1)),
    "stacked and turned round": (r".*(in_proj_weight|in_proj_bias|text_projection)", (1, 1)),
    "tables": (r".*(token_embedding\.weight|positional_embedding|position_embedding\.weight)", (1,)),
}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("which", ONES)
def test_shapes_with_more_ones_hold_the_same_numbers(tmp_path, family, name, which):
    folder, file = family(name)
    pattern, ones = ONES[which]
    shaped = {
        key: t.reshape(*t.shape, *ones) if re.fullmatch(pattern, key) and t.ndim < 3 else t
        for key, t in load_file(file).items()
    }
    ours, theirs = read(write(tmp_path, shaped), config=folder)[0], read(file)[0]
    for part in ("unet", "vae", "text_encoder", *["text_encoder_2"] * (name == "sdxl")):
        wanted = getattr(theirs, part).state_dict()
        got = getattr(ours, part).state_dict()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_of_diffusers_names_with_more_ones(tmp_path, family, part):
    folder, _ = family("sd1")
    (weights,) = (folder / part).glob("*.safetensors")
    biases = {key: t[:, None, None] if key.endswith(".bias") else t for key, t in load_file(weights).items()}
    module = getattr(load_folder(folder, RUNTIME), part)
    known = module.to_config()
    loaded = load_component(write(tmp_path, biases), part, known).state_dict()
    assert all(torch.equal(t, module.state_dict()[key]) for key, t in loaded.items())


def test_shapes_of_other_numbers_name_no_file_that_is_not_there(tmp_path, sd1):
    attention = "first_stage_model.decoder.mid.attn_1.k"
    for key, shape in ((f"{attention}.bias", (32,)), (f"{attention}.weight", (2, 64 * 32))):
        wrong = sd1 | {key: torch.zeros(shape)}
        message = complaint(write(tmp_path, wrong))
        assert f"attentions.0.to_k.{key.rpartition('.')[2]} is {list(shape)}, not [64" in message
        assert "config.json" not in message
    first = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias"
    assert "config.json" not in complaint(write(tmp_path, sd1 | {first: torch.zeros(3)}))
    table = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    assert "text_encoder have shapes" in complaint(write(tmp_path, sd1 | {table: torch.zeros(3)}))


def averaged(tensors):
    """The U-Net's tensors, each 1 more, under LitEma's names."""
    prefix = "model.diffusion_model."
    return {
        "model_ema.diffusion_model" + name.removeprefix(prefix).replace(".", ""): t + 1
        for name, t in tensors.items()
        if name.startswith(prefix)
    }


def test_averaged_weights_are_chosen_explicitly(tmp_path, sd1):
    path = write(tmp_path, sd1 | averaged(sd1))
    plain = sd1["model.diffusion_model.input_blocks.0.0.weight"]
    parts, unused, lines = read(path)
    assert torch.equal(parts.unet.conv_in.weight, plain)
    assert EMA in unused
    assert any("--ema" in line and "plain" in line for line in lines)
    parts, unused, lines = read(path, ema=True)
    assert torch.equal(parts.unet.conv_in.weight, plain + 1)
    assert EMA not in unused
    parts, _, lines = read(path, ema=False)
    assert torch.equal(parts.unet.conv_in.weight, plain)
    assert not any("EMA" in line for line in lines)


def test_a_file_of_averages_only(tmp_path, sd1, family):
    """They are the U-Net's; all its kinds of layers are found by their names without dots."""
    only = without(sd1 | averaged(sd1), "model.diffusion_model.") | {"model_ema.decay": torch.zeros(1)}
    path = write(tmp_path, only)
    for ema in (None, True):
        parts, unused, lines = read(path, ema=ema)
        plain = sd1["model.diffusion_model.input_blocks.0.0.weight"]
        assert torch.equal(parts.unet.conv_in.weight, plain + 1)
        assert any("averaged (EMA) weights only: they are taken" in line for line in lines)
        assert "model_ema.decay" in unused
        assert EMA not in unused
    assert "averaged weights (EMA) only; leave --no-ema out" in complaint(path, ema=False)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "refiner", "upscaler", "lcm"])
def test_averages_only_of_every_family(tmp_path, family, name):
    folder, file = family(name)
    tensors = load_file(file)
    only = without(tensors | averaged(tensors), "model.diffusion_model.")
    ours = read(write(tmp_path, only), config=folder)[0].unet.state_dict()
    theirs = read(file)[0].unet.state_dict()
    assert all(torch.equal(ours[key], theirs[key] + 1) for key in theirs)


@pytest.mark.parametrize("model", CHECKPOINTS)
def test_names_without_dots_are_those_of_real_models(model):
    names = [
        key for key in checkpoint(CHECKPOINTS[model], "meta") if key.startswith("model.diffusion_model.")
    ]
    tensors = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": torch.zeros(1) for key in names}
    found, _ = _choose_average(tensors, None, Path("model.ckpt"))
    assert sorted(found) == sorted(names)


def test_averages_with_a_name_that_is_no_unets(tmp_path, sd1):
    odd = {"model_ema.diffusion_modeltemporal7weight": torch.zeros(1)}
    only = without(sd1 | averaged(sd1) | odd, "model.diffusion_model.")
    assert "not of this model: model.diffusion_model.temporal.7.weight" in complaint(write(tmp_path, only))


def test_faults_of_averaged_weights(tmp_path, sd1):
    assert "no averaged weights" in complaint(write(tmp_path, sd1), ema=True)
    some = averaged(sd1)
    del some[EMA]
    assert "1 averaged weights are missing" in complaint(write(tmp_path, sd1 | some), ema=True)


# --- parts from elsewhere --------------------------------------------------------------------------------


def without(tensors, prefix):
    return {name: t for name, t in tensors.items() if not name.startswith(prefix)}


def test_a_missing_part_is_named_and_can_be_given(tmp_path, sd1):
    vae = {name.removeprefix("first_stage_model."): t for name, t in sd1.items() if "first_stage" in name}
    alone = write(tmp_path, vae | {"loss.logvar": torch.zeros(())}, "vae.safetensors")
    torn = without(without(sd1, "first_stage_model."), "cond_stage_model.")
    message = complaint(write(tmp_path, torn))
    assert "no vae and no text_encoder" in message
    assert "--vae FILE --text-encoder FILE" in message
    whole = write(tmp_path, sd1, "whole.safetensors")
    given = {"vae": alone, "text_encoder": whole}
    parts, _, _ = read(tmp_path / "model.safetensors", overrides=given)
    wanted = read(whole)[0]
    for part in ("vae", "text_encoder", "unet"):
        ours, theirs = getattr(parts, part).state_dict(), getattr(wanted, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_part_from_a_folder_a_file_of_diffusers_and_a_whole_model(family, part):
    folder, file = family("sdxl")
    config = load_folder(folder, RUNTIME)
    module = getattr(config, part)
    known = module.to_config()
    (weights,) = (folder / part).glob("*.safetensors")
    for source in (folder / part, weights, file):
        loaded = load_component(source, part, known)
        assert loaded.state_dict().keys() == module.state_dict().keys()
        assert all(torch.equal(t, module.state_dict()[name]) for name, t in loaded.state_dict().items())


def test_an_inpainting_unet_may_replace_another(family):
    folder, _ = family("sd1")
    _, file = family("inpaint")
    parts = load_folder(folder, RUNTIME, overrides={"unet": file})
    assert parts.unet.config.in_channels == 9


def test_a_part_of_another_family_is_refused(family):
    _folder, file = family("sd1")
    _, other = family("sd2")
    message = complaint(other, fails=file, overrides={"unet": other})
    assert "takes text of width 40" in message
    message = complaint(file, overrides={"text_encoder": other})
    assert f"text_encoder gives 40 ({other})" in message
    with pytest.raises(UserError, match="no text_encoder_2 in it"):
        load_component(file, "text_encoder_2", {})
    assert "has no text_encoder_2" in complaint(file, overrides={"text_encoder_2": other})


# --- faults ----------------------------------------------------------------------------------------------


def test_unknown_and_missing_tensors_are_named(tmp_path, sd1):
    extra = sd1 | {"model.diffusion_model.temporal.weight": torch.zeros(1)}
    message = complaint(write(tmp_path, extra))
    assert "not of this model: model.diffusion_model.temporal.weight" in message
    assert "unknown: mystery.weight" in complaint(write(tmp_path, sd1 | {"mystery.weight": torch.zeros(1)}))
    name = "first_stage_model.decoder.mid.attn_1.k.weight"
    assert f"missing: {name}" in complaint(write(tmp_path, without(sd1, name)))
    narrow = sd1 | {name: torch.zeros(32, 32, 1, 1)}
    assert "decoder.mid_block.attentions.0.to_k.weight is [32, 32]" in complaint(write(tmp_path, narrow))


OTHERS = {
    "this is a LoRA.*--lora": {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": (4, 8)},
    "this is a LoRA": {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (4, 8)},
    "textual inversion.*--embedding": {"emb_params": (2, 64)},
    "this is a ControlNet": {"control_model.time_embed.0.weight": (4, 4)},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4, 4)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (4, 4)},
    "one part of a model.*--vae": {"encoder.conv_in.weight": (8, 3, 3, 3)},
    "one part of a model": {"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3)},
    "not a Stable Diffusion checkpoint; it holds layer1.weight": {"layer1.weight": (4, 4)},
}


@pytest.mark.parametrize("said", OTHERS)
def test_what_is_not_a_model_is_told_apart(tmp_path, said):
    tensors = {name: torch.zeros(shape) for name, shape in OTHERS[said].items()}
    assert re.search(said, complaint(write(tmp_path, tensors)))


def test_a_lora_as_a_part_is_told_apart(tmp_path, family):
    lora = write(tmp_path, {"lora_unet_x.lora_up.weight": torch.zeros(4, 4)}, "lora.safetensors")
    with pytest.raises(UserError, match=r"lora\.safetensors: this is a LoRA"):
        load_folder(family("sd1")[0], RUNTIME, overrides={"unet": lora})


def test_a_file_cut_short(tmp_path, sd1):
    path = write(tmp_path, sd1)
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut short" in complaint(path)


def test_a_vocabulary_that_does_not_fit(tmp_path, sd1):
    rows = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(50, 64)}
    assert "rows for 50 tokens" in complaint(write(tmp_path, sd1 | rows))


def test_sd2_reads_all_layers_but_the_last(tmp_path, family):
    folder, file = family("sd2")
    tensors = load_file(file)
    layer = "cond_stage_model.model.transformer.resblocks."
    last = {name.replace(".2.", ".3."): t + 1 for name, t in tensors.items() if name.startswith(f"{layer}2.")}
    _, unused, _ = read(write(tmp_path, tensors | last), config=folder)
    assert {*last} == {*unused}
    beyond = {name.replace(".3.", ".4."): t for name, t in last.items()}
    message = complaint(write(tmp_path, tensors | beyond), config=folder)
    assert f"not of this model: {layer}4." in message
