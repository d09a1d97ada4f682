"""LoRA layers in a model: which, how they begin, what a step changes, what is written beside tensors."""

import copy
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import NARROW
from torch import nn

from ldm.adapters.lora import read_lora
from ldm.errors import UserError
from ldm.finetune.lora import add_lora
from ldm.finetune.lora_files import save_lora
from ldm.pipeline import Pipeline

SMALL = {"rank": 2, "alpha": 3}


@pytest.fixture
def parts(pipes):
    return pipes("sd1").parts


def wanting(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def layers(module):
    """Paths of the layers that have a LoRA."""
    return {name.partition(".lora_")[0] for name in wanting(module)}


def begin(module):
    """B as if it were trained."""
    for name, p in wanting(module).items():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    return module


def in_bf16(parts):
    return replace(parts, unet=copy.deepcopy(parts.unet).bfloat16())


def output(unet, dtype=torch.float32):
    rng = torch.Generator().manual_seed(4)
    sample, context = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 7, NARROW, generator=rng)
    return unet(sample.to(dtype), 301, context.to(dtype))


# --- layers ---


def test_attention_by_default(parts, families):
    added = add_lora(parts, **SMALL, text=True)
    names = [name for name, _ in families("sd1")[1].unet.named_modules()]
    assert layers(added.unet) == {
        name for name in names if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
    attention = {f"self_attn.{each}_proj" for each in ("q", "k", "v", "out")}
    assert {name.partition("layers.")[2][2:] for name in layers(added.text_encoder)} == attention


@pytest.mark.parametrize("name", ["sd1", "sd2_v", "sdxl"])
def test_conv_means_the_layers_of_locon(pipes, families, name):
    """LyCORIS takes all linear layers and convolutions in these classes of diffusers."""
    classes = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    expected = {
        f"{outer}.{inner}"
        for outer, block in families(name)[1].unet.named_modules()
        if type(block).__name__ in classes
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    assert layers(add_lora(pipes(name).parts, **SMALL, conv=True).unet) == expected


def test_targets(parts):
    added = add_lora(parts, **SMALL, targets=["attn2.to_k", "fc1"], text=True)
    assert {name.split("transformer_blocks.0.")[1] for name in layers(added.unet)} == {"attn2.to_k"}
    assert {name.rpartition(".")[2] for name in layers(added.text_encoder)} == {"fc1"}
    added = add_lora(parts, **SMALL, targets=["ff.net.2"], text=True)
    assert {name.rpartition(".")[2] for name in layers(added.text_encoder)} == {
        *("q_proj", "k_proj", "v_proj", "out_proj")
    }


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_q", "to_quary"], r"target 'to_quary' is in no trained part; there are .*conv1.*to_out\.0"),
        (["fc1"], "target 'fc1' is in no trained part"),  # text encoders are not trained
        (["attn1"], "target 'attn1' names more than linear layers"),
        (["_q"], "target '_q' is in no trained part"),
    ],
)
def test_targets_that_are_no_layers(parts, targets, message):
    with pytest.raises(UserError, match=message):
        add_lora(parts, **SMALL, targets=targets)


# --- how they begin ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
def test_nothing_changes_at_first(parts, dtype, use_dora):
    unet = copy.deepcopy(parts.unet).to(dtype)
    added = add_lora(replace(parts, unet=unet), rank=8, alpha=4, conv=True, use_dora=use_dora).unet
    assert {p.dtype for p in wanting(added).values()} == {torch.float32}
    with torch.no_grad():
        difference = output(added, dtype).float() - output(unet, dtype).float()
    # DoRA divides magnitudes by norms that are computed again: a rounding, no more.
    assert difference.abs().max() < (2e-2 if dtype == torch.bfloat16 else 1e-5) * use_dora + 1e-9
    for name, p in wanting(added).items():
        if name.endswith("lora_magnitude_vector.default.weight"):
            weight = added.get_submodule(name.partition(".lora_")[0]).base_layer.weight.float()
            assert torch.allclose(p.flatten(), weight.flatten(1).norm(dim=1), rtol=1e-6)


