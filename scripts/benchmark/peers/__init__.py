"""Those that are measured: each a library with a precision, compiled or not."""

from benchmark.peers.base import Peer
from benchmark.peers.ours import Ours
from benchmark.peers.with_diffusers import Diffusers
from benchmark.peers.with_openvino import OpenVino
from benchmark.peers.with_sdcpp import StableDiffusionCpp

# In the order of the table; ratios are to the first of ours that is measured.
CPU: tuple[Peer, ...] = (
    Ours("bf16"),
    Ours("fp32"),
    Ours("bf16", compiled=True),
    Ours("fp32", compiled=True),
    Diffusers("bf16"),
    Diffusers("fp32"),
    Diffusers("bf16", compiled=True),
    Diffusers("fp32", compiled=True),
    OpenVino("bf16"),
    OpenVino("fp32"),
    OpenVino("int8"),
    StableDiffusionCpp("fp16"),
    StableDiffusionCpp("int8"),
)
CUDA: tuple[Peer, ...] = tuple(
    kind(dtype, compiled)
    for kind in (Ours, Diffusers)
    for dtype in ("fp16", "bf16", "fp32")
    for compiled in ((False, True) if dtype != "fp32" else (False,))
)


def peers_on(device: str) -> dict[str, Peer]:
    """By name."""
    return {peer.name: peer for peer in (CUDA if device.startswith("cuda") else CPU)}
