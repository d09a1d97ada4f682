"""The U-Net against diffusers' UNet2DConditionModel on the same weights."""

import pytest
import torch
from conftest import randomise_, relative_error
from diffusers import UNet2DConditionModel
from full_size import unet_errors, unet_inputs
from hub_configs import UNETS

from ldm.models import UNet, build

TWO_LEVELS = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": (2, 4),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
}
CONFIGS = {
    "sd1": {},
    "linear, one layer": {"use_linear_projection": True, "layers_per_block": 1},
    "two levels, pooled text": TWO_LEVELS,
    "level by level": {
        "layers_per_block": [1, 2, 1, 2],
        "attention_head_dim": [2, 4, 8, 4],
        "transformer_layers_per_block": [1, 2, 1, 3],
        "cross_attention_dim": [24, 24, 24, 24],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "everything else": {
        "in_channels": 9,
        "out_channels": 3,
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "mid_block_scale_factor": 1.7,
        "norm_eps": 1e-3,
        "time_embedding_dim": 48,
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "attention_head_dim": 3,
    },
}


def ours_like(reference):
    """Our U-Net with the config and the weights of a diffusers one; loading is strict both ways."""
    model = build({"_class_name": "UNet2DConditionModel"} | dict(reference.config))
    model.load_state_dict(reference.state_dict(), strict=True)
    return model.eval()


def assert_same_gradients(ours, reference):
    theirs = dict(reference.named_parameters())
    largest = max(p.grad.abs().max() for p in theirs.values())
    for name, p in ours.named_parameters():
        error = (p.grad - theirs[name].grad).abs().max()
        # Gradients that should be zero (a bias before a norm) are rounding errors: relative to the largest.
        assert error <= 1e-4 * theirs[name].grad.abs().max() + 1e-6 * largest, name


def inputs(channels=4, height=16, width=16):
    return torch.randn(2, channels, height, width), torch.tensor([3.25, 981.0]), torch.randn(2, 7, 24)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_diffusers(reference_unet, changes):
    reference = reference_unet(**changes)
    ours = ours_like(reference)
    assert set(ours.state_dict()) == set(reference.state_dict())
    x, t, context = inputs(reference.config.in_channels)
    with torch.no_grad():
        assert relative_error(ours(x, t, context), reference(x, t, context).sample) < 1e-5


@pytest.mark.parametrize("size", [(9, 13), (8, 20), (15, 24)])
def test_odd_sizes_equal_diffusers(reference_unet, size):
    reference = reference_unet()
    x, t, context = inputs(4, *size)
    with torch.no_grad():
        assert relative_error(ours_like(reference)(x, t, context), reference(x, t, context).sample) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("changes", [{}, TWO_LEVELS], ids=["sd1", "two levels"])
def test_gradients_equal_diffusers(reference_unet, changes, layout):
    """Also where attention goes the plain way, which it does on CPU when a gradient is wanted."""
    reference = reference_unet(**changes)
    ours = ours_like(reference).to(memory_format=layout)
    x, t, context = inputs()
    ours(x.to(memory_format=layout), t, context).square().mean().backward()
    reference(x, t, context).sample.square().mean().backward()
    assert_same_gradients(ours, reference)


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7, 7])])
def test_every_form_of_timestep(reference_unet, timestep):
    reference = reference_unet()
    x, _, context = inputs()
    with torch.no_grad():
        expected = reference(x, torch.tensor([7, 7]), context).sample
        assert relative_error(ours_like(reference)(x, timestep, context), expected) < 1e-5


def test_bf16_stays_near_fp32(reference_unet):
    """The network runs wholly in bf16, in either layout; the angles of timesteps stay in fp32."""
    reference = reference_unet()
    x, t, context = inputs()
    with torch.no_grad():
        expected = reference(x, t, context).sample
        for layout in (torch.contiguous_format, torch.channels_last):
            half = ours_like(reference).to(torch.bfloat16).to(memory_format=layout)
            out = half(x.bfloat16().to(memory_format=layout), t, context.bfloat16())
            assert out.dtype == torch.bfloat16
            assert relative_error(out.float(), expected) < 0.05


def test_built_without_memory_then_given_tensors(reference_unet):
    reference = reference_unet(**TWO_LEVELS)
    with torch.device("meta"):
        ours = UNet.from_config(dict(reference.config))
    assert all(p.is_meta for p in ours.parameters())
    ours.load_state_dict(reference.state_dict(), assign=True)
    x, t, context = inputs()
    with torch.no_grad():
        assert relative_error(ours(x, t, context), reference(x, t, context).sample) < 1e-5


