"""CLIP's text encoder against transformers' own, on the same random weights."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_pipeline import randomise

from ldm.checkpoint.clip import make_text_encoder
from ldm.checkpoint.peers import text_encoder_of
from ldm.errors import UserError
from ldm.models.clip import CLIPTextConfig, CLIPTextModel

SIZES = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 80, "projection_dim": 20}
SIZES |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 16}
IDS = {"bos_token_id": 50, "eos_token_id": 51, "pad_token_id": 0}
END = 51


def both(name="CLIPTextModelWithProjection", dtype=torch.float32, **config):
    config = transformers.CLIPTextConfig(**{**SIZES, **IDS, **config})
    theirs = randomise(getattr(transformers, name)(config)).to(dtype)
    return text_encoder_of(theirs).eval(), theirs


def texts(rows, length):
    """Ids with an end somewhere and, after it, another end and a higher id."""
    ids = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(length))
    for row, end in zip(ids, range(length - 1, -1, -2), strict=False):
        row[end:] = END
        row[end + 1 : end + 2] = 55
    return ids


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("end", [END, 2])
def test_all_states_are_those_of_transformers(activation, length, end):
    ours, theirs = both(hidden_act=activation, eos_token_id=end, layer_norm_eps=1e-3)
    ids = texts(3, length)
    mine, wanted = ours(ids), theirs(ids, output_hidden_states=True)
    assert len(mine.hidden_states) == len(wanted.hidden_states) == 4
    for a, b in zip(mine.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.last_hidden_state, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.text_embeds, wanted.text_embeds, rtol=1e-5, atol=1e-5)
    for k in range(2):  # by place, as scripts for diffusers take them
        torch.testing.assert_close(mine[k], wanted[k], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("end", [END, 2])
def test_without_a_projection_the_pooled_text_is_that_at_the_end(end):
    ours, theirs = both("CLIPTextModel", eos_token_id=end)
    ids = texts(4, 9)
    assert ours(ids).text_embeds is None
    torch.testing.assert_close(ours(ids)[0], theirs(ids)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(ids).pooler_output, theirs(ids).pooler_output, rtol=1e-5, atol=1e-5)
    at = ids.argmax(1) if end == 2 else (ids == end).int().argmax(1)
    assert torch.equal(ours(ids).pooler_output, ours(ids).last_hidden_state[range(4), at])


@torch.no_grad()
def test_bf16_is_as_far_from_fp32_as_transformers_is():
    ours, theirs = both(dtype=torch.bfloat16)
    exact, ids = both()[0], texts(3, 16)
    wanted = exact(ids).last_hidden_state
    errors = [(model(ids).last_hidden_state.float() - wanted).norm() for model in (ours, theirs)]
    assert errors[0] < 1.2 * errors[1] < 0.05 * wanted.norm()


def test_gradients_are_those_of_transformers():
    """Attention goes another way where a gradient is wanted."""
    ours, theirs = both()
    theirs = theirs.train()
    ours = make_text_encoder(
        theirs.config.to_dict() | {"architectures": ["CLIPTextModelWithProjection"]},
        {name: tensor.clone() for name, tensor in theirs.state_dict().items()},
        Path("model"),
    ).train()
    ids = texts(3, 16)
    for model in (ours, theirs):
        out = model(ids)
        (out.last_hidden_state.square().mean() + out.text_embeds.square().mean()).backward()
    wanted = {name: tensor.grad for name, tensor in theirs.named_parameters()}
    largest = max(each.norm() for each in wanted.values())
    for name, tensor in ours.named_parameters():  # those of keys' biases are 0 but for rounding
        assert (tensor.grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-6 * largest, name


@torch.no_grad()
def test_what_comes_later_changes_nothing_before():
    ours, _ = both()
    ids = texts(2, 16)
    changed = ids.clone()
    changed[:, 9:] = 3
    one, other = (ours(each).last_hidden_state for each in (ids, changed))
    torch.testing.assert_close(one[:, :9], other[:, :9])
    assert not torch.allclose(one[:, 9:], other[:, 9:])


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_a_config_written_and_read_again_is_the_same(name):
    ours, theirs = both(name, hidden_act="gelu", eos_token_id=2)
    config = ours.to_config()
    assert CLIPTextModel.from_config(config).config == ours.config
    again = transformers.CLIPTextConfig.from_dict(config)
    assert {key: getattr(again, key) for key in config} == {
        key: getattr(theirs.config, key) for key in config if key != "architectures"
    } | {"architectures": [name]}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is not allowed"),
        ({"num_attention_heads": 5}, "cannot be shared out among num_attention_heads = 5"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"architectures": ["BertModel"]}, "a BertModel"),
    ],
)
def test_configs_that_cannot_be(config, words):
    with pytest.raises(UserError, match=words):
        CLIPTextModel.from_config(SIZES | config)


def test_keys_of_other_models_are_passed_over():
    config = CLIPTextModel.from_config({"dtype": "float32", "temperature": 1.0, "dropout": 0.0}).config
    assert config == CLIPTextConfig()
