"""The recipe of fine-tuning: flat, since each of its keys is a flag of `ldm finetune` too.

    defaults -> a YAML recipe (--config) -> the command line

Names are those of diffusers' training scripts where they have the option. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, field_serializer, field_validator, model_validator

from ldm.files import is_url
from ldm.finetune.blocks import read_blocks
from ldm.train.loss_recipe import LossSection, MaskSection
from ldm.train.recipe import (
    Fixed,
    Free,
    OptimiserSection,
    RunSection,
    Section,
    Shape,
)

Mode = Literal["lora", "full", "textual_inversion", "controlnet", "image_prompt"]
AdapterType = Literal["lora", "loha", "lokr"]
Pixels = Annotated[int, Field(ge=64, multiple_of=8)]
BESIDE: tuple[Mode, ...] = ("controlnet", "image_prompt")  # that leave the U-Net as it is


class ModelSection(Section):
    """The model to begin with."""

    model: Fixed[str | None] = None
    """a pipeline folder, a single file or a name on the hub; by default the embedded model"""
    revision: Fixed[str | None] = None
    """of a model on the hub: a branch, tag or commit"""
    variant: str | None = None
    """of the weights in a folder or on the hub, such as fp16"""
    vae: Fixed[str | None] = None
    """the VAE from another folder, file or hub name"""
    prediction_type: Fixed[Literal["epsilon", "v_prediction", "sample"] | None] = None
    """where the model does not say it or is wrong"""


class FolderSection(Section):
    """The pictures, and how they are shown."""

    train_data_dir: Path | str
    """the folder of pictures; `ldm folder DIR` tells what is wrong with it. It is never changed. Or
    WebDataset shards: a folder of .tar files, or their URLs, such as https://host/cats-{000..099}.tar"""
    instance_prompt: str | None = None
    """one caption for all pictures; captions in the folder are not read"""
    missing_caption: Literal["error", "empty", "skip"] = "error"
    """what to do with a picture that has no caption"""
    image_column: str | None = None
    """of a table of captions: the pictures' files; by default file_name"""
    caption_column: str | None = None
    """of a table of captions: the captions; by default text"""
    resolution: Fixed[tuple[Pixels, ...]] = ()
    """pixels: the square whose area no picture exceeds; several, such as 512,768: each picture is shown at
    each of them; by default the model's own size"""
    center_crop: bool = True
    """cut off what does not fit on both sides alike; else at random, and latents are not cached"""
    random_flip: bool = False
    """mirror every other showing of a picture"""
    caption_dropout: float = Field(0.0, ge=0, le=1)
    """share of captions that are left empty, for classifier-free guidance; 0.1 for long runs"""
    shuffle_tags: bool = False
    """another order of what stands between the commas of a caption, each time"""
    keep_tags: int = Field(0, ge=0)
    """how many of them stay in front"""
    held_out: float = Field(0.1, ge=0, lt=1)
    """share of the pictures that is not trained on, for the held-out loss"""
    cache_dir: Path | None = None
    """where latents and embeddings are kept; by default in the output folder"""

    @field_validator("resolution", mode="before")
    @classmethod
    def _apart(cls, value: object) -> object:
        """512, [512, 768], or "512,768" as OneTrainer has it."""
        listed = value if isinstance(value, list | tuple) else () if value is None else (value,)
        return [part for each in listed for part in (each.split(",") if isinstance(each, str) else (each,))]

    @field_validator("resolution")
    @classmethod
    def _in_order(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("give each resolution once")
        return tuple(sorted(value))

    @field_serializer("resolution")
    def _one_is_a_number(self, value: tuple[int, ...]) -> int | list[int] | None:
        """As states of versions that knew but one have it."""
        return list(value) if len(value) > 1 else value[0] if value else None


class ModeSection(Section):
    """What is trained."""

    mode: Shape[Mode] = "lora"
    """lora: small matrices beside the layers; full: the U-Net; textual_inversion: a new word;
    controlnet, image_prompt: a network beside the U-Net, as `ldm train-control` and
    `ldm train-image-prompt` do"""
    train_text_encoder: Shape[bool] = False
    """lora, full: train the text encoder too"""
    text_encoder_lr: float | None = Field(None, gt=0)
    """its learning rate; by default that of the U-Net"""
    rank: Shape[int] = Field(4, ge=1)
    """lora: of the matrices"""
    lora_alpha: Fixed[float | None] = Field(None, gt=0)
    """lora: what they add counts alpha / rank; by default the rank, so 1"""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """lora: share of their inputs that is dropped"""
    lora_targets: Shape[tuple[str, ...]] = ()
    """lora: ends of the names of layers that get them; by default to_q to_k to_v to_out.0, the attentions"""
    lora_conv: Shape[bool] = False
    """lora: all other layers get them too: convolutions, feed-forward, projections (LoCon)"""
    use_dora: Shape[bool] = False
    """lora: learn magnitudes apart (DoRA)"""
    adapter_type: Shape[AdapterType] = "lora"
    """lora: what is beside a layer: a product of two matrices, of two such products (loha), or a Kronecker
    product (lokr)"""
    base_model_precision: Fixed[Literal["no_change", "nf4-bnb"]] = "no_change"
    """lora: nf4-bnb keeps the U-Net's own linear layers in 4 bits (QLoRA), by bitsandbytes"""
    block_rank: Shape[tuple[str, ...]] = ()
    """lora: other ranks of some blocks, such as down.0=4 mid=16 up.2=0 text_encoder=8; 0: none"""
    block_lr: Shape[tuple[str, ...]] = ()
    """lora, full: other learning rates of some blocks, such as down.0=1e-5 mid=1e-4; 0: they stay"""
    placeholder_token: Shape[str | None] = None
    """textual_inversion: the new word, as it stands in the captions"""
    initializer_token: Fixed[str | None] = None
    """textual_inversion: the words that it begins as"""
    num_vectors: Shape[int] = Field(1, ge=1)
    """textual_inversion: how many tokens the word has"""
    class_prompt: Fixed[tuple[str, ...]] = ()
    """prior preservation (DreamBooth): what the model already knows it as, such as "a photo of a
    dog"; several for all that it should not forget"""
    class_data_dir: Path | None = None
    """pictures of the class; what is missing is drawn; by default in the output folder"""
    num_class_images: int = Field(100, ge=1)
    """how many there should be"""
    prior_loss_weight: float = Field(1.0, ge=0)
    """how much they count"""
    inpainting: Shape[bool] = False
    """train on random masks; a U-Net of 4 channels is widened to 9"""
    masks: MaskSection = MaskSection()
    gradient_checkpointing: bool = False
    """compute the U-Net's layers twice, in less memory"""


class MaskedSection(Section):
    """Which places of a picture are trained on."""

    masked_loss: bool = False
    """the loss counts within masks alone: 7.mask.png beside 7.png, white where it counts"""
    mask_data_dir: Path | None = None
    """or the masks of this folder, each by the name of its picture"""
    alpha_mask: bool = False
    """or the alpha of each picture"""
    unmasked_weight: float = Field(0.0, ge=0, le=1)
    """how much the loss counts outside of masks"""

    @property
    def masks_loss(self) -> bool:
        """Whether not all places count alike."""
        return self.masked_loss or self.alpha_mask or self.mask_data_dir is not None


class ControlSection(Section):
    """What a ControlNet is told: pictures of a second folder, or what a preprocessor makes of the first."""

    control_data_dir: Path | None = None
    """controlnet: the control picture of each picture, by the same name, or as `ldm preprocess` names it"""
    preprocess: Fixed[str | None] = None
    """controlnet: or what makes them of the pictures as they are shown: canny, lineart and others"""
    preprocess_options: Free[
        tuple[str, ...]
    ] = ()  # what they come to is a fact of the run, which may not change
    """controlnet: its options, such as low=50 high=150"""


class ImagePromptSection(Section):
    """What an IP-Adapter reads pictures with."""

    image_encoder: Fixed[str | None] = None
    """image_prompt: the folder of a CLIPVisionModelWithProjection, which stays as it is"""
    image_dropout: float = Field(0.05, ge=0, lt=1)
    """image_prompt: share of pictures that are left out, for classifier-free guidance"""


class LookSection(Section):
    """What is drawn to see how it goes."""

    validation_prompts: tuple[str, ...] = ()
    """drawn before, during and after the training; by default captions of the folder"""
    num_validation_images: int = Field(4, ge=0)
    """pictures of each, of the seeds from 0; 0 draws none"""
    validation_inference_steps: int | None = Field(None, ge=1)
    """steps of the sampler; by default the model's"""
    validation_lora_scales: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] = (1.0,)
    """lora: drawn at each of these weights of what is learnt, such as 0.5 0.75 1"""


