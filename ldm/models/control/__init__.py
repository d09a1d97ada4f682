"""Networks beside a U-Net, which tell it of pictures."""

from ldm.models.control.controlnet import ControlNet, ControlNetConfig
from ldm.models.control.lllite import LLLite, LLLiteLayer, LLLiteLinear
from ldm.models.control.t2i_adapter import T2IAdapter, T2IAdapterConfig
from ldm.models.control.union import ControlNetUnion, ControlNetUnionConfig

__all__ = [
    "ControlNet",
    "ControlNetConfig",
    "ControlNetUnion",
    "ControlNetUnionConfig",
    "LLLite",
    "LLLiteLayer",
    "LLLiteLinear",
    "T2IAdapter",
    "T2IAdapterConfig",
]
