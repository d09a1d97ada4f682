"""The arithmetic of a merge, and the blocks of published U-Nets by a table that was written by hand."""

import re

import pytest
import torch

from ldm.checkpoint.keymap import unet_keys
from ldm.checkpoint.merge.mixing import Mix, block_names, blocks_of, make_mix, weighted_sum
from ldm.errors import UserError
from ldm.models import UNet
from ldm.models.config import UNetConfig

SD = [*(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))]
SDXL = [*(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9))]
XL = UNetConfig(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
# By diffusers' names, from openaimodel.py: a level is two blocks and a downsampling, or three blocks.
BY_HAND = {
    "SD": {
        "conv_in.weight": "IN00",
        "time_embedding.linear_1.weight": "IN00",
        "down_blocks.0.resnets.0.conv1.weight": "IN01",
        "down_blocks.0.attentions.1.proj_in.weight": "IN02",
        "down_blocks.0.downsamplers.0.conv.weight": "IN03",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": "IN04",
        "down_blocks.1.resnets.1.norm1.bias": "IN05",
        "down_blocks.1.downsamplers.0.conv.bias": "IN06",
        "down_blocks.2.resnets.0.time_emb_proj.weight": "IN07",
        "down_blocks.2.attentions.1.norm.weight": "IN08",
        "down_blocks.2.downsamplers.0.conv.weight": "IN09",
        "down_blocks.3.resnets.0.conv2.weight": "IN10",
        "down_blocks.3.resnets.1.conv2.weight": "IN11",
        "mid_block.resnets.0.conv1.weight": "M00",
        "mid_block.attentions.0.proj_out.weight": "M00",
        "mid_block.resnets.1.conv1.weight": "M00",
        "up_blocks.0.resnets.0.conv_shortcut.weight": "OUT00",
        "up_blocks.0.resnets.2.conv1.weight": "OUT02",
        "up_blocks.0.upsamplers.0.conv.weight": "OUT02",
        "up_blocks.1.attentions.0.proj_in.weight": "OUT03",
        "up_blocks.1.resnets.1.conv1.weight": "OUT04",
        "up_blocks.1.upsamplers.0.conv.weight": "OUT05",
        "up_blocks.2.attentions.0.proj_in.weight": "OUT06",
        "up_blocks.2.upsamplers.0.conv.bias": "OUT08",
        "up_blocks.3.resnets.0.conv1.weight": "OUT09",
        "up_blocks.3.attentions.2.proj_out.weight": "OUT11",
        "conv_norm_out.weight": "OUT11",
        "conv_out.bias": "OUT11",
    },
    "SDXL": {
        "conv_in.bias": "IN00",
        "add_embedding.linear_1.weight": "BASE",
        "down_blocks.0.resnets.1.conv1.weight": "IN02",
        "down_blocks.0.downsamplers.0.conv.weight": "IN03",
        "down_blocks.1.attentions.0.transformer_blocks.1.norm1.weight": "IN04",
        "down_blocks.1.downsamplers.0.conv.weight": "IN06",
        "down_blocks.2.attentions.0.transformer_blocks.9.norm1.weight": "IN07",
        "down_blocks.2.resnets.1.conv1.weight": "IN08",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2.bias": "M00",
        "up_blocks.0.attentions.1.transformer_blocks.9.norm1.weight": "OUT01",
        "up_blocks.0.upsamplers.0.conv.weight": "OUT02",
        "up_blocks.1.attentions.0.proj_in.weight": "OUT03",
        "up_blocks.1.upsamplers.0.conv.weight": "OUT05",
        "up_blocks.2.resnets.0.conv1.weight": "OUT06",
        "up_blocks.2.resnets.2.conv1.weight": "OUT08",
        "conv_out.weight": "OUT08",
    },
}


def names_of(config):
    with torch.device("meta"):
        return list(UNet(config).state_dict())


@pytest.mark.parametrize("family", ["SD", "SDXL"])
def test_blocks_of_published_models(family):
    config, blocks = (UNetConfig(), SD) if family == "SD" else (XL, SDXL)
    assert block_names(config) == blocks
    found = blocks_of(config, names_of(config))
    assert {name: found[name] for name in BY_HAND[family]} == BY_HAND[family]
    assert {*found.values()} == {*blocks} | ({"BASE"} if family == "SDXL" else set())


def test_blocks_count_as_names_in_files_do():
    """input_blocks.4.1.proj_in.weight is of IN04, in every tensor."""
    for config in (UNetConfig(), XL):
        names = names_of(config)
        found = blocks_of(config, names)
        for key in unet_keys(config, names):
            if match := re.match(r"(in|out)put_blocks\.(\d+)\.", key.original):
                assert found[key.names[0]] == f"{match[1].upper()}{int(match[2]):02}"


def test_the_embedded_models_blocks_follow_from_its_config():
    config = UNetConfig(
        block_out_channels=(96, 160, 208),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        cross_attention_dim=256,
        attention_head_dim=(2, 4, 4),
    )
    found = blocks_of(config, names_of(config))
    assert block_names(config) == [*(f"IN{i:02}" for i in range(6)), "M00", *(f"OUT{i:02}" for i in range(6))]
    assert {*found.values()} == {"BASE", *block_names(config)}
    assert all(name.startswith("add_embedding.") for name, block in found.items() if block == "BASE")


def test_sums_in_fp32_of_any_dtype():
    tensors = [torch.randn(64, 64, dtype=torch.float64) for _ in range(3)]
    stored = [tensors[0].half(), tensors[1].bfloat16(), tensors[2].float()]
    weights = (0.7, -0.2, 0.5)
    mixed = Mix(weights)(stored, "BASE")
    exact = sum(w * x.double() for w, x in zip(weights, stored, strict=True))
    assert mixed.dtype is torch.float32
    assert (mixed - exact).abs().max() < 1e-6
    added = Mix(difference=0.6, blocks={"M00": 2.0})
    a, b, c = (x.double() for x in stored)
    assert (added(stored, "IN00") - (a + 0.6 * (b - c))).abs().max() < 1e-6
    assert (added(stored, "M00") - (a + 2.0 * (b - c))).abs().max() < 2e-6


def test_what_is_the_same_in_all_stays_as_it_is():
    x = torch.randn(1000)
    assert torch.equal(weighted_sum([x, x.clone(), x.clone()], (0.7, 0.2, 0.1)), x)
    assert torch.equal(Mix(difference=0.7)([x, x + 1, x + 1], "BASE"), x)
    y = torch.randn(1000)
    assert torch.equal(weighted_sum([x, y], (0.0, 1.0)), y)
    assert torch.equal(
        weighted_sum([torch.tensor([-0.0]), y[:1]], (1.0, 0.0)).signbit(), torch.tensor([True])
    )


def mix(count=2, weights=None, difference=None, blocks=None, unet=None):
    return make_mix(count, weights, difference, blocks, unet or UNetConfig())


def test_weights_as_people_give_them():
    assert mix(weights=[0.3]).weights == (0.7, 0.3)  # AUTOMATIC1111's multiplier
    assert mix(4).weights == (0.25,) * 4
    assert sum(mix(3, weights=[0.333] * 3).weights) == pytest.approx(1, abs=1e-15)
    assert mix(weights=[1.3, -0.3]).weights == (1.3, -0.3)
    listed = [i / 100 for i in range(25)]
    assert mix(weights=[0.5], blocks=listed).blocks == dict(zip(SD, listed, strict=True))
    with_base = mix(blocks=[0.9, *listed])
    assert with_base.weights == pytest.approx((0.1, 0.9))
    assert with_base.blocks == dict(zip(SD, listed, strict=True))
    assert mix(blocks={"base": 0.2, "out08": 1}, unet=XL).blocks == {"OUT08": 1}
    assert mix(3, difference=1.0, blocks={"M00": 0.0}).blocks == {"M00": 0.0}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weights": [0.7, 0.7]}, ("sum is 1.4", "in the same ratio: 0.5 0.5")),
        ({"weights": [0.0, 0.0]}, ("sum is 0",)),
        ({"weights": [float("nan"), 0.3]}, ("nan",)),
        ({"weights": [float("inf")]}, ("inf",)),
        ({"count": 3, "difference": float("nan")}, ("nan",)),
        ({"weights": [0.5], "blocks": {"M00": float("nan")}}, ("nan",)),
        ({"weights": [0.2, 0.3, 0.5]}, ("3 weights for 2 models",)),
        ({"count": 3, "weights": [0.5]}, ("1 weights for 3 models",)),
        ({"difference": 1.0}, ("takes three models",)),
        ({"count": 3, "difference": 1.0, "weights": [0.5]}, ("no weights but M",)),
        ({"count": 3, "weights": [0.2, 0.3, 0.5], "blocks": {"M00": 1}}, ("of the second of two models",)),
        ({"blocks": {"M00": 1}}, ("all else needs one weight",)),
        ({"weights": [0.5], "blocks": {"BASE": 1}}, ("all else needs one weight",)),
        ({"count": 3, "difference": 1.0, "blocks": {"BASE": 1}}, ("leave it out of the block weights",)),
        ({"weights": [0.5], "blocks": {"OUT09": 1}, "unet": XL}, ("no OUT09", "OUT00 to OUT08")),
        ({"blocks": [0.5] * 26, "unet": XL}, ("26 block weights", "19 blocks", "IN00 to IN08")),
    ],
)
def test_weights_that_make_no_merge(given, words):
    with pytest.raises(UserError) as caught:
        mix(**given)
    assert all(word in str(caught.value) for word in words), caught.value
