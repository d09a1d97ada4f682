"""The VAEs over bands of rows, against themselves untiled."""

import weakref

import pytest
import torch
from conftest import TINY_KL, TINY_TAESD, randomise_, relative_error
from full_size import random_tensors
from hub_configs import VAES
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.models import bands, build, vae_bands
from ldm.models.vae_bands import decode_bands, encode_bands
from ldm.pipeline import networks

ASYMMETRIC = {
    "down_block_out_channels": (16, 32, 32),
    "up_block_out_channels": (24, 40, 40),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_down_block": 1,
    "layers_per_up_block": 2,
    "norm_num_groups": 8,
}
F4 = {"block_out_channels": (16, 32, 32), "layers_per_block": 1}
F4 |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
CONFIGS = {
    "kl-f8": {"_class_name": "AutoencoderKL"} | TINY_KL,
    "kl-f4": {"_class_name": "AutoencoderKL"} | TINY_KL | F4,
    "no attention": {"_class_name": "AutoencoderKL", "mid_block_add_attention": False} | TINY_KL,
    "asymmetric": {"_class_name": "AsymmetricAutoencoderKL"} | ASYMMETRIC,
    "tiny": {"_class_name": "AutoencoderTiny", "act_fn": "silu"} | TINY_TAESD,
}


@pytest.fixture
def thin_bands(monkeypatch):
    monkeypatch.setattr(bands, "BAND_BYTES", 1)
    monkeypatch.setattr(bands, "BANDS_EACH", 2)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("size", "keep"), [((64, 48), 0), ((37, 101), 2000), ((9, 70), 2**40)], ids=["even", "odd", "thin"]
)
@torch.no_grad()
def test_equals_the_untiled_one(kind, size, keep, thin_bands):
    """Every kind, sizes that no band divides, two pictures at once, maps that are held and made again."""
    vae, (height, width) = randomise_(build(CONFIGS[kind])), size
    images = (torch.rand(2, 3, height * 2, width * 2) * 2 - 1).to(memory_format=torch.channels_last)
    whole, by_bands = vae.encode(images), encode_bands(vae, images, keep)
    assert relative_error(by_bands.mean, whole.mean) < 1e-5
    assert relative_error(by_bands.std + 1, whole.std + 1) < 1e-5
    latents = torch.randn(2, 4, height // 4, width // 4)
    assert relative_error(decode_bands(vae, latents, keep), vae.decode_latents(latents)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "upscaler", "taesd"])
@pytest.mark.parametrize("size", [(1024, 1024), (1000, 1016)], ids=str)
@torch.no_grad()
def test_at_full_size(kind, size):
    """KL of f = 8 and 4 and the tiny one, with their real shapes, in bands as they are by default."""
    with torch.device("meta"):
        vae = build(VAES[kind])
    vae.load_state_dict(random_tensors(vae), assign=True)
    latents = torch.randn(1, 4, size[0] // vae.downscale, size[1] // vae.downscale)
    assert relative_error(decode_bands(vae, latents), vae.decode_latents(latents)) < 1e-4
    images = torch.rand(1, 3, size[0] + 3, size[1] - 5) * 2 - 1
    assert relative_error(encode_bands(vae, images).mean, vae.encode(images).mean) < 1e-4


class Held(TorchDispatchMode):
    """The most bytes of tensors that were there at once, of those made meanwhile."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.note(each.untyped_storage())
        return out

    def note(self, storage):
        at = storage.data_ptr()
        if at not in self.sizes:
            self.sizes[at] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, at)

    def gone(self, at):
        self.now -= self.sizes.pop(at)


@torch.no_grad()
def test_about_one_map_is_held(monkeypatch):
    monkeypatch.setattr(bands, "BAND_BYTES", 2**16)
    vae = randomise_(build(CONFIGS["kl-f8"]))
    latents, unit = torch.randn(1, 4, 32, 32), 4 * 16 * 256**2  # the finest map between two resnets
    peaks = {}
    for name, decode in {"whole": vae.decode_latents, "bands": lambda x: decode_bands(vae, x)}.items():
        with Held() as held:
            decode(latents)
        peaks[name] = held.peak / unit
    assert peaks["bands"] < 2 < 5 < peaks["whole"]


@pytest.mark.parametrize("over_bands", [None, True, False])
@torch.no_grad()
def test_as_much_at_once_as_fits(monkeypatch, over_bands):
    vae, asked = randomise_(build(CONFIGS["kl-f8"])), []
    vae.over_bands = over_bands
    monkeypatch.setattr(vae_bands, "decode_bands", lambda vae, x, keep=0: asked.append("bands") or x[:, :3])
    monkeypatch.setattr(vae, "decode_latents", lambda x: asked.append(len(x)) or x[:, :3])
    one = vae_bands.DECODE_BYTES[4] * 32 * 64 * 64 / (1 - vae_bands.MARGIN)
    for free in (5 * one, 2.5 * one, 0.9 * one):
        assert vae_bands.decode(vae, torch.zeros(3, 4, 8, 8), free).shape[0] == 3
    automatic = [3, 2, 1, "bands", "bands", "bands"]
    assert asked == {None: automatic, True: ["bands"] * 9, False: [3, 3, 3]}[over_bands]


@torch.no_grad()
def test_a_card_that_runs_out_of_memory_nevertheless_goes_over_bands(monkeypatch):
    vae, latents = randomise_(build(CONFIGS["kl-f8"])), torch.randn(2, 4, 4, 4)
    expected = vae.decode_latents(latents)

    def full(latents):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vae, "decode_latents", full)
    assert relative_error(vae_bands.decode(vae, latents, 2.0**40), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:the VAE's")
def test_what_overflows_is_made_again_in_fp32_over_bands(monkeypatch, thin_bands):
    vae = randomise_(build(CONFIGS["kl-f8"])).half()
    vae.over_bands = True
    with torch.no_grad():
        vae.decoder.up_blocks[-1].resnets[0].conv1.weight.mul_(3e3)
        vae.decoder.up_blocks[-1].resnets[0].conv2.weight.mul_(2e4)
    latents = torch.randn(1, 4, 6, 6)
    with pytest.warns(UserWarning, match="decoder gave NaN or Inf in float16"):
        found = networks.decode(vae, latents)
    with torch.no_grad():
        expected = (vae.float().decode_latents(latents) / 2 + 0.5).clamp(0, 1)
    assert relative_error(found, expected) < 1e-5
