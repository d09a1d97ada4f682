"""ControlNets and T2I-Adapters against diffusers' modules on the same weights."""

from dataclasses import replace

import diffusers
import pytest
import torch
from conftest import randomise_, relative_error

from ldm.errors import UserError
from ldm.models import ControlNet, ControlNetUnion, T2IAdapter, UNet, build

SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
HINT = {"conditioning_embedding_out_channels": (4, 8, 8, 8)}
XL = SMALL | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
}
UNION = XL | {"num_control_type": 8, "num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}


def pair(reference, ours):
    """A diffusers module with random weights, and ours with the same."""
    randomise_(reference.eval())
    made = build({"_class_name": type(reference).__name__} | dict(reference.config))
    assert isinstance(made, ours)
    made.load_state_dict(reference.state_dict(), strict=True)
    return reference, made.eval()


def assert_same(found, expected):
    down, mid = expected
    assert len(found.skips) == len(down)
    for a, b in zip((*found.skips, found.middle), (*down, mid), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_pool_conditions": True},
        {"controlnet_conditioning_channel_order": "bgr", "conditioning_channels": 3},
        {"mid_block_type": "UNetMidBlock2D", "down_block_types": ("DownBlock2D",) * 2},
    ],
    ids=["plain", "pooled", "bgr", "without attention"],
)
def test_a_controlnet_equals_diffusers(changes):
    theirs, ours = pair(diffusers.ControlNetModel(**SMALL | HINT | changes), ControlNet)
    x, t, context = torch.randn(2, 4, 8, 12), torch.tensor([3.25, 981.0]), torch.randn(2, 7, 24)
    picture = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert_same(ours(x, t, context, picture), theirs(x, t, context, picture, return_dict=False))
        some = ours(x, t, context, hint=ours.hint(picture), outputs=2)
        whole = ours(x, t, context, picture)
    assert some.middle is None
    assert all(torch.equal(a, b) for a, b in zip(some.skips, whole.skips[:2], strict=True))


def test_a_controlnet_of_xl_equals_diffusers():
    theirs, ours = pair(diffusers.ControlNetModel(**XL | HINT), ControlNet)
    x, context, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24), torch.rand(2, 3, 64, 64)
    pooled, ids = torch.randn(2, 20), torch.randint(0, 99, (2, 6)).float()
    with torch.no_grad():
        expected = theirs(
            x,
            7,
            context,
            picture,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
            return_dict=False,
        )
        assert_same(ours(x, 7, context, picture, pooled=pooled, time_ids=ids), expected)


@pytest.mark.parametrize(("kinds", "scales"), [((3,), [1.0]), ((1, 6), [1.0, 1.0]), ((1, 6), [0.4, 0.9])])
def test_a_union_equals_diffusers(kinds, scales):
    """Of one picture, as rows of a batch mix in diffusers'."""
    theirs, ours = pair(diffusers.ControlNetUnionModel(**UNION | HINT), ControlNetUnion)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    pooled, ids = torch.randn(1, 20), torch.randint(0, 99, (1, 6)).float()
    pictures = [torch.rand(1, 3, 64, 64) for _ in kinds]
    there = torch.zeros(1, 8)
    there[:, list(kinds)] = 1
    with torch.no_grad():
        expected = theirs(
            x, 7, context, pictures, there, list(kinds), conditioning_scale=scales,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}, return_dict=False,
        )  # fmt: skip
        found = ours(x, 7, context, pictures, kinds, scales=scales, pooled=pooled, time_ids=ids)
    assert_same(found, expected)


def test_rows_of_a_union_do_not_know_each_other():
    _, ours = pair(diffusers.ControlNetUnionModel(**UNION | HINT), ControlNetUnion)
    x, context, pictures = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24), [torch.rand(1, 3, 64, 64)]
    pooled, ids = torch.randn(2, 20), torch.randint(0, 99, (2, 6)).float()
    with torch.no_grad():
        both = ours(x, 7, context, pictures, (2,), pooled=pooled, time_ids=ids)
        last = ours(x[1:], 7, context[1:], pictures, (2,), pooled=pooled[1:], time_ids=ids[1:])
    assert relative_error(both.middle[1:], last.middle) < 1e-5


