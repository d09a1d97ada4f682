"""Skeletons of the original modules: nesting and shapes as in CompVis's and Stability's code, nothing else.

Their state dicts are what a single file holds, found without any table of names. `CHECKPOINTS` has the
hyperparameters of v1-inference, v2-inference, x4-upscaling, sd_xl_base and sd_xl_refiner.yaml.
"""

import torch
from torch import nn


class Resnet(nn.Module):
    def __init__(self, c_in, c_out, time):
        super().__init__()
        self.in_layers = nn.Sequential(norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, c_out))
        self.out_layers = nn.Sequential(norm(c_out), nn.SiLU(), nn.Dropout(), nn.Conv2d(c_out, c_out, 3))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)


class CrossAttention(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout())


class GEGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Dropout(), nn.Linear(4 * width, width))


class TransformerBlock(nn.Module):
    def __init__(self, width, context, text_only):
        super().__init__()
        self.attn1 = CrossAttention(width, context if text_only else width)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))


class SpatialTransformer(nn.Module):
    def __init__(self, width, context, depth, linear, text_only=False):
        super().__init__()
        self.norm = norm(width)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, context, text_only) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3)


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3)


class UNetModel(nn.Module):
    """openaimodel.UNetModel. `depths` by level, 0 without attention; `middle` is the depth in the middle."""

    def __init__(
        self, in_channels, channels, mult, depths, middle, context, linear,
        adm=None, classes=None, text_only=None, blocks=2, out_channels=4,
    ):  # fmt: skip
        super().__init__()
        time = 4 * channels
        text_only = text_only or [False] * len(mult)
        self.time_embed = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        if classes:
            self.label_emb = nn.Embedding(classes, time)
        if adm:
            embed = nn.Sequential(nn.Linear(adm, time), nn.SiLU(), nn.Linear(time, time))
            self.label_emb = nn.Sequential(embed)
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(in_channels, channels, 3))])
        skips, c = [channels], channels

        def attention(level):
            return SpatialTransformer(c, context, depths[level], linear, text_only[level])

        for level, m in enumerate(mult):
            for _ in range(blocks):
                layers, c = [Resnet(c, m * channels, time)], m * channels
                layers += [attention(level)] if depths[level] else []
                self.input_blocks.append(nn.Sequential(*layers))
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.Sequential(Downsample(c)))
                skips.append(c)
        transformer = SpatialTransformer(c, context, middle, linear)
        self.middle_block = nn.Sequential(Resnet(c, c, time), transformer, Resnet(c, c, time))
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                layers, c = [Resnet(c + skips.pop(), m * channels, time)], m * channels
                layers += [attention(level)] if depths[level] else []
                layers += [Upsample(c)] if level and i == blocks else []
                self.output_blocks.append(nn.Sequential(*layers))
        self.out = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, out_channels, 3))


class VaeResnet(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)


class VaeAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))


def nest(**modules):
    """A module with these children."""
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


def middle(width):
    return nest(block_1=VaeResnet(width, width), attn_1=VaeAttention(width), block_2=VaeResnet(width, width))


class Encoder(nn.Module):
    def __init__(self, ch, mult, blocks, z):
        super().__init__()
        self.conv_in, c = nn.Conv2d(3, ch, 3), ch
        self.down = nn.ModuleList()
        for level, m in enumerate(mult):
            block = nn.ModuleList()
            for _ in range(blocks):
                block.append(VaeResnet(c, m * ch))
                c = m * ch
            # `attn` is an empty list at every level: attn_resolutions is [].
            down = nest(block=block, attn=nn.ModuleList())
            if level < len(mult) - 1:
                down.downsample = nest(conv=nn.Conv2d(c, c, 3))
            self.down.append(down)
        self.mid, self.norm_out, self.conv_out = middle(c), norm(c), nn.Conv2d(c, 2 * z, 3)


class Decoder(nn.Module):
    def __init__(self, ch, mult, blocks, z):
        super().__init__()
        c = ch * mult[-1]
        self.conv_in, self.mid, self.up = nn.Conv2d(z, c, 3), middle(c), nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            block = nn.ModuleList()
            for _ in range(blocks + 1):
                block.append(VaeResnet(c, m * ch))
                c = m * ch
            up = nest(block=block, attn=nn.ModuleList())
            if level:
                up.upsample = nest(conv=nn.Conv2d(c, c, 3))
            self.up.insert(0, up)
        self.norm_out, self.conv_out = norm(c), nn.Conv2d(c, 3, 3)


class AutoencoderKL(nn.Module):
    def __init__(self, ch, mult, blocks=2, z=4):
        super().__init__()
        self.encoder, self.decoder = Encoder(ch, mult, blocks, z), Decoder(ch, mult, blocks, z)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)


