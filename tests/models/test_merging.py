"""Token merging, token by token in float64 as the paper tells it."""

import pytest
import torch
from torch.nn import functional as F

from ldm.models import attention
from ldm.models.attention import TransformerBlock
from ldm.models.merging import Merging, merged


def plain(attend, x, height, width, ratio):
    """One picture [N, C]: of each whole 2 x 2 the top left stays, the others go to the most similar ones."""
    at = [(i, j) for i in range(height) for j in range(width)]
    stays = [
        k for k, (i, j) in enumerate(at) if i % 2 == j % 2 == 0 and i < height // 2 * 2 and j < width // 2 * 2
    ]
    found = []
    for k in range(len(at)):
        if k not in stays:
            alike = [float(F.cosine_similarity(x[k], x[s], dim=0)) for s in stays]
            found.append((max(alike), k, stays[alike.index(max(alike))]))
    found.sort(reverse=True)
    goes = {k: to for _, k, to in found[: int(len(at) * ratio)]}
    groups = {k: [k] for k in range(len(at)) if k not in goes}
    for k, to in goes.items():
        groups[to].append(k)
    means = torch.stack([x[own].mean(dim=0) for own in groups.values()])
    answers = dict(zip(groups, attend(means[None])[0], strict=True))
    return torch.stack([answers[goes.get(k, k)] for k in range(len(at))]), len(groups)


def attend(x):
    q, k, v = ((x.roll(n, -1) * (n + 1))[:, None] for n in range(3))
    return attention.attend(q, k, v)[:, 0]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("size", [(4, 4), (6, 4), (5, 7)])
def test_equals_the_paper_token_by_token(size, ratio):
    x = torch.randn(3, size[0] * size[1], 8, dtype=torch.float64)
    got = merged(attend, x, size, ratio)
    for row, own in zip(got, x, strict=True):
        want, left = plain(attend, own, *size, ratio)
        assert (row - want).abs().max() < 1e-12
        assert Merging(x, size, ratio).merge(x).shape[1] == left
    alone = torch.cat([merged(attend, own[None], size, ratio) for own in x])
    assert (got - alone).abs().max() < 1e-13  # torch's products in float64 may add up in another order
    assert torch.equal(got, merged(attend, x, size, ratio))  # without chance


def test_in_a_block_it_is_around_self_attention_alone():
    block, x, text = TransformerBlock(16, 24, 4).eval(), torch.randn(2, 24, 16), torch.randn(2, 7, 24)
    with torch.no_grad():
        h = x + merged(block.attn1, block.norm1(x), (4, 6), 0.5)
        h = h + block.attn2(block.norm2(h), text)
        assert torch.equal(block(x, text, (4, 6), 0.5), h + block.ff(block.norm3(h)))
        assert not torch.equal(block(x, text, (4, 6), 0.5), block(x, text))
    to_text = TransformerBlock(16, 24, 4, only_cross=True).eval()  # without self-attention nothing is merged
    assert torch.equal(to_text(x, text, (4, 6), 0.5), to_text(x, text))
