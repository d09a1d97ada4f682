"""Architecture configs: the keys of diffusers' `config.json`, each honoured, harmless or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from ldm.errors import UserError

T = TypeVar("T")

# Training leftovers that diffusers' EMA helper writes into a model's config.
_EMA_KEYS = frozenset(
    {
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    }
)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a conditional U-Net, with the names and defaults of diffusers' UNet2DConditionModel."""

    sample_size: int | tuple[int, int] | None = None
    """Side of the latents the model was trained on; only the default picture size depends on it."""
    in_channels: int = 4
    """Channels of the noisy latents and of whatever is concatenated with them."""
    out_channels: int = 4
    """Channels of the prediction."""
    center_input_sample: bool = False
    """Map the input from [0, 1] to [-1, 1] first."""
    flip_sin_to_cos: bool = True
    """Timestep features are [cos, sin] rather than [sin, cos]."""
    freq_shift: float = 0
    """Subtracted from the number of frequencies of the timestep features: 0 or 1."""
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    """Level by level from the finest: with attention (CrossAttnDownBlock2D) or without (DownBlock2D)."""
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    """Between down and up: resnet, transformer, resnet; or one resnet (UNetMidBlock2D); or nothing."""
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    """Level by level from the coarsest."""
    only_cross_attention: bool | tuple[bool, ...] = False
    """Where pixels attend to the text only, never to each other; the middle is not concerned."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level from the finest."""
    layers_per_block: int | tuple[int, ...] = 2
    """Resnets of each level on the way down; there is one more on the way up."""
    downsample_padding: int = 1
    """Padding of the strided convolution: 1 on all sides, or 0 for right and bottom only."""
    mid_block_scale_factor: float = 1.0
    """The middle resnets divide their sum by it."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    norm_eps: float = 1e-5
    """Epsilon of the GroupNorms in resnets and at the output."""
    cross_attention_dim: int | tuple[int, ...] = 1280
    """Width of the text embedding."""
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    """Transformer blocks in each spatial transformer: one number, level by level, or layer by layer."""
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    """The same on the way up, from the coarsest level; as on the way down if not given."""
    attention_head_dim: int | tuple[int, ...] = 8
    """The NUMBER of attention heads, whatever its name says: an old mistake that every checkpoint keeps."""
    use_linear_projection: bool = False
    """Enter and leave transformers by a linear layer rather than a 1 x 1 convolution."""
    upcast_attention: bool | None = False
    """Asks for attention scores summed in fp32, which every kernel in `attend` does anyway."""
    class_embed_type: str | None = None
    """How labels are added to the time embedding: timestep, projection, simple_projection or identity."""
    num_class_embeds: int | None = None
    """Without `class_embed_type`, labels below this number have a row of a table each (x4 upscaler)."""
    addition_embed_type: str | None = None
    """Added to the time embedding: "text" is pooled tokens, "text_time" is pooled text and sizes (XL)."""
    addition_embed_type_num_heads: int = 64
    """Attention heads of the pooling in "text"."""
    addition_time_embed_dim: int | None = None
    """Features of each of the sizes in "text_time"."""
    projection_class_embeddings_input_dim: int | None = None
    """Width of the pooled text and all sizes in "text_time", or of `class_labels` that are projected."""
    time_embedding_dim: int | None = None
    """Width of the time embedding; four times the finest level's channels if not given."""
    time_cond_proj_dim: int | None = None
    """Width of an embedded guidance scale that is added to the timestep features (LCM)."""
    conv_in_kernel: int = 3
    """Kernel of the first convolution."""
    conv_out_kernel: int = 3
    """Kernel of the last convolution."""

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        _supported(
            "U-Net", "down_block_types", self.down_block_types, ("DownBlock2D", "CrossAttnDownBlock2D")
        )
        _supported("U-Net", "up_block_types", self.up_block_types, ("UpBlock2D", "CrossAttnUpBlock2D"))
        middles = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
        _supported("U-Net", "mid_block_type", (self.mid_block_type,), middles)
        _supported("U-Net", "class_embed_type", (self.class_embed_type,), (None, *_CLASS_EMBEDDINGS))
        _supported("U-Net", "addition_embed_type", (self.addition_embed_type,), (None, "text", "text_time"))
        _supported("U-Net", "downsample_padding", (self.downsample_padding,), (0, 1))
        for name in _PER_LEVEL:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise UserError(
                    f"U-Net config: {name} = {list(value)} needs {levels} entries, as block_out_channels has"
                )
        _divisible("U-Net", self.block_out_channels, self.norm_num_groups)
        self._check_embeddings()
        self._check_depths()

    def _check_embeddings(self) -> None:
        """Widths that an embedding needs must be given."""
        needs = {"addition_time_embed_dim": self.addition_embed_type == "text_time"}
        needs["projection_class_embeddings_input_dim"] = (
            self.addition_embed_type == "text_time" or "projection" in (self.class_embed_type or "")
        )
        for name, needed in needs.items():
            if needed and not getattr(self, name):
                raise UserError(
                    f"U-Net config: addition_embed_type = {self.addition_embed_type!r}, class_embed_type = "
                    f"{self.class_embed_type!r} need {name}"
                )

    def _check_depths(self) -> None:
        """Transformer blocks given layer by layer must reach for all layers, on both ways."""
        ways = {"transformer_layers_per_block": False, "reverse_transformer_layers_per_block": True}
        for name, up in ways.items():
            layers = [n + up for n in self.per_level("layers_per_block")]
            given = [len(each) for each in self.depths(up)]
            if given != layers:
                raise UserError(
                    f"U-Net config: {name} needs {layers} entries from the finest level, not {given}"
                )

    def depths(self, up: bool = False) -> list[tuple[int, ...]]:
        """Transformer blocks of each layer, level by level from the finest, on the way down or up."""
        levels = self.per_level("transformer_layers_per_block")
        if up and self.reverse_transformer_layers_per_block is not None:
            levels = self.reverse_transformer_layers_per_block[::-1]
        layers = [n + up for n in self.per_level("layers_per_block")]
        return [d[:n] if isinstance(d, tuple) else (d,) * n for d, n in zip(levels, layers, strict=True)]

    def per_level(self, name: str) -> tuple[Any, ...]:
        """A field given once or level by level -> level by level, from the finest."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def conditioning(self) -> frozenset[str]:
        """What `UNet.forward` must be given beside the text: names of fields of `Conditioning`."""
        names = set()
        if self.addition_embed_type == "text_time":
            names |= {"pooled", "time_ids"}
        if self.class_embed_type is not None or self.num_class_embeds is not None:
            names.add("class_labels")
        if self.time_cond_proj_dim is not None:
            names.add("timestep_cond")
        return frozenset(names)


_PER_LEVEL = (
    "down_block_types",
    "up_block_types",
    "only_cross_attention",
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "attention_head_dim",
)

_CLASS_EMBEDDINGS = ("timestep", "projection", "simple_projection", "identity")

# Keys of UNet2DConditionModel with the values that mean "not used".
UNET_FIXED: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False, True),  # no middle that is supported has it
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


@dataclass(frozen=True)
class KLConfig:
    """Shape of an AutoencoderKL, with the names and defaults of diffusers' class."""

    in_channels: int = 3
    """Channels of the pictures encoded."""
    out_channels: int = 3
    """Channels of the pictures decoded."""
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    """One per level: only DownEncoderBlock2D."""
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    """One per level: only UpDecoderBlock2D."""
    block_out_channels: tuple[int, ...] = (64,)
    """Channels of each level from the finest; each level but the last halves the size."""
    layers_per_block: int = 1
    """Resnets per level of the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm."""
    sample_size: int | tuple[int, int] = 32
    """Side of the pictures it was trained on; nothing depends on it."""
    scaling_factor: float = 0.18215
    """Latents are multiplied by it to have about unit variance."""
    shift_factor: float | None = None
    """Subtracted from latents before scaling."""
    force_upcast: bool = True
    """fp16 overflows in this decoder: run it in fp32 or bf16."""
    use_quant_conv: bool = True
    """A 1 x 1 convolution after the encoder."""
    use_post_quant_conv: bool = True
    """A 1 x 1 convolution before the decoder."""
    mid_block_add_attention: bool = True
    """Self-attention at the coarsest level."""

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        _supported("AutoencoderKL", "down_block_types", self.down_block_types, ("DownEncoderBlock2D",))
        _supported("AutoencoderKL", "up_block_types", self.up_block_types, ("UpDecoderBlock2D",))
        if not levels == len(self.down_block_types) == len(self.up_block_types):
            raise UserError(
                "AutoencoderKL config: down_block_types, up_block_types, block_out_channels have lengths "
                f"{len(self.down_block_types)}, {len(self.up_block_types)}, {levels}"
            )
        _divisible("AutoencoderKL", self.block_out_channels, self.norm_num_groups)


