"""Both autoencoders against diffusers' on the same weights."""

import diffusers
import pytest
import torch
from conftest import randomise_, relative_error
from diffusers import AutoencoderKL as ReferenceKL
from diffusers import AutoencoderTiny as ReferenceTiny
from full_size import pair, vae_errors
from hub_configs import VAES

from ldm.errors import UserError
from ldm.models import build


def ours_like(reference):
    """Our autoencoder with the config and the weights of a diffusers one; loading is strict both ways."""
    model = build({"_class_name": type(reference).__name__} | dict(reference.config))
    model.load_state_dict(reference.state_dict(), strict=True)
    return model.eval()


KL_CONFIGS = {
    "sd1": {},
    "no quant convs, shifted": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.3,
        "scaling_factor": 0.9,
        "latent_channels": 6,
    },
    "no attention, two levels": {
        "mid_block_add_attention": False,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
    },
}


@pytest.mark.parametrize("changes", KL_CONFIGS.values(), ids=KL_CONFIGS.keys())
def test_kl_equals_diffusers(reference_kl, changes):
    reference = reference_kl(**changes)
    ours = ours_like(reference)
    scale, shift = reference.config.scaling_factor, reference.config.shift_factor or 0
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        expected, moments = reference.encode(images).latent_dist, ours.encode(images)
        assert relative_error(moments.mean, expected.mean) < 1e-5
        assert relative_error(moments.std, expected.std) < 1e-5
        assert relative_error(moments.kl(), expected.kl()) < 1e-5
        latents = ours.encode_latents(images)
        assert relative_error(latents, (expected.mean - shift) * scale) < 1e-5
        size = (2, ours.latent_channels, 32 // ours.downscale, 48 // ours.downscale)
        noise = torch.randn(size)
        drawn = (expected.mean + expected.std * noise - shift) * scale
        assert relative_error(ours.encode_latents(images, noise), drawn) < 1e-5
        assert relative_error(ours.decode_latents(latents), reference.decode(expected.mean).sample) < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (45, 70)], ids=["even", "odd"])
