"""Copies of networks are those of copy.deepcopy."""

import copy

import torch
from torch import nn

from ldm.models.copying import copy_network


def with_all():
    """A network that has what networks of any library may have."""
    torch.manual_seed(0)
    children = nn.ModuleDict({"a": nn.Conv2d(1, 1, 1), "none": None, "empty": nn.ModuleList()})
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), children)
    net.append(net[0])  # one module at two places
    net.tied = nn.Linear(2, 3)
    net.tied.weight = net[0].weight
    net.register_buffer("passing", torch.ones(2), persistent=False)
    net.register_buffer("none", None)
    net.config = {"sizes": [1, 2], "of": {"a": (3, 4)}}
    net.order = [net[1], net[0]]  # modules outside of _modules
    net.first = net[0].forward  # a bound method
    net[0].register_forward_pre_hook(lambda module, given: None)
    net.eval()[1].train()
    return net


def assert_same(ours, theirs, ids):
    """`ids`: of an object of ours -> of theirs, so that both have the same objects at the same places."""
    assert type(ours) is type(theirs)
    assert ids.setdefault(id(ours), id(theirs)) == id(theirs)
    if isinstance(ours, nn.Module):
        assert_same(ours.__dict__, theirs.__dict__, ids)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name in ours:
            assert_same(ours[name], theirs[name], ids)
    elif isinstance(ours, list | tuple):
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other, ids)
    elif isinstance(ours, torch.Tensor):
        assert ours is theirs  # both were told the same
    elif hasattr(ours, "__self__"):
        assert_same(ours.__self__, theirs.__self__, ids)
    else:
        assert ours == theirs


def memo_of(net):
    return {id(each): each for each in (*net.parameters(), *net.buffers())}


def test_a_copy_is_that_of_deepcopy():
    net = with_all()
    ours, theirs = copy_network(net, memo_of(net)), copy.deepcopy(net, memo_of(net))
    assert_same(ours, theirs, {})
    assert ours.order[1] is ours[0] is ours[3]
    assert ours.first.__self__ is ours[0]


def test_nothing_of_a_copy_but_tensors_is_the_networks_own():
    net = with_all()
    made = copy_network(net, memo_of(net))
    for module, twin in zip(net.modules(), made.modules(), strict=True):
        assert module is not twin
        for name, value in vars(module).items():
            if isinstance(value, dict | set | list):
                assert vars(twin)[name] is not value, name
    assert made.config["sizes"] is not net.config["sizes"]
    made.eval()
    assert [module.training for module in net.modules()] == [False, False, True, False, False, False, False]


def test_tensors_are_what_the_memo_says():
    net = with_all()
    memo = {key: each.detach().double() for key, each in memo_of(net).items()}
    assert all(each.dtype is torch.float64 for each in copy_network(net, memo).buffers())
    again = copy_network(net, {})  # and else copies, tied as they were
    assert torch.equal(again[0].weight, net[0].weight)
    assert again.tied.weight is again[0].weight is not net[0].weight
