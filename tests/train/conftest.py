"""What tests of states share."""

import pytest
import torch

from ldm.train.state import State


@pytest.fixture
def state():
    """Of two layers after a step of AdamW, with averages."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2))
    layers.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(layers.parameters())
    sum(p.square().sum() for p in layers.parameters()).backward()
    optimiser.step()
    named = dict(layers.named_parameters())
    return State(named, {name: p.detach() * 2 for name, p in named.items()}, optimiser)
