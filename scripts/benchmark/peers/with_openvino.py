"""OpenVINO: diffusers' pipeline around its networks, which is how optimum-intel has it used.

Networks are converted once (`convert.py`), and compiled for the shapes of the case.
"""

from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from benchmark.case import Case
from benchmark.environment import has_bf16
from benchmark.inputs import config_of, downscale_of, window_of
from benchmark.peers.base import Opened, Peer
from benchmark.peers.with_diffusers import OpenedDiffusers, with_sampler


class OpenVino(Peer):
    library: ClassVar[str] = "openvino"
    modules: ClassVar[dict[str, str]] = {"openvino": "openvino", "diffusers": "diffusers"}
    rows: ClassVar[tuple[str, ...]] = (
        "unet", "decode", "encode", "text", "picture", "batch", "cold", "load",
    )  # fmt: skip

    def lacks(self, case: Case) -> str:
        lacking = super().lacks(case)
        if not lacking and self.dtype == "int8" and importlib.util.find_spec("nncf") is None:
            lacking = "not installed: pip install nncf"
        return lacking

    @property
    def precision(self) -> str:
        """Of what is not int8."""
        return "bf16" if self.dtype == "bf16" or (self.dtype == "int8" and has_bf16()) else "f32"

    def file(self, case: Case, part: str) -> Path:
        """Of a network in OpenVINO's format; an int8 U-Net is calibrated at the case's size."""
        folder = case.made / "openvino"
        if part == "unet" and self.dtype == "int8":
            return folder / f"unet-int8-{case.height}x{case.width}.xml"
        return folder / f"{part}.xml"

    def unmade(self, case: Case) -> list[Path]:
        parts = ["unet", "vae_decoder", "vae_encoder", "text_encoder"]
        if (Path(case.folder) / "text_encoder_2").exists():
            parts.append("text_encoder_2")
        return [file for part in parts if not (file := self.file(case, part)).exists()]

    def make(self, case: Case) -> None:
        from benchmark.peers import convert

        for file in self.unmade(case):
            file.parent.mkdir(parents=True, exist_ok=True)
            plain = OpenVino("fp32").file(case, "unet")
            if file.name.startswith("unet-int8"):
                if not plain.exists():
                    convert.convert(case, plain)
                convert.quantise(case, plain, file)
            else:
                convert.convert(case, file)

    def start(self, case: Case) -> Opened:
        return OpenedOpenVino(case, self)


class OpenedOpenVino(OpenedDiffusers):
    peer: OpenVino

    def __init__(self, case: Case, peer: Peer) -> None:
        super().__init__(case, peer)
        import openvino
        import torch

        self.core, self.dtype = openvino.Core(), torch.float32  # of what goes in and comes out

    def network(self, part: str, *shapes: tuple[int, ...]) -> Any:
        """A compiled network for inputs of these shapes."""
        model = self.core.read_model(self.peer.file(self.case, part))
        model.reshape(dict(enumerate(shapes)))
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.peer.precision,
            "CACHE_DIR": str(self.case.made / "openvino" / "compiled"),
        }
        if self.case.threads is not None:
            config["INFERENCE_NUM_THREADS"] = self.case.threads
        return self.core.compile_model(model, "CPU", config)

    def load(self) -> float | None:
        """Compiles all that a picture needs; what the weights take is not told."""
        unet, window = config_of(self.case, "unet"), window_of(self.case)
        downscale = downscale_of(config_of(self.case, "vae"))
        h, w = self.case.height // downscale, self.case.width // downscale
        shapes = [(2, unet["in_channels"], h, w), (1,), (2, window, unet["cross_attention_dim"])]
        if unet.get("addition_embed_type") == "text_time":
            pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
            shapes += [(2, pooled), (2, 6)]
        self.pipe.unet.compiled(*shapes)
        self.pipe.vae.decoder.compiled((1, unet["in_channels"], h, w))
        for part in ("text_encoder", "text_encoder_2"):
            if getattr(self.pipe, part, None) is not None:
                getattr(self.pipe, part).compiled((1, window))
        return None

    @cached_property
    def pipe(self) -> Any:
        import diffusers
        from transformers import CLIPTokenizer

        from benchmark.peers.networks import TextEncoder, UNet, Vae

        folder, parts = Path(self.case.folder), dict[str, Any]()
        for part in ("text_encoder", "text_encoder_2"):
            if (folder / part).exists():
                parts[part] = TextEncoder(self, part)
                tokenizer = part.replace("text_encoder", "tokenizer")
                parts[tokenizer] = CLIPTokenizer.from_pretrained(folder / tokenizer)
        config = diffusers.DiffusionPipeline.load_config(folder)
        scheduler = getattr(diffusers, config["scheduler"][1]).from_pretrained(folder, subfolder="scheduler")
        make = getattr(diffusers, config["_class_name"])
        if "text_encoder_2" in parts:
            options = {"force_zeros_for_empty_prompt": config.get("force_zeros_for_empty_prompt", True)}
        else:
            options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = make(unet=UNet(self), vae=Vae(self), scheduler=scheduler, **parts, **options)
        return with_sampler(pipe)