class FinetuneRecipe(
    ModelSection,
    FolderSection,
    ModeSection,
    MaskedSection,
    ControlSection,
    ImagePromptSection,
    LookSection,
    LossSection,
    OptimiserSection,
    RunSection,
):
    """A fine-tuning."""

    model_config = ConfigDict(allow_inf_nan=False)
    flat = True

    output_dir: Path
    """states, metrics, pictures, the report, and what was trained (in export/) go here"""
    num_train_epochs: int = Field(100, ge=1)
    """how often each picture is shown, where max_train_steps and max_minutes do not say when to end"""
    dry_run: bool = False
    """examine the folder and the recipe, say what would be done, and end"""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None  # type: ignore[assignment]
    """what networks compute in; what is trained is kept in fp32; by default what the device is fast in"""
    logging_steps: int = Field(10, ge=1)
    """steps between rows of metrics.jsonl"""
    validation_steps: int = Field(100, ge=1)
    """steps between looks at held-out loss and pictures"""
    checkpointing_steps: int = Field(500, ge=1)
    """steps between states"""

    @property
    def block_ranks(self) -> dict[str, int]:
        """`block_rank` by block."""
        return {block: int(rank) for block, rank in read_blocks(self.block_rank).items()}

    @property
    def block_lrs(self) -> dict[str, float]:
        """`block_lr` by block."""
        return read_blocks(self.block_lr)

    @field_validator("block_rank", "block_lr")
    @classmethod
    def _of_blocks(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        numbers = read_blocks(value).values()
        if info.field_name == "block_rank" and any(number % 1 for number in numbers):
            raise ValueError("ranks are whole numbers")
        return value

    @property
    def optimiser(self) -> OptimiserSection:
        return self

    @property
    def run(self) -> RunSection:
        return self

    @field_validator("train_data_dir", mode="before")
    @classmethod
    def _place(cls, value: object) -> object:
        """A Path but for a URL, whose // it would shorten."""
        return Path(value) if isinstance(value, str) and not is_url(value) else value

    @field_validator(
        *("validation_prompts", "lora_targets", "class_prompt", "preprocess_options"),
        *("block_rank", "block_lr"),
        mode="before",
    )
    @classmethod
    def _one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _ends(self) -> Self:
        """In place of RunSection's own check: num_train_epochs is always there to end a run."""
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        inversion = self.mode == "textual_inversion"
        if inversion and self.placeholder_token is None:
            raise ValueError("textual_inversion needs placeholder_token: the new word, such as <my-cat>")
        if inversion and self.initializer_token is None:
            raise ValueError("textual_inversion needs initializer_token: the words it begins as, such as cat")
        for name in self.model_fields_set & ONLY.keys():
            if self.mode not in ONLY[name] and getattr(self, name) != type(self).model_fields[name].default:
                modes = " and ".join(ONLY[name])
                raise ValueError(f"{name} is not allowed in mode {self.mode}: only {modes} can use it")
        if self.early_stop_patience and not self.held_out:
            raise ValueError("early_stop_patience goes by the held-out loss: give held_out a share")
        if self.class_data_dir is not None and not self.class_prompt:
            raise ValueError("class_data_dir needs class_prompt: what the pictures in it show")
        if inversion and self.inpainting:
            raise ValueError("inpainting trains the U-Net, textual_inversion a word: choose lora or full")
        if inversion and self.variance != "none":
            raise ValueError("variance trains the U-Net, textual_inversion a word: choose lora or full")
        if self.mode in BESIDE and (self.inpainting or self.variance != "none"):
            raise ValueError(
                f"inpainting and variance change the U-Net, which mode {self.mode} leaves as it is"
            )
        if self.chosen_optimizer == "prodigy" and (self.text_encoder_lr is not None or self.block_lr):
            raise ValueError("prodigy finds one rate for all: leave text_encoder_lr and block_lr out")
        if self.adapter_type != "lora" and (self.use_dora or self.lora_dropout):
            raise ValueError(f"adapter_type {self.adapter_type} goes without use_dora and lora_dropout")
        if self.base_model_precision != "no_change":
            wanted = {"adapter_type": "lora", "use_dora": False, "distributed": "ddp"}
            for name, value in wanted.items():
                if getattr(self, name) != value:
                    raise ValueError(f"base_model_precision {self.base_model_precision} goes without {name}")
        if self.alpha_mask and self.mask_data_dir is not None:
            raise ValueError("alpha_mask and mask_data_dir: choose one")
        if self.unmasked_weight and not self.masks_loss:
            raise ValueError("unmasked_weight needs masked_loss, mask_data_dir or alpha_mask")
        if self.masks_loss and self.variance != "none":
            raise ValueError("masked_loss does not go with variance, whose bound is of whole pictures")
        if self.mode == "image_prompt" and self.image_encoder is None:
            raise ValueError("an IP-Adapter needs image_encoder: the folder of what reads the pictures")
        if self.mode == "controlnet" and (self.control_data_dir is None) == (self.preprocess is None):
            raise ValueError(
                "a ControlNet is trained on control_data_dir, a folder of control pictures, or with "
                "preprocess, such as canny: give one of them"
            )
        return self


ONLY: dict[str, tuple[Mode, ...]] = {
    "train_text_encoder": ("lora", "full"),
    "text_encoder_lr": ("lora", "full"),
    "block_lr": ("lora", "full"),
    **dict.fromkeys(("adapter_type", "block_rank", "validation_lora_scales"), ("lora",)),
    "base_model_precision": ("lora",),
    **dict.fromkeys(
        ("rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_conv", "use_dora"), ("lora",)
    ),
    **dict.fromkeys(("placeholder_token", "initializer_token", "num_vectors"), ("textual_inversion",)),
    "distributed": ("lora", "full"),
    **dict.fromkeys(("class_prompt", "class_data_dir"), ("lora", "full", "textual_inversion")),
    **dict.fromkeys(ControlSection.model_fields, ("controlnet",)),
    **dict.fromkeys(ImagePromptSection.model_fields, ("image_prompt",)),
}
