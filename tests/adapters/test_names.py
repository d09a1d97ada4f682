"""Spellings of layers, on the real shapes of SD 1.5 and SDXL (modules without memory)."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.adapters.names import list_layers, spell_layers, split_name
from ldm.models import UNet

SD1 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def sd1():
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12))
        return SimpleNamespace(unet=UNet.from_config(SD1), text_encoder=text, text_encoder_2=None)


@pytest.fixture(scope="module")
def xl():
    wide = CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
    with torch.device("meta"):
        return SimpleNamespace(
            unet=UNet.from_config(XL),
            text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12)),
            text_encoder_2=CLIPTextModelWithProjection(wide),
        )


# As files of the wild have them; the paths are diffusers' and transformers'.
SD1_NAMES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0": (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    ),
    "lora_unet_up_blocks_3_attentions_2_proj_in": "unet.up_blocks.3.attentions.2.proj_in",
    "lora_unet_down_blocks_2_downsamplers_0_conv": "unet.down_blocks.2.downsamplers.0.conv",
    "lora_unet_up_blocks_0_resnets_1_time_emb_proj": "unet.up_blocks.0.resnets.1.time_emb_proj",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_ff_net_0_proj": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
    ),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out": (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ),
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k": (
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    ),
    "base_model.model.conv_in": "unet.conv_in",
    "lora_te_text_model_encoder_layers_11_mlp_fc1": "text_encoder.encoder.layers.11.mlp.fc1",
    "text_encoder.text_model.encoder.layers.3.self_attn.to_out": (
        "text_encoder.encoder.layers.3.self_attn.out_proj"
    ),
    "text_encoder.encoder.layers.3.self_attn.q_proj": "text_encoder.encoder.layers.3.self_attn.q_proj",
}
XL_NAMES = {
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_v": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v"
    ),
    "lora_unet_input_blocks_8_1_proj_out": "unet.down_blocks.2.attentions.1.proj_out",
    "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_out_0": (
        "unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_out.0"
    ),
    "lora_unet_output_blocks_5_1_transformer_blocks_0_ff_net_2": (
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2"
    ),
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_input_blocks_0_0": "unet.conv_in",
    "lora_unet_out_2": "unet.conv_out",
    "lora_unet_label_emb_0_0": "unet.add_embedding.linear_1",
    "lora_unet_time_embed_2": "unet.time_embedding.linear_2",
    "lora_te1_text_model_encoder_layers_0_self_attn_k_proj": (
        "text_encoder.encoder.layers.0.self_attn.k_proj"
    ),
    "lora_te2_text_model_encoder_layers_31_mlp_fc2": "text_encoder_2.encoder.layers.31.mlp.fc2",
    "lora_te2_text_projection": "text_encoder_2.text_projection",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": "text_encoder_2.encoder.layers.0.mlp.fc1",
}


@pytest.mark.parametrize(("family", "names"), [("sd1", SD1_NAMES), ("xl", XL_NAMES)])
def test_spellings(family, names, request):
    spelt = spell_layers(request.getfixturevalue(family))
    # transformers before 5.6 keeps the layers of a CLIPTextModel in an inner module.
    found = {stem: str(spelt[stem]).replace("text_model.", "") for stem in names}
    assert found == names


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_no_spelling_means_two_layers(family, request):
    """Underscores could make two names one: in these models they do not."""
    parts = request.getfixturevalue(family)
    layers = list_layers(parts)
    flat = {f"{layer.part} {layer.path}".replace(".", "_") for layer in layers}
    assert len(flat) == len(layers)
    assert set(spell_layers(parts).values()) == set(layers)


@pytest.mark.parametrize(
    ("name", "stem", "role"),
    [
        ("a.to_q.lora_A.weight", "a.to_q", "down"),
        ("a.to_q.lora.up.weight", "a.to_q", "up"),
        ("a.processor.to_q_lora.down.weight", "a.processor.to_q", "down"),
        ("lora_te_a_mlp_fc1.lora_mid.weight", "lora_te_a_mlp_fc1", "mid"),
        ("a.fc1.lora_linear_layer.up.weight", "a.fc1", "up"),
        ("lora_unet_a.alpha", "lora_unet_a", "alpha"),
        ("lora_unet_a.lokr_w2_b", "lora_unet_a", "lokr_w2_b"),
        ("a.lora_magnitude_vector", "a", "magnitude"),
    ],
)
def test_roles(name, stem, role):
    assert split_name(name) == (stem, role)


@pytest.mark.parametrize("name", ["a.weight", "emb_params", "lora_unet_a.diff", "a.lora_B.bias"])
def test_no_role(name):
    assert split_name(name) is None
