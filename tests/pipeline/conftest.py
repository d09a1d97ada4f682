"""The tiny families, as folders and as our pipelines; nothing changes them."""

import pytest

import ldm


@pytest.fixture(scope="session")
def folder_of(families):
    """The folder of a family, made when first asked for."""
    return lambda name: families(name)[0]


@pytest.fixture(scope="session")
def models(folder_of):
    """Our pipelines by family."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = ldm.load(folder_of(name), device="cpu", dtype="fp32")
        return made[name]

    return get
