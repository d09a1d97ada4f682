"""Tiny random CLIPs in transformers' layout."""

import torch
from tiny_pipeline import randomise, write_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

SIDE, WIDTH, WINDOW = 32, 8, 16
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": 16}


def write_processor(folder, **values):
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**(size | values)).save_pretrained(folder)


def make_clip(folder):
    """A whole CLIP of random weights, saved to `folder`; returns it."""
    tokenizer = write_tokenizer(folder, WINDOW)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "hidden_size": 12, "intermediate_size": 16} | ids
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": WINDOW}
    width = {"projection_dim": WIDTH}
    config = CLIPConfig(text_config=text | width, vision_config=VISION | width, **width)
    clip = CLIPModel(config).eval()
    for part in (clip.text_model, clip.vision_model, clip.text_projection, clip.visual_projection):
        randomise(part)
    clip.save_pretrained(folder)
    write_processor(folder)
    return clip


def make_tower(folder):
    """An image tower alone."""
    torch.manual_seed(0)
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=WIDTH))
    tower.save_pretrained(folder)
    write_processor(folder)
    return tower
