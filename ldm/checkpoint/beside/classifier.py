"""Classifiers of noisy latents on disk: a folder of config.json and weights, read as strictly as a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.checkpoint.fill import fill
from ldm.checkpoint.io import weight_files
from ldm.checkpoint.original.component import build_stored, named
from ldm.checkpoint.parts import MODEL_STEM
from ldm.checkpoint.weights import open_stored
from ldm.errors import UserError
from ldm.files import sha256, weights_folder
from ldm.models import VAE, LatentClassifier
from ldm.models.classifier import fingerprint, same_latents

EMBEDDED_CLASSIFIER = "postcard-classifier"  # comes with the package, for the embedded model


@dataclass(frozen=True, eq=False)
class ClassifierFile:
    """A classifier, ready to use, and which files it was."""

    network: LatentClassifier  # fp32
    path: Path
    sha256: str


def read_classifier(folder: str | Path, vae: VAE, device: torch.device) -> ClassifierFile:
    """The classifier in a folder, or `EMBEDDED_CLASSIFIER`, for a model of that VAE.

    Raises:
        UserError: if it is missing, damaged, no classifier, or one of another VAE's latents.
    """
    path = Path(folder)
    if folder == EMBEDDED_CLASSIFIER and not path.exists():
        path = weights_folder(EMBEDDED_CLASSIFIER)
    if not (path / "config.json").exists():
        raise UserError(f"{path}: no classifier; give a folder that scripts/train_classifier.py has exported")
    stored = open_stored(path, MODEL_STEM)
    empty = build_stored(stored)
    if not isinstance(empty, LatentClassifier):
        raise UserError(f"{path}: holds a {type(empty).__name__}, no classifier")
    if not same_latents(empty.config.vae, fingerprint(vae)):
        raise UserError(
            f"{path}: a classifier for another model: it knows the latents of another VAE; "
            "train one for this model (scripts/train_classifier.py)"
        )
    network = fill(empty, named(stored), stored.path, torch.float32).to(device).requires_grad_(False).eval()
    return ClassifierFile(network, path, sha256(path / "config.json", *weight_files(stored.path)))