def test_what_we_save_opens_in_diffusers(reference_unet):
    reference = reference_unet(**CONFIGS["everything else"])
    ours = ours_like(reference)
    again = UNet2DConditionModel.from_config(ours.to_config())
    again.load_state_dict(ours.state_dict())
    x, t, context = inputs(9)
    with torch.no_grad():
        assert torch.equal(again.eval()(x, t, context).sample, reference(x, t, context).sample)
    assert build(ours.to_config()).config == ours.config


def shrunk(config):
    """A hub config with everything kept but the widths, which are 16 and 32 times narrower."""
    narrow = {"block_out_channels": [c // 16 for c in config["block_out_channels"]], "norm_num_groups": 4}
    for key in ("cross_attention_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if config.get(key):
            narrow[key] = config[key] // 32
    return config | narrow


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", UNETS)
def test_every_family_equals_diffusers(family):
    """The real config but narrower, told all that it takes beside the text, on an odd size; gradients too."""
    config = shrunk(UNETS[family])
    reference = randomise_(UNet2DConditionModel.from_config(config))
    ours = build(config)
    ours.load_state_dict(reference.state_dict(), strict=True)
    both, ours_only, theirs_only = unet_inputs(config, 2, 13, 10)
    with torch.no_grad():
        expected = reference(*both, **theirs_only).sample
        assert relative_error(ours(*both, **ours_only), expected) < 1e-5
    ours(*both, **ours_only).square().mean().backward()
    reference(*both, **theirs_only).sample.square().mean().backward()
    assert_same_gradients(ours, reference)


CLASS_LABELS = {
    "timestep": torch.tensor([7.0, 250.0]),
    "projection": torch.randn(2, 12),
    "simple_projection": torch.randn(2, 12),
    "identity": torch.randn(2, 64),
}


@pytest.mark.parametrize("kind", CLASS_LABELS)
def test_class_embeddings_equal_diffusers(reference_unet, kind):
    reference = reference_unet(class_embed_type=kind, projection_class_embeddings_input_dim=12)
    x, t, context = inputs()
    labels = CLASS_LABELS[kind]
    with torch.no_grad():
        expected = reference(x, t, context, class_labels=labels).sample
        assert relative_error(ours_like(reference)(x, t, context, class_labels=labels), expected) < 1e-5


@pytest.mark.parametrize(
    ("family", "name", "value"), [("upscaler", "class_labels", 351.0), ("sdxl", "time_ids", 1023.0)]
)
def test_labels_and_sizes_stay_exact_in_bf16(family, name, value):
    """bf16 has no 351 and no 1023: they are not rounded to 352 and 1024."""
    config = shrunk(UNETS[family])
    model = randomise_(build(config)).to(torch.bfloat16)
    (x, t, context), told, _ = unet_inputs(config, 1, 8, 8)
    told = {key: tensor.bfloat16() for key, tensor in told.items()}
    with torch.no_grad():
        outs = [
            model(x.bfloat16(), t, context.bfloat16(), **told | {name: torch.full(told[name].shape, number)})
            for number in (value, value + 1)
        ]
    assert not torch.equal(*outs)


def test_what_it_is_told_must_be_what_it_takes(reference_unet):
    x, t, context = inputs()
    pooled = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"takes \[\], was given \['pooled'\]"):
        ours_like(reference_unet())(x, t, context, pooled=pooled)
    model = UNet.from_config(shrunk(UNETS["sdxl"]))
    with pytest.raises(ValueError, match=r"takes \['pooled', 'time_ids'\], was given \['pooled'\]"):
        model(x, t, context, pooled=pooled)


PARAMETERS = {  # as published with the models, in millions
    "sd1": 859.5,
    "sd2_base": 865.9,
    "upscaler": 473.4,
    "sdxl": 2567.5,
    "refiner": 2259.5,
    "small_sd": 482.3,
    "tiny_sd": 323.4,
    "ssd_1b": 1331.3,
    "koala_700m": 782.8,
}


@pytest.mark.parametrize("family", PARAMETERS)
def test_full_size_has_the_known_number_of_parameters(family):
    with torch.device("meta"):
        model = UNet.from_config(UNETS[family])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[family], abs=0.05)


def test_full_size_of_stable_diffusion_1_equals_diffusers():
    """860 million parameters; `python tests/full_size.py` does the same for the others."""
    assert unet_errors(UNETS["sd1"], size=8)["out"] < 1e-5
