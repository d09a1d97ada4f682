"""A tiny random classifier of a VAE's latents, saved as a folder."""

from conftest import randomise_

from ldm.checkpoint import save_module
from ldm.models import LatentClassifier
from ldm.models.classifier import ClassifierConfig, fingerprint

CLASSES = ("boat", "castle", "duck")


def tiny_classifier(vae, seed=0):
    config = ClassifierConfig(
        CLASSES, fingerprint(vae), vae.latent_channels, block_out_channels=(8, 16), norm_num_groups=4
    )
    return randomise_(LatentClassifier(config), seed)


def save_classifier(folder, vae, seed=0):
    save_module(tiny_classifier(vae, seed), folder)
    return folder
