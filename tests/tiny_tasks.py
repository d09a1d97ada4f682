"""What the trainers' tasks are tested with: pictures, a vocabulary, the parts of a model."""

from pathlib import Path

import numpy as np
import torch

from ldm.checkpoint import Parts, load_tokenizer
from ldm.checkpoint.peers import fresh_text_encoder
from ldm.models import build
from ldm.pretrain.data import Pictures
from ldm.pretrain.vocabulary import train_vocabulary
from ldm.train.task import Task

CAPTIONS = ["a red car", "a blue house", "the sea at night", "snow"]


def tiny_pictures() -> Pictures:
    rng = np.random.default_rng(0)
    images = np.repeat(np.repeat(rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8), 8, 1), 8, 2)
    labels = rng.integers(0, 2, (12, 5), dtype=np.uint8)
    masks = rng.integers(0, 256, (12, 4, 4), dtype=np.uint8)
    captions = [[CAPTIONS[i % 4], CAPTIONS[(i + 1) % 4]] for i in range(12)]
    return Pictures(images, captions, labels, masks)


def tiny_tokenizer(folder: Path) -> Path:
    """A vocabulary of the captions, written to `folder`."""
    train_vocabulary(CAPTIONS * 30, merges=40, length=8, folder=folder)
    return folder


def tiny_vae():
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}
    blocks = {"num_encoder_blocks": [0, 1, 1, 1], "num_decoder_blocks": [1, 1, 1, 0], "latent_channels": 3}
    return build({"_class_name": "AutoencoderTiny", **channels, **blocks})


def unet_config():
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 4,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }


def tiny_parts(tokenizer_dir: Path, prediction: str) -> Parts:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(tokenizer_dir)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    unet = build(unet_config())
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "rescale_betas_zero_snr": prediction == "v_prediction",
    }
    return Parts(unet, tiny_vae(), fresh_text_encoder(text, tokenizer), tokenizer, scheduler)


def learn(task: Task, steps: int, size: int, lr: float) -> tuple[float, float]:
    """The held-out error before some steps of Adam, and after."""
    with torch.no_grad():
        before = task.evaluate()["held_out_mse"]
    optimiser = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr)
    for number in range(steps):
        optimiser.zero_grad()
        task(task.batch(torch.Generator().manual_seed(number), size, number))[0].backward()
        optimiser.step()
    with torch.no_grad():
        return before, task.evaluate()["held_out_mse"]
