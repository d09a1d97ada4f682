"""Names both ways, in full; `tests/parity/test_single_file.py` checks them against the original modules."""

import pytest
import torch

from ldm.checkpoint.keymap import from_original, module_keys, text_keys, to_original, unet_modules
from ldm.checkpoint.original.detect import family_configs
from ldm.checkpoint.original.sections import TEXT
from ldm.errors import UserError
from ldm.models import build


def tiny(**changes):
    config = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return build({**config, **changes})


@pytest.mark.parametrize("family", TEXT)
def test_every_name_of_a_family_is_there_once_on_each_side(family):
    for part, config in family_configs(family).items():
        if part in ("unet", "vae"):
            with torch.device("meta"):
                module = build(config)
            keys = module_keys(module)
            assert {name for key in keys for name in key.names} == module.state_dict().keys()
        elif part in TEXT["sdxl"]:
            keys = [*text_keys(config, open_clip=True)]
        else:
            continue
        names = [name for key in keys for name in key.names]
        assert len({key.original for key in keys}) == len(keys)
        assert len({*names}) == len(names)


def test_known_names():
    """As they stand in v1-5-pruned-emaonly and sd_xl_base_1.0."""
    sd1 = build(family_configs("sd1")["unet"] | {"block_out_channels": [32, 64, 64, 64]})
    modules = unet_modules(sd1.config)
    assert modules["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert modules["down_blocks.3.resnets.1.conv1"] == "input_blocks.11.0.in_layers.2"
    assert modules["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert modules["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert modules["up_blocks.3.attentions.2"] == "output_blocks.11.1"
    assert modules["mid_block.resnets.1.time_emb_proj"] == "middle_block.2.emb_layers.1"


def test_renaming_and_back_gives_the_very_tensors():
    module = tiny()
    keys, tensors = module_keys(module), module.state_dict()
    back = from_original(keys, to_original(keys, tensors))
    assert back.keys() == tensors.keys()
    assert all(back[name].data_ptr() == tensors[name].data_ptr() for name in tensors)


def test_open_clip_stacks_and_transposes():
    config = {"num_hidden_layers": 1, "architectures": ["CLIPTextModelWithProjection"]}
    keys = text_keys(config, open_clip=True)
    names = [name for key in keys for name in key.names]
    tensors = {name: torch.randn(6, 4) for name in names}
    stored = to_original(keys, tensors)
    q, k, v = (tensors[f"text_model.encoder.layers.0.self_attn.{each}_proj.weight"] for each in "qkv")
    assert torch.equal(stored["transformer.resblocks.0.attn.in_proj_weight"], torch.cat([q, k, v]))
    assert torch.equal(stored["text_projection"], tensors["text_projection.weight"].T)
    back = from_original(keys, stored)
    assert all(torch.equal(back[name], tensors[name]) for name in names)


def test_attention_of_the_vae_is_a_convolution_in_files_and_may_be_linear():
    module = build({"_class_name": "AutoencoderKL", "block_out_channels": [8], "norm_num_groups": 4})
    keys, tensors = module_keys(module), module.state_dict()
    stored = to_original(keys, tensors)
    name = "encoder.mid.attn_1.q.weight"
    assert stored[name].shape == (8, 8, 1, 1)
    stored[name] = stored[name][:, :, 0, 0]
    back = from_original(keys, stored)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_what_has_no_name_is_refused_by_name():
    text = tiny(addition_embed_type="text", addition_embed_type_num_heads=2)
    with pytest.raises(
        UserError, match=r"add_embedding\.norm1\.weight has no name in the single-file layout"
    ):
        module_keys(text)
    taesd = {"_class_name": "AutoencoderTiny"}
    with pytest.raises(UserError, match="no AutoencoderTiny: save a folder"):
        module_keys(build(taesd))