@pytest.mark.parametrize("kind", ["full_adapter", "full_adapter_xl", "light_adapter"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_adapter_equals_diffusers(kind, channels):
    theirs, ours = pair(
        diffusers.T2IAdapter(channels, [8, 16, 24, 24], 2, 16 if "xl" in kind else 8, kind), T2IAdapter
    )
    picture = torch.rand(2, channels, 64, 96)
    with torch.no_grad():
        found, expected = ours(picture), theirs(picture)
    assert [each.shape[1] for each in found] == list(ours.config.features)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
FULL_XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 2816,
}
LIGHT = {"adapter_type": "light_adapter", "channels": [320, 640, 1280], "num_res_blocks": 4}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ControlNetModel", {}),
        ("ControlNetModel", SD2),
        ("ControlNetModel", FULL_XL),
        ("ControlNetUnionModel", FULL_XL),
        ("ControlNetUnionModel", FULL_XL | {"num_control_type": 8}),
        ("T2IAdapter", {}),
        ("T2IAdapter", LIGHT),
        ("T2IAdapter", {"adapter_type": "full_adapter_xl", "downscale_factor": 16}),
    ],
)
def test_full_size_names_and_shapes_are_diffusers(name, config):
    with torch.device("meta"):
        theirs = getattr(diffusers, name)(**config)
        ours = build({"_class_name": name} | dict(theirs.config))
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    again = ours.to_config()
    with torch.device("meta"):
        read = getattr(diffusers, name).from_config(again)
    assert read.config.keys() >= again.keys() - {"_class_name"}


def test_one_made_of_a_unet_changes_nothing_until_it_is_trained(reference_unet):
    unet = UNet.from_config(dict(reference_unet().config)).eval()
    made = ControlNet.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    x, context, picture = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 24), torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        residuals = made(x, 7, context, picture)
        assert torch.equal(unet(x, 7, context, residuals=residuals), unet(x, 7, context))
    theirs = diffusers.ControlNetModel.from_config(made.to_config())
    theirs.load_state_dict(made.state_dict(), strict=True)
    assert torch.equal(
        made.down_blocks[0].resnets[0].conv1.weight, unet.down_blocks[0].resnets[0].conv1.weight
    )
    assert made.conv_in.weight.data_ptr() != unet.conv_in.weight.data_ptr()
    made(x, 7, context, picture).middle.sum().backward()
    assert made.controlnet_mid_block.weight.grad is not None


@pytest.mark.parametrize("size", [(16, 16), (9, 13)])
def test_residuals_of_all_kinds_are_added_as_in_diffusers(reference_unet, size):
    theirs = reference_unet()
    ours = UNet.from_config(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    control = ControlNet.from_unet(ours, conditioning_embedding_out_channels=(4, 8, 8, 8))
    randomise_(control)
    x, context, hint = torch.randn(2, 4, *size), torch.randn(2, 7, 24), torch.randn(1, 16, *size)
    levels, within = size, []
    for wide in theirs.config.block_out_channels:
        within.append(torch.randn(2, wide, *levels))
        levels = tuple((side + 1) // 2 for side in levels)
    with torch.no_grad():
        residuals = replace(control(x, 7, context, hint=hint), within=tuple(within))
        expected = theirs(
            x, 7, context, down_block_additional_residuals=residuals.skips,
            mid_block_additional_residual=residuals.middle,
            down_intrablock_additional_residuals=[each.clone() for each in within],
        ).sample  # fmt: skip
        assert relative_error(ours(x, 7, context, residuals=residuals), expected) < 1e-5
        whole, deep = ours.from_deep(x, 7, context, 1, residuals=residuals)
        assert torch.equal(whole, ours(x, 7, context, residuals=residuals))
        few = control(x, 7, context, hint=hint, outputs=2)
        again, _ = ours.from_deep(x, 7, context, 1, deep, residuals=replace(few, within=tuple(within)))
        assert relative_error(again, whole) < 1e-5


def test_what_no_control_has_is_refused_by_name():
    with pytest.raises(UserError, match="ControlNetModel config: unknown key sigmoid"):
        build({"_class_name": "ControlNetModel", "sigmoid": 1})
    with pytest.raises(UserError, match="encoder_hid_dim = 768 is not supported"):
        build({"_class_name": "ControlNetModel", "encoder_hid_dim": 768})
    with pytest.raises(UserError, match="adapter_type = 'other'"):
        build({"_class_name": "T2IAdapter", "adapter_type": "other"})