def test_a_is_normal_and_follows_from_the_seed(parts):
    state = torch.get_rng_state()
    one, same, other = (wanting(add_lora(parts, rank=8, alpha=1, seed=seed).unet) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    downs = [name for name in one if "lora_A" in name]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in downs)
    wide = wanting(add_lora(parts, rank=8, alpha=1, seed=2**32 + 1).unet)
    assert not any(torch.equal(one[name], wide[name]) for name in downs)
    values = torch.cat([one[name].flatten() for name in downs])
    assert abs(values.std() - 1 / 8) < 0.01
    assert abs(values.mean()) < 0.01


def test_modes_are_kept(parts):
    added = add_lora(parts, **SMALL, dropout=0.5, text=True)
    assert not any(module.training for part in (added.unet, added.text_encoder) for module in part.modules())
    begin(added.unet)
    assert torch.equal(output(added.unet), output(added.unet))
    added.unet.train()
    assert not torch.equal(output(added.unet), output(added.unet))


# --- a step ---


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_step_changes_only_the_lora(parts, use_dora):
    with torch.no_grad():
        before = output(parts.unet)
    old = {name: (p, p.data_ptr(), p.clone()) for name, p in parts.unet.named_parameters()}
    added = add_lora(parts, **SMALL, use_dora=use_dora, text=True)
    begin(added.unet)
    assert added.text_encoder is not parts.text_encoder
    assert added.vae is parts.vae
    assert not any(wanting(module) for module in (parts.unet, parts.text_encoder, parts.vae))
    trained = wanting(added.unet)
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimiser = torch.optim.SGD(trained.values(), lr=0.1)
    output(added.unet).square().mean().backward()
    optimiser.step()
    assert not any(torch.equal(p, start[name]) for name, p in trained.items())
    frozen = {name: p for name, p in added.unet.named_parameters() if name not in trained}
    assert len(frozen) == len(old)
    for name, p in frozen.items():
        shared, place, value = old[name.replace(".base_layer", "")]
        assert p is shared
        assert p.data_ptr() == place
        assert torch.equal(p, value)
    with torch.no_grad():
        assert torch.equal(output(parts.unet), before)


def test_text_encoders_only_when_asked(parts):
    added = add_lora(parts, **SMALL)
    assert added.text_encoder is parts.text_encoder
    assert not wanting(added.text_encoder)


def test_autocast_without_casts_to_fp32(parts):
    """The inputs of A stay bf16, and outputs are the very same as with peft's casts."""
    unet = begin(add_lora(in_bf16(parts), **SMALL, conv=True).unet)
    seen = set()
    for name, module in unet.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = output(unet, torch.bfloat16)
        assert seen == {torch.bfloat16}
        for module in unet.modules():
            vars(module).pop("_cast_input_dtype", None)
        peft = output(unet, torch.bfloat16)
    assert seen == {torch.bfloat16, torch.float32}
    assert torch.equal(ours, peft)


def test_a_peft_without_its_private_cast_is_left_as_it_is(parts, monkeypatch):
    """The cast is replaced for speed alone; where there is none, nothing is put there that nobody calls."""
    monkeypatch.delattr("peft.tuners.tuners_utils.BaseTunerLayer._cast_input_dtype")
    unet = add_lora(in_bf16(parts), **SMALL).unet
    assert not any("_cast_input_dtype" in vars(module) for module in unet.modules())


def test_bf16_draws_without_autocast(parts):
    """As pipelines call the U-Net: A and B compute in their fp32."""
    unet = begin(add_lora(in_bf16(parts), **SMALL).unet)
    common = {"prompt": "sea", "num_inference_steps": 1, "height": 16, "width": 16, "output_type": "latent"}
    pipe = Pipeline.from_parts(replace(parts, unet=unet))
    assert pipe(**common, seed=0).images.isfinite().all()
    with torch.no_grad():
        exact = output(copy.deepcopy(unet).float())
        assert (output(unet, torch.bfloat16) - exact).abs().max() < 0.05 * exact.abs().max()