@pytest.mark.parametrize("family", VAES)
def test_every_family_equals_diffusers(family, size):
    """The real config but 16 times narrower."""
    config = VAES[family]
    narrow = {key: [c // 16 for c in config[key]] for key in config if key.endswith("block_out_channels")}
    groups = {"norm_num_groups": 4} if "norm_num_groups" in config else {}
    cls = ReferenceKL if config["_class_name"] == "AutoencoderKL" else ReferenceTiny
    reference = randomise_(cls.from_config(config | narrow | groups))
    errors = vae_errors(reference, ours_like(reference), size)
    assert max(errors.values()) < 1e-5, errors


def test_full_size_of_stable_diffusion_1_equals_diffusers():
    errors = vae_errors(*pair(VAES["sd1"]), (64, 64))
    assert max(errors.values()) < 1e-5, errors


TAESD_CONFIGS = {
    "taesd": {},
    "scaled, gelu, two channels of sizes": {
        "act_fn": "gelu",
        "scaling_factor": 0.5,
        "shift_factor": 0.2,
        "latent_channels": 8,
        "encoder_block_out_channels": (8, 8, 8, 8),
    },
}


@pytest.mark.parametrize("changes", TAESD_CONFIGS.values(), ids=TAESD_CONFIGS.keys())
def test_tiny_equals_diffusers(reference_taesd, changes):
    reference = reference_taesd(**changes)
    ours = ours_like(reference)
    scale, shift = reference.config.scaling_factor, reference.config.shift_factor
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        expected = reference.encode(images).latents
        assert relative_error(ours.encode(images).mean, expected) < 1e-5
        assert relative_error(ours.encode_latents(images), (expected - shift) * scale) < 1e-5
        # Large latents too, where the decoder's soft clamp at 3 acts.
        latents = 4 * torch.randn_like(expected)
        assert (
            relative_error(ours.decode_latents((latents - shift) * scale), reference.decode(latents).sample)
            < 1e-5
        )
    assert ours.downscale == 8
    assert ours.latent_channels == reference.config.latent_channels


@pytest.mark.parametrize("kind", ["reference_kl", "reference_taesd"])
def test_the_idioms_of_diffusers_do_not_scale_twice(request, kind):
    reference = request.getfixturevalue(kind)(scaling_factor=0.3)
    ours, images = ours_like(reference), torch.rand(1, 3, 32, 32) * 2 - 1
    latents = torch.randn(1, 4, 32 // ours.downscale, 32 // ours.downscale)
    with torch.no_grad():
        wanted = reference.decode(latents / reference.config.scaling_factor).sample
        assert relative_error(ours.decode(latents / ours.config.scaling_factor).sample, wanted) < 1e-5
        assert relative_error(ours.decode(latents / 0.3, return_dict=False)[0], wanted) < 1e-5
        if kind == "reference_kl":
            theirs, dist = reference.encode(images).latent_dist, ours.encode(images).latent_dist
            assert relative_error(dist.mode(), theirs.mode()) < 1e-5
            drawn = (each.sample(torch.Generator().manual_seed(2)) for each in (dist, theirs))
            assert relative_error(*drawn) < 1e-5


@pytest.mark.parametrize("kind", ["reference_kl", "reference_taesd"])
def test_gradients_equal_diffusers(request, kind):
    reference = request.getfixturevalue(kind)()
    ours = ours_like(reference)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = ours.encode_latents(images)
    ours.decode_latents(latents).square().mean().backward()
    encoded = reference.encode(images)
    z = encoded.latents if kind == "reference_taesd" else encoded.latent_dist.mean
    reference.decode(z).sample.square().mean().backward()
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    largest = max(g.abs().max() for g in theirs.values())
    for name, p in ours.named_parameters():
        error = (p.grad - theirs[name]).abs().max()
        assert error <= 1e-4 * theirs[name].abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize(("kind", "cls"), [("reference_kl", ReferenceKL), ("reference_taesd", ReferenceTiny)])
def test_what_we_save_opens_in_diffusers(request, kind, cls):
    reference = request.getfixturevalue(kind)(scaling_factor=0.7)
    with torch.device("meta"):
        ours = build({"_class_name": cls.__name__} | dict(reference.config))
    ours.load_state_dict(reference.state_dict(), assign=True)
    again = cls.from_config(ours.to_config())
    again.load_state_dict(ours.state_dict())
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(again.eval().decode(latents).sample, reference.decode(latents).sample)
        assert relative_error(ours.decode_latents(latents * 0.7), reference.decode(latents).sample) < 1e-5
    assert again.config.scaling_factor == 0.7
    assert build(ours.to_config()).config == ours.config


ASYMMETRIC_CONFIGS = {
    "wider": {"up_block_out_channels": (24, 48), "layers_per_up_block": 2},
    "narrower": {"up_block_out_channels": (8, 8), "latent_channels": 6, "scaling_factor": 0.9},
}


@pytest.mark.parametrize("changes", ASYMMETRIC_CONFIGS.values(), ids=ASYMMETRIC_CONFIGS.keys())
def test_asymmetric_equals_diffusers(changes):
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "down_block_out_channels": (8, 16),
        "norm_num_groups": 4,
        **changes,
    }
    reference = randomise_(diffusers.AsymmetricAutoencoderKL(**config))
    ours = ours_like(reference)
    errors = vae_errors(reference, ours, (32, 48))
    assert max(errors.values()) < 1e-5, errors
    again = diffusers.AsymmetricAutoencoderKL.from_config(ours.to_config())
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes


def test_asymmetric_refuses_what_does_not_fit():
    with pytest.raises(UserError, match="lengths 1, 1, 2"):
        build({"_class_name": "AsymmetricAutoencoderKL", "up_block_out_channels": [64, 128]})
    with pytest.raises(UserError, match="unknown key layers_per_block = 2"):
        build({"_class_name": "AsymmetricAutoencoderKL", "layers_per_block": 2})
