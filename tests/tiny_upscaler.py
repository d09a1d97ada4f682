"""A tiny upscaler of factor 2, random weights: Stable Diffusion's layout, no attention."""

from pathlib import Path

import torch

from ldm.checkpoint import Parts, load_tokenizer
from ldm.checkpoint.parts import Defaults
from ldm.checkpoint.peers import fresh_text_encoder
from ldm.models import build
from ldm.pretrain.vae import build_vae
from ldm.pretrain.vocabulary import train_vocabulary

SIDE = 16
KL = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 5,
    "norm_num_groups": 4,
    "scaling_factor": 0.08333,
    "mid_block_add_attention": False,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": SIDE,
    "in_channels": 8,
    "out_channels": 5,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2D",
    "cross_attention_dim": 4,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "num_class_embeds": 32,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
LOW_RES = {"_class_name": "DDPMScheduler", "beta_start": 1e-6, "beta_end": 0.02, "beta_schedule": "linear"}


def upscaler_parts(tokenizer_dir: Path) -> Parts:
    """The parts of an upscaler; its tokenizer is written into `tokenizer_dir`."""
    tokenizer_dir.mkdir(parents=True, exist_ok=True)
    train_vocabulary(["a red car", "snow"], 20, 8, tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    torch.manual_seed(0)
    text = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Parts(
        build(UNET),
        build_vae(KL),
        fresh_text_encoder(text, tokenizer),
        tokenizer,
        SCHEDULER,
        defaults=Defaults(num_inference_steps=2, guidance_scale=1.0, noise_level=0),
        low_res_scheduler=LOW_RES,
        max_noise_level=31,
    )
