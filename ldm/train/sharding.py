"""FSDP: each process keeps a share of the weights, gradients, moments and averages, not all of them.

torch's `fully_shard` (FSDP2) does it: before a block computes, its weights are gathered from all processes,
and let go of after it; gradients come back averaged, to each its rows. Zhao et al. 2023, "PyTorch FSDP",
arXiv 2304.11277; the third stage of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). A sharded parameter is
a `DTensor`: its shape is the whole one's, and `to_local()` are this process's rows.

What looks at the weights (held-out loss, pictures, the export) runs in the main process alone and knows
nothing of it: for its time the networks are whole there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

from ldm.kernels.convolution import is_channels_last
from ldm.models.attention import TransformerBlock
from ldm.models.clip import CLIPEncoderLayer
from ldm.models.layers import ResnetBlock

BLOCKS = (ResnetBlock, TransformerBlock, CLIPEncoderLayer)  # gathered at once; what is left of a network, too


class Sharded:
    """The networks of a task that are trained, sharded in place over all processes.

    Frozen ones stay whole in each, as batches are made with them while others compute. A process's rows of a
    weight are those of `torch.chunk`.
    """

    def __init__(self, task: nn.Module, device: torch.device, processes: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (processes,))
        trained = [each for each in task.children() if any(p.requires_grad for p in each.parameters())]
        for p in (p for network in trained for p in network.parameters()):
            p.data = p.data.contiguous()  # fully_shard takes no channels_last
        self.plain = {network: _twin(network) for network in trained}
        for network in trained:
            for block in [module for module in network.modules() if isinstance(module, BLOCKS)]:
                fully_shard(block, mesh=mesh)
                block.register_forward_pre_hook(_laid_out)
            fully_shard(network, mesh=mesh)
        self._empty()

    @contextmanager
    def whole(self, main: bool) -> Iterator[None]:
        """Inside the block the networks are plain ones, with all their weights, in the main process.

        All processes are to enter it together; the others' are as they were.
        """
        for network, plain in self.plain.items():
            gathered = dict(plain.named_parameters())
            for name, p in network.named_parameters():
                full = full_tensor(p.detach())
                if main:
                    gathered[name].data = full
                    # It counts as changed: kernels keep copies of weights.
                    torch.autograd.graph.increment_version(gathered[name])
        if main:
            self._swap()
        try:
            yield
        finally:
            if main:
                self._swap()
                self._empty()

    def _swap(self) -> None:
        """Whoever holds a network finds what its twin is, and the other way round."""
        for one, other in self.plain.items():
            one.__class__, other.__class__ = other.__class__, one.__class__
            one.__dict__, other.__dict__ = other.__dict__, one.__dict__

    def _empty(self) -> None:
        for plain in self.plain.values():
            for p in plain.parameters():
                p.data = p.data.new_empty(0)


def _laid_out(block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a block is given, laid out as before FSDP passed it on as a view.

    There a single picture loses the stride of its batch, by which torch's kernels tell channels_last: they
    would sum in another order, and go on in another layout.
    """
    return tuple(
        x.clone(memory_format=torch.channels_last) if isinstance(x, Tensor) and _lost(x) else x for x in given
    )


def _lost(x: Tensor) -> bool:
    return x.dim() == 4 and len(x) == 1 and x.stride(0) != x.numel() and is_channels_last(x)


def _twin(network: nn.Module) -> nn.Module:
    """The same modules with parameters of their own, which are empty, and the same buffers."""
    known: dict[int, Tensor] = {id(buffer): buffer for buffer in network.buffers()}
    for p in network.parameters():
        known[id(p)] = nn.Parameter(p.data.new_empty(0), p.requires_grad)
    return copy.deepcopy(network, known).eval()


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process has but its rows of a tensor."""
    return hasattr(tensor, "device_mesh")  # no import, which takes a second, where nothing is sharded


def full_tensor(tensor: Tensor) -> Tensor:
    """All of it, in each process: they are to ask together."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def own_rows(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, itself and no copy; of one that is not sharded, all."""
    own: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return own


def rows(tensor: Tensor) -> range:
    """Which rows of a tensor of one dimension or more are this process's."""
    if not is_sharded(tensor):
        return range(len(tensor))
    each = -(-len(tensor) // tensor.device_mesh.size())
    first = min(len(tensor), each * tensor.device_mesh.get_local_rank())
    return range(first, first + len(tensor.to_local()))


def like(tensor: Tensor, own: Tensor) -> Tensor:
    """`own` rows as a sharded tensor, where `tensor` is one; else as they are."""
    if not is_sharded(tensor):
        return own
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        own, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
    return made
