"""Models of smaller latents: what is trained on has 64 x 64 pixels at least."""

import pytest
from tiny_families import BY_4, made_once

import ldm


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """As for all tests, but a latent is a square of 4 x 4 pixels."""
    return made_once(tmp_path_factory.mktemp("families"), vae=BY_4)


@pytest.fixture(scope="module")
def pipes(families):
    made = {}

    def get(name):
        if name not in made:
            made[name] = ldm.load(families(name)[0], dtype="fp32", device="cpu")
        return made[name]

    return get