KL_FIXED: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}


@dataclass(frozen=True)
class TinyConfig:
    """Shape of an AutoencoderTiny (TAESD), with the names and defaults of diffusers' class."""

    in_channels: int = 3
    """Channels of the pictures encoded."""
    out_channels: int = 3
    """Channels of the pictures decoded."""
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    """Channels of each level of the encoder from the finest: all the same."""
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    """Channels of each level of the decoder from the coarsest: all the same."""
    act_fn: str = "relu"
    """Activation inside blocks: relu, silu, swish, gelu or mish."""
    latent_channels: int = 4
    """Channels of the latents."""
    upsampling_scaling_factor: int = 2
    """Size ratio of neighbouring levels of the decoder."""
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    """Residual blocks at each level of the encoder; each level but the first halves the size."""
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    """Residual blocks at each level of the decoder; each level but the last doubles the size."""
    latent_magnitude: float = 3
    """Latents within +-magnitude map to [0, 1] where they are stored as bytes; the networks do not use it."""
    latent_shift: float = 0.5
    """Where 0 lies in that range."""
    force_upcast: bool = False
    """Kept for diffusers; this decoder is safe in fp16."""
    scaling_factor: float = 1.0
    """Latents are multiplied by it to have about unit variance."""
    shift_factor: float = 0.0
    """Subtracted from latents before scaling."""

    def __post_init__(self) -> None:
        _supported("AutoencoderTiny", "act_fn", (self.act_fn,), ("relu", "silu", "swish", "gelu", "mish"))
        for side in ("encoder", "decoder"):
            channels, blocks = (
                getattr(self, f"{side}_block_out_channels"),
                getattr(self, f"num_{side}_blocks"),
            )
            if len(channels) != len(blocks) or len(set(channels)) != 1:
                raise UserError(
                    f"AutoencoderTiny config: {side}_block_out_channels = {list(channels)} must be a number "
                    f"repeated for each of num_{side}_blocks = {list(blocks)}"
                )
        down = 2 ** (len(self.num_encoder_blocks) - 1)
        up = self.upsampling_scaling_factor ** (len(self.num_decoder_blocks) - 1)
        if down != up:
            raise UserError(
                f"AutoencoderTiny config: the encoder shrinks {down} times, the decoder enlarges {up} times"
            )


