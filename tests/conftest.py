"""What all tests share: no network, at most two threads, tiny random models of the reference classes."""

import gc
import os
import shutil
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Beside another process of tests, for this one and for those that it starts: threads of more than there are
# cores for wait for each other by spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# A background job ignores SIGINT, and so would the processes that tests start and then interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is imported stays: it need not be looked through, again and again, for what can go.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _deterministic():
    """The same numbers in every test, whichever ran before."""
    torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", 2))))
    torch.manual_seed(0)
    yield
    if "accelerate" in sys.modules:  # it keeps the first training's precision for the whole process
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random pipeline folder, not to be changed."""
    from tiny_pipeline import make_folder

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_folder(folder)
    return folder


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """name -> (a tiny random folder of that family, diffusers' pipeline), made once, not to be changed."""
    from tiny_families import made_once

    return made_once(tmp_path_factory.mktemp("families"))


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def randomise_(module, seed=0):
    """Every parameter random, so that a swapped bias or norm shows; activations keep about unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return module.eval()


def relative_error(ours, theirs):
    """max |a - b| / max |b|."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
TINY_KL = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "sample_size": 64,
}
TINY_TAESD = {
    "encoder_block_out_channels": (16, 16, 16, 16),
    "decoder_block_out_channels": (16, 16, 16, 16),
    "num_encoder_blocks": (1, 2, 1, 1),
    "num_decoder_blocks": (1, 1, 2, 1),
}


@pytest.fixture
def reference_unet():
    """A factory of tiny U-Nets of diffusers, of the SD 1.x shape, with all weights random."""
    from diffusers import UNet2DConditionModel

    return lambda **changes: randomise_(UNet2DConditionModel(**TINY_UNET | changes))


@pytest.fixture
def reference_kl():
    """A factory of tiny AutoencoderKLs of diffusers, with all weights random."""
    from diffusers import AutoencoderKL

    return lambda **changes: randomise_(AutoencoderKL(**TINY_KL | changes))


@pytest.fixture
def reference_taesd():
    """A factory of tiny AutoencoderTinys of diffusers, with all weights random."""
    from diffusers import AutoencoderTiny

    return lambda **changes: randomise_(AutoencoderTiny(**TINY_TAESD | changes))
