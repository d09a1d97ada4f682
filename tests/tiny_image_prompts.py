"""Tiny random IP-Adapters in the layout that is published, and the image encoder that they read."""

import torch
from conftest import randomise_
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH, PROJECTED, SIDE = 32, 20, 16  # of the encoder: its states, a picture's embedding, pixels
TOKENS, HIDDEN = 3, 64  # of the plus projection: a head has 64 channels


def make_encoder(folder, **changes):
    """A CLIPVisionModelWithProjection with 4 patches, saved by transformers."""
    config = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "projection_dim": PROJECTED,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
    }
    model = randomise_(CLIPVisionModelWithProjection(CLIPVisionConfig(**config | changes)), seed=3)
    model.save_pretrained(folder)
    return model


def plain_projection(dim, width=PROJECTED):
    return {
        "proj.weight": (4 * dim, width),
        "proj.bias": (4 * dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }


def full_projection(dim, width=WIDTH):
    return {
        "proj.0.weight": (width, width), "proj.0.bias": (width,), "proj.2.weight": (dim, width),
        "proj.2.bias": (dim,), "proj.3.weight": (dim,), "proj.3.bias": (dim,),
    }  # fmt: skip


def plus_projection(dim, width=WIDTH, hidden=HIDDEN, inner=HIDDEN, tokens=TOKENS, depth=4):
    shapes = {
        "latents": (1, tokens, hidden), "proj_in.weight": (hidden, width), "proj_in.bias": (hidden,),
        "proj_out.weight": (dim, hidden), "proj_out.bias": (dim,), "norm_out.weight": (dim,),
        "norm_out.bias": (dim,),
    }  # fmt: skip
    for k in range(depth):
        before = f"layers.{k}"
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"{before}.{norm}.{each}": (hidden,) for each in ("weight", "bias")}
        shapes |= {
            f"{before}.0.to_q.weight": (inner, hidden), f"{before}.0.to_kv.weight": (2 * inner, hidden),
            f"{before}.0.to_out.weight": (hidden, inner), f"{before}.1.1.weight": (4 * hidden, hidden),
            f"{before}.1.3.weight": (hidden, 4 * hidden),
        }  # fmt: skip
    return shapes


PROJECTIONS = {"plain": plain_projection, "plus": plus_projection, "full": full_projection}


def adapter_shapes(unet, kind="plain", **sizes):
    """The names and shapes of an IP-Adapter's file for diffusers' U-Net."""
    dim = unet.config.cross_attention_dim
    shapes = {f"image_proj.{name}": shape for name, shape in PROJECTIONS[kind](dim, **sizes).items()}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for to in ("k", "v"):
                shapes[f"ip_adapter.{number}.to_{to}_ip.weight"] = (layer.to_q.out_features, dim)
            number += 2
    return shapes


def make_adapter(unet, path, kind="plain", seed=0, **sizes):
    """A file with random weights, .safetensors or .bin; returns its path."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in adapter_shapes(unet, kind, **sizes).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name or ".1.0." in name or "proj.3." in name
        tensors[name] = noise / shape[-1] ** 0.5 if len(shape) > 1 else 0.2 * noise + is_norm
    if path.suffix == ".safetensors":
        save_file(tensors, path)
        return path
    nested = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        nested[part][rest] = tensor
    torch.save(nested, path)
    return path
