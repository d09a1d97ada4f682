"""FreeU against diffusers, and without a trace where it is not asked for."""

import pytest
import torch
from conftest import relative_error
from diffusers.utils.torch_utils import fourier_filter

from ldm.models import build
from ldm.models.attention import Context
from ldm.models.freeu import FreeU, low_frequencies

ASKED = FreeU(b1=1.3, b2=1.4, s1=0.9, s2=0.2)


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (2, 6), (1, 3), (1, 1)])
def test_the_filter_is_diffusers(size):
    x = torch.randn(2, 3, *size)
    assert torch.allclose(low_frequencies(x, 0.2), fourier_filter(x, threshold=1, scale=0.2), atol=1e-6)
    assert low_frequencies(x.bfloat16(), 0.2).dtype is torch.bfloat16


def test_a_unet_with_it_is_diffusers_and_without_it_what_it_was(reference_unet):
    theirs = reference_unet()
    ours = build({"_class_name": "UNet2DConditionModel"} | dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, tokens = torch.randn(2, 4, 12, 8), torch.tensor([700, 3]), torch.randn(2, 5, 24)
    with torch.no_grad():
        plain = theirs(x, t, tokens).sample
        theirs.enable_freeu(s1=ASKED.s1, s2=ASKED.s2, b1=ASKED.b1, b2=ASKED.b2)
        freed = theirs(x, t, tokens).sample
        mine = ours(x, t, Context(tokens, freeu=ASKED))
        assert relative_error(mine, freed) < 1e-5
        assert relative_error(ours(x, t, tokens), plain) < 1e-5
        assert relative_error(plain, freed) > 1e-2
        whole, deep = ours.from_deep(x, t, Context(tokens, freeu=ASKED), 0)
        assert torch.equal(whole, mine)
        again, _ = ours.from_deep(x, t, Context(tokens, freeu=ASKED), 0, deep)
        assert torch.allclose(again, mine, atol=1e-6)
        one = ours(x[1:], t[1:], Context(tokens[1:], freeu=ASKED))
        assert torch.allclose(one, mine[1:], atol=1e-5)
