"""Text encoders: made by us from stored tensors, against transformers' own."""

import pytest
from full_size import text_errors
from hub_configs import TEXT_ENCODERS


@pytest.mark.parametrize("config", TEXT_ENCODERS.values(), ids=TEXT_ENCODERS)
def test_every_text_encoder_equals_transformers(config):
    """The real config but 16 times narrower."""
    narrow = {key: config[key] // 16 for key in ("hidden_size", "intermediate_size", "vocab_size")}
    errors = text_errors(config | narrow | {"num_attention_heads": 4, "projection_dim": 20})
    assert max(errors.values()) < 1e-5, errors


def test_full_size_of_stable_diffusion_1_equals_transformers():
    errors = text_errors(TEXT_ENCODERS["clip_l"])
    assert max(errors.values()) < 1e-5, errors