# --- files ---


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize(
    ("name", "version", "v2", "stems"),
    [
        (
            "sd1", "sd_v1", "False",
            {
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
                "lora_unet_up_blocks_1_resnets_0_conv_shortcut",
                "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            },
        ),
        ("sd2_v", "sd_v2_v", "True", {"lora_te_text_model_encoder_layers_2_self_attn_out_proj"}),
        (
            "sdxl", "sdxl_base_v1-0", "False",
            {
                "lora_unet_input_blocks_2_0_op",
                "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k",
                "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0",
                "lora_unet_output_blocks_2_0_in_layers_2",
                "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
                "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
            },
        ),
    ],
)  # fmt: skip
def test_names_and_header_of_kohya(pipes, tmp_path, name, version, v2, stems):
    save_lora(add_lora(pipes(name).parts, **SMALL, conv=True, text=True), tmp_path / "lora", "my style")
    file = tmp_path / "lora" / "my style.safetensors"
    tensors = load_file(file)
    assert stems <= {key.partition(".")[0] for key in tensors}
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert header(file) == {
        "format": "pt",
        "ss_output_name": "my style",
        "ss_base_model_version": version,
        "ss_v2": v2,
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "3",
    }


def test_magnitudes_in_the_shape_of_lycoris(parts, tmp_path):
    """One for each output, as weight.norm over all other axes keeps them; for readers that broadcast."""
    added = add_lora(parts, **SMALL, conv=True, use_dora=True)
    save_lora(added, tmp_path / "lora", "style")
    weights = {f"lora_unet_{path.replace('.', '_')}": m for path, m in parts.unet.named_modules()}
    scales = {k: v for k, v in load_file(tmp_path / "lora/style.safetensors").items() if "dora_scale" in k}
    assert len(scales) == len(layers(added.unet))
    for key, scale in scales.items():
        weight = weights[key.removesuffix(".dora_scale")].weight
        norm = torch.linalg.vector_norm(weight, dim=list(range(1, weight.ndim)), keepdim=True)
        assert scale.shape == norm.shape
        assert torch.allclose(scale, norm)


def test_dtype_of_files(parts, tmp_path):
    save_lora(add_lora(parts, rank=2, alpha=0.3, use_dora=True), tmp_path / "lora", "style", torch.bfloat16)
    for file in ("style", "pytorch_lora_weights"):
        for key, tensor in load_file(tmp_path / "lora" / f"{file}.safetensors").items():
            whole = key.endswith(("alpha", "dora_scale", "lora_magnitude_vector"))
            assert tensor.dtype == (torch.float32 if whole else torch.bfloat16)


def test_nan_is_not_saved_and_the_last_file_stays(parts, tmp_path):
    added = add_lora(parts, **SMALL)
    save_lora(added, tmp_path / "lora", "style")
    digest = read_lora(tmp_path / "lora").sha256
    with torch.no_grad():
        next(p for p in wanting(added.unet).values()).view(-1)[0] = torch.nan
    with pytest.raises(UserError, match=r"LoRA of unet\.down_blocks\.0.* has NaN or Inf"):
        save_lora(added, tmp_path / "lora", "style")
    assert read_lora(tmp_path / "lora").sha256 == digest
    assert sorted(os.listdir(tmp_path)) == ["lora"]
    assert sorted(os.listdir(tmp_path / "lora")) == ["pytorch_lora_weights.safetensors", "style.safetensors"]


@pytest.mark.parametrize("name", ["", "pytorch_lora_weights", "a/b"])
def test_names_that_no_file_can_have(parts, tmp_path, name):
    with pytest.raises(UserError, match="cannot be called"):
        save_lora(add_lora(parts, **SMALL), tmp_path / "lora", name)
    assert not (tmp_path / "lora").exists()