TINY_FIXED: dict[str, tuple[object, ...]] = {"upsample_fn": ("nearest",)}

# diffusers writes it as a copy of decoder_block_out_channels.
TINY_IGNORED = frozenset({"block_out_channels"})


def read_config(
    cls: type[T],
    config: Mapping[str, Any],
    fixed: Mapping[str, tuple[object, ...]],
    ignored: frozenset[str] = frozenset(),
) -> T:
    """A diffusers `config.json` as `cls`.

    Keys that begin with "_" are metadata, keys in `ignored` mean nothing here, and keys in `fixed` must have
    one of the values listed.

    Raises:
        UserError: naming the key and the value that are unknown, unsupported or of the wrong type.
    """
    family = str(config.get("_class_name", cls.__name__))
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            values[key] = value
        elif key in fixed:
            # Lists level by level are allowed where every level has the one value supported.
            _supported(family, key, value if isinstance(value, (list, tuple)) else (value,), fixed[key])
        elif not (key.startswith("_") or key in ignored or key in _EMA_KEYS):
            raise UserError(
                f"{family} config: unknown key {key} = {value!r}; remove it if it changes nothing"
            )
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise UserError(str(first["ctx"]["error"])) from None
        key = str(first["loc"][0])
        raise UserError(f"{family} config: {key} = {values[key]!r}: {first['msg'].lower()}") from None


def write_config(config: object, class_name: str) -> dict[str, Any]:
    """`config` as the dict that diffusers saves in `config.json`."""
    values = asdict(config)  # type: ignore[call-overload]
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {"_class_name": class_name, **lists}


def _supported(
    family: str, key: str, values: tuple[object, ...] | list[object], allowed: tuple[object, ...]
) -> None:
    for value in values:
        if value not in allowed:
            raise UserError(
                f"{family} config: {key} = {value!r} is not supported, only "
                + " or ".join(map(repr, allowed))
            )


def _divisible(family: str, channels: tuple[int, ...], groups: int) -> None:
    if groups < 1 or any(c % groups for c in channels):
        raise UserError(
            f"{family} config: norm_num_groups = {groups} does not divide block_out_channels {list(channels)}"
        )
