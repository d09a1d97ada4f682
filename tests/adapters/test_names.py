"""Spellings of layers, on the real shapes of SD 1.5 and SDXL (modules without memory)."""

import re
from types import SimpleNamespace

import pytest
import torch

from ldm.adapters import names as table
from ldm.adapters.names import find_layers, list_layers, name_layers, other_kind, split_name, split_word
from ldm.models import UNet
from ldm.models.clip import CLIPTextConfig, CLIPTextModel

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
    wide = CLIPTextConfig(
        hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, projects=True
    )
    with torch.device("meta"):
        return SimpleNamespace(
            unet=UNet.from_config(XL),
            text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12)),
            text_encoder_2=CLIPTextModel(wide),
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
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out": (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ),
    "lycoris_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (
        "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    ),
    "model.diffusion_model.middle_block.1.proj_in": "unet.mid_block.attentions.0.proj_in",
    "diffusion_model.input_blocks.1.0.in_layers.0": "unet.down_blocks.0.resnets.0.norm1",
    "lora_unet_out_0": "unet.conv_norm_out",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm2": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.norm2"
    ),
    "lora_te_text_model_final_layer_norm": "text_encoder.final_layer_norm",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.2.layer_norm1": (
        "text_encoder.encoder.layers.2.layer_norm1"
    ),
    "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1": (
        "text_encoder.encoder.layers.2.mlp.fc1"
    ),
    "base_model.model.text_model.encoder.layers.2.mlp.fc1": "text_encoder.encoder.layers.2.mlp.fc1",
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


REFINER_NAMES = {
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": "text_encoder_2.encoder.layers.0.mlp.fc1",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": "text_encoder_2.encoder.layers.0.mlp.fc1",
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2.encoder.layers.0.mlp.fc1",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2.encoder.layers.0.mlp.fc1",
    "text_encoder.text_projection": "text_encoder_2.text_projection",
}
MORE = ["text_encoders.clip_g.transformer.text_projection", "lora_unet_nothing", "nothing"]
ENDINGS = [".lora_A.weight", ".lora_B", ".lora_A.default_0.weight", ".lora.down.weight", "_lora.up.weight"]
ENDINGS += ["_lora.alpha", ".alpha", ".lora_B.bias", ".diff", ".diff_b", ".w_norm", ".lokr_w2_b", ".lokr_w2"]


@pytest.fixture(scope="module")
def refiner(xl):
    return SimpleNamespace(unet=xl.unet, text_encoder=None, text_encoder_2=xl.text_encoder_2)


@pytest.mark.parametrize(
    ("family", "names"), [("sd1", SD1_NAMES), ("xl", XL_NAMES), ("refiner", REFINER_NAMES)]
)
def test_spellings(family, names, request):
    spelt = find_layers(request.getfixturevalue(family), names)
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
    for part, names in name_layers(parts).items():
        assert set(names.values()) == {layer for layer in layers if layer.part == part}
        for prefix in table.PREFIXES[part]:
            spelt = {prefix + name: layer for name, layer in names.items()}
            assert find_layers(parts, spelt) == spelt


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_the_order_of_the_tables_means_nothing(family, request, monkeypatch):
    """Each name is read in one way only: by tables turned round it is read the same."""
    parts = request.getfixturevalue(family)
    stems = [*SD1_NAMES, *XL_NAMES, *MORE]
    found = find_layers(parts, stems)
    names = [f"{stem}{ending}" for stem in stems for ending in ENDINGS]
    split = [split_name(name) for name in names]
    turned = {part: tuple(reversed(prefixes)) for part, prefixes in reversed(table.PREFIXES.items())}
    monkeypatch.setattr(table, "PREFIXES", turned)
    called = "|".join(map(re.escape, table.ROLES))
    backwards = "|".join(map(re.escape, reversed(table.ROLES)))
    monkeypatch.setattr(table, "_NAME", re.compile(table._NAME.pattern.replace(called, backwards)))
    assert find_layers(parts, stems) == found
    assert [split_name(name) for name in names] == split
    assert None not in split


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
        ("a.processor.to_q_lora.alpha", "a.processor.to_q", "alpha"),
        ("a.to_q.lora_A", "a.to_q", "down"),
        ("a.to_out.lora.up.weight", "a.to_out", "up"),
        ("lora_unet_a.diff", "lora_unet_a", "diff"),
        ("lora_unet_a.w_norm", "lora_unet_a", "diff"),
        ("lora_unet_a.b_norm", "lora_unet_a", "diff_b"),
        ("lora_unet_a.diff_b", "lora_unet_a", "diff_b"),
        ("a.lora_B.bias", "a", "up_bias"),
        ("lora_unet_a.lora_up.bias", "lora_unet_a", "up_bias"),
    ],
)
def test_roles(name, stem, role):
    assert split_name(name) == (stem, role, None)


@pytest.mark.parametrize(
    ("name", "role", "adapter"),
    [
        ("a.to_q.lora_A.default.weight", "down", "default"),
        ("a.to_q.lora_B.default_0.bias", "up_bias", "default_0"),
        ("a.to_q.lora_magnitude_vector.style.weight", "magnitude", "style"),
        ("a.to_q.hada_w1_a.default", "hada_w1_a", "default"),
    ],
)
def test_the_name_of_pefts_adapter(name, role, adapter):
    assert split_name(name) == ("a.to_q", role, adapter)


@pytest.mark.parametrize(
    "name", ["a.weight", "emb_params", "lora_unet_a_diff", "a.lora_A.bias", "alpha", "a.alphas_cumprod"]
)
def test_no_role(name):
    assert split_name(name) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_a.a1.weight", "GLoRA"),
        ("lora_unet_a.oft_blocks", "OFT or BOFT"),
        ("lora_unet_a.on_input", "(IA)3"),
        ("base_model.model.a.vera_lambda_b.default", "VeRA"),
        ("a.lora_embedding_A.default", "a LoRA of token embeddings"),
        ("a.weight", None),
    ],
)
def test_other_kinds_have_names(name, kind):
    assert other_kind(["x", name]) == kind


def test_bundled_words():
    assert split_word("bundle_emb.<my.cat>.string_to_param.*") == ("<my.cat>", "string_to_param.*")
    assert split_word("bundle_emb.cat.clip_g") == ("cat", "clip_g")
    assert split_word("bundle_emb.cat.clip_g_out") is None
