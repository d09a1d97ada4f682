"""The U-Net against diffusers' UNet2DConditionModel on the same weights."""

import pytest
import torch
from conftest import relative_error
from diffusers import UNet2DConditionModel

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
    theirs = dict(reference.named_parameters())
    largest = max(p.grad.abs().max() for p in theirs.values())
    for name, p in ours.named_parameters():
        error = (p.grad - theirs[name].grad).abs().max()
        # Gradients that should be zero (a bias before a norm) are rounding errors: relative to the largest.
        assert error <= 1e-4 * theirs[name].grad.abs().max() + 1e-6 * largest, name


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


def test_full_size_of_stable_diffusion_1_equals_diffusers():
    """860 million parameters on a small latent; both models share one set of tensors."""
    sd1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        reference, ours = UNet2DConditionModel(**sd1), UNet.from_config(sd1)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(2**20, generator=generator)
    # Drawing 860 million normals would take longer than the test: tensors repeat one million of them.
    state = {
        name: pool.repeat(p.numel() // len(pool) + 1)[: p.numel()].view(p.shape) / p[0].numel() ** 0.5
        if p.ndim > 1
        else pool[: p.numel()] * 0.2 + ("norm" in name and name.endswith("weight"))
        for name, p in reference.state_dict().items()
    }
    reference.load_state_dict(state, assign=True)
    ours.load_state_dict(state, assign=True)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 768)
    with torch.no_grad():
        expected = reference.eval()(x, torch.tensor([500]), context).sample
        assert relative_error(ours.eval()(x, torch.tensor([500]), context), expected) < 1e-5
