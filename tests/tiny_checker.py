"""A tiny random safety checker, made and saved by diffusers."""

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tiny_clip import SIDE, VISION, write_processor
from tiny_pipeline import randomise
from transformers import CLIPConfig

WIDTH = 8


@torch.no_grad()
def make_checker(folder, concepts=0.0, special=0.0):
    """Saved as `folder`/safety_checker with `folder`/feature_extractor; thresholds are the same for all."""
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=WIDTH))
    randomise(checker)
    for name, threshold in (("concept_embeds_weights", concepts), ("special_care_embeds_weights", special)):
        getattr(checker, name).fill_(threshold)
    checker.save_pretrained(folder / "safety_checker")
    write_processor(folder / "feature_extractor", size={"shortest_edge": SIDE})
    return checker.eval()