class OpenClipBlock(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 1)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nest(c_fc=nn.Linear(width, inner), gelu=nn.GELU(), c_proj=nn.Linear(inner, width))


class OpenClip(nn.Module):
    """The text half of open_clip.CLIP."""

    def __init__(self, width, layers, project, vocabulary=49408, window=77, inner=None):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(window, width))
        self.text_projection = nn.Parameter(torch.empty(width, project))
        self.logit_scale = nn.Parameter(torch.empty(()))
        blocks = nn.ModuleList(OpenClipBlock(width, inner or 4 * width) for _ in range(layers))
        self.transformer = nest(resblocks=blocks)
        self.token_embedding, self.ln_final = nn.Embedding(vocabulary, width), nn.LayerNorm(width)


class Clip(nn.Module):
    """transformers' CLIPTextModel as it was in 2022."""

    def __init__(self, width, layers, vocabulary=49408, window=77, inner=None):
        super().__init__()
        embeddings = nest(
            token_embedding=nn.Embedding(vocabulary, width), position_embedding=nn.Embedding(window, width)
        )
        embeddings.register_buffer("position_ids", torch.arange(window)[None])
        blocks = nn.ModuleList()
        for _ in range(layers):
            attention = nest(**{f"{name}_proj": nn.Linear(width, width) for name in ("k", "v", "q", "out")})
            wide = inner or 4 * width
            mlp = nest(fc1=nn.Linear(width, wide), fc2=nn.Linear(wide, width))
            norms = {"layer_norm1": nn.LayerNorm(width), "layer_norm2": nn.LayerNorm(width)}
            blocks.append(nest(self_attn=attention, mlp=mlp, **norms))
        self.text_model = nest(
            embeddings=embeddings, encoder=nest(layers=blocks), final_layer_norm=nn.LayerNorm(width)
        )


def norm(channels):
    return nn.GroupNorm(1, channels)


VAE_F8 = {"ch": 128, "mult": (1, 2, 4, 4)}
SD1 = {"channels": 320, "mult": (1, 2, 4, 4), "depths": (1, 1, 1, 0), "middle": 1, "context": 768}
SD1 |= {"in_channels": 4, "linear": False}
SD2 = SD1 | {"context": 1024, "linear": True}
XL = {"channels": 320, "mult": (1, 2, 4), "depths": (0, 2, 10), "middle": 10, "context": 2048, "adm": 2816}
XL |= {"in_channels": 4, "linear": True}
REFINER = {"channels": 384, "mult": (1, 2, 4, 4), "depths": (0, 4, 4, 0), "middle": 4, "context": 1280}
REFINER |= {"adm": 2560, "in_channels": 4, "linear": True}
X4 = {"channels": 256, "mult": (1, 2, 2, 4), "depths": (0, 1, 1, 1), "middle": 1, "context": 1024}
X4 |= {"in_channels": 7, "classes": 1000, "text_only": (True, True, True, False), "linear": True}
H14, BIG_G = {"width": 1024, "layers": 24, "project": 1024}, {"width": 1280, "layers": 32, "project": 1280}
L14 = {"width": 768, "layers": 12}

# Family -> prefix -> (class, arguments).
CHECKPOINTS = {
    "sd1": {"cond_stage_model.transformer": (Clip, L14)},
    "sd2": {"cond_stage_model.model": (OpenClip, H14)},
    "x4_upscaler": {"cond_stage_model.model": (OpenClip, H14)},
    "sdxl": {
        "conditioner.embedders.0.transformer": (Clip, L14),
        "conditioner.embedders.1.model": (OpenClip, BIG_G),
    },
    "sdxl_refiner": {"conditioner.embedders.0.model": (OpenClip, BIG_G)},
}
UNETS = {"sd1": SD1, "sd2": SD2, "x4_upscaler": X4, "sdxl": XL, "sdxl_refiner": REFINER}
for family, parts in CHECKPOINTS.items():
    parts["model.diffusion_model"] = (UNetModel, UNETS[family])
    vae = {"ch": 128, "mult": (1, 2, 4)} if family == "x4_upscaler" else VAE_F8
    parts["first_stage_model"] = (AutoencoderKL, vae)


def checkpoint(parts, device="cpu"):
    """{name: tensor} of a file with these parts: prefix -> (class, arguments); random but on `meta`."""
    tensors = {}
    generator = torch.Generator().manual_seed(3)
    for prefix, (cls, arguments) in parts.items():
        with torch.device("meta"):
            names = cls(**arguments).state_dict()
        for name, meta in names.items():
            random = device != "meta" and meta.is_floating_point()
            tensor = (
                torch.randn(meta.shape, generator=generator)
                if random
                else torch.zeros_like(meta, device=device)
            )
            tensors[f"{prefix}.{name}"] = tensor
    return tensors
