"""A widened U-Net draws as before, is saved as an inpainting model, and diffusers draws the same with it."""

import diffusers
import pytest
import torch
from conftest import relative_error
from PIL import Image

import ldm
from ldm.checkpoint import load_parts, save_folder
from ldm.finetune.inpainting import widen, widen_unet
from ldm.models import build
from ldm.pretrain.widen import widen_latents, widen_vae
from ldm.runtime import choose

FP32 = choose("cpu", "fp32")


def call(unet, sample, seed=1):
    config, generator = unet.config, torch.Generator().manual_seed(seed)
    dtype, told = unet.conv_in.weight.dtype, {}
    if "pooled" in config.conditioning:
        numbers = 6 * config.addition_time_embed_dim
        pooled = config.projection_class_embeddings_input_dim - numbers
        told["pooled"] = torch.randn(2, pooled, generator=generator).to(dtype)
        told["time_ids"] = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    context = torch.randn(2, 5, config.cross_attention_dim, generator=generator).to(dtype)
    with torch.no_grad():
        return unet(sample.to(dtype, memory_format=torch.channels_last), 321, context, **told)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_output_is_the_old_one_whatever_is_beside(families, family, dtype):
    unet = load_parts(families(family)[0], choose("cpu", dtype)).unet
    wide = widen_unet(unet)
    latents = torch.randn(2, 4, 8, 8)
    expected = call(unet, latents)
    for scale in (0, 1, 100):
        beside = scale * torch.randn(2, 5, 8, 8)
        assert torch.equal(call(wide, torch.cat([latents, beside], 1)), expected)
    assert wide.config.in_channels == wide.conv_in.in_channels == 9
    assert wide.to_config() == {**unet.to_config(), "in_channels": 9}


def test_all_else_is_shared_and_nothing_changes(families):
    unet = load_parts(families("sd1")[0], choose("cpu", "bf16")).unet
    before = unet.conv_in.weight.clone()
    own = dict(unet.named_parameters())
    shared = dict(widen_unet(unet).named_parameters())
    assert own.keys() == shared.keys()
    assert [name for name in own if own[name] is not shared[name]] == ["conv_in.weight"]
    assert torch.equal(unet.conv_in.weight, before)
    assert unet.config.in_channels == unet.conv_in.in_channels == 4
    new = shared["conv_in.weight"]
    assert new.dtype is torch.bfloat16
    assert new.is_contiguous(memory_format=torch.channels_last)
    assert not new.requires_grad


def test_new_weights_learn_from_the_first_step(families):
    unet = load_parts(families("sd1")[0], FP32).unet
    wide = widen_unet(unet.requires_grad_())
    assert wide.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    wide(torch.randn(1, 9, 8, 8), 5, torch.randn(1, 3, unet.config.cross_attention_dim)).sum().backward()
    assert wide.conv_in.weight.grad[:, 4:].abs().amax((0, 2, 3)).min() > 0


@pytest.mark.parametrize("family", ["sd1", "sdxl", "refiner"])
def test_a_saved_folder_is_an_inpainting_model(families, family, tmp_path):
    parts = load_parts(families(family)[0], FP32)
    wide = widen(parts)
    assert wide.weights is None  # the U-Net is no longer the one in the file
    save_folder(tmp_path / "wide", wide)
    ours = ldm.load(tmp_path / "wide", dtype="fp32", device="cpu")
    for name, tensor in wide.unet.state_dict().items():
        assert torch.equal(ours.unet.state_dict()[name], tensor)
    kind = "StableDiffusionInpaintPipeline" if family == "sd1" else "StableDiffusionXLInpaintPipeline"
    peer = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "wide"
    )  # of the class that the folder names
    assert type(peer) is getattr(diffusers, kind)
    peer.set_progress_bar_config(disable=True)

    rng = torch.Generator().manual_seed(2)
    picture = Image.fromarray((torch.rand(64, 64, 3, generator=rng) * 255).byte().numpy())
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))
    # Weights that are not zero any more: the channels' order shows.
    for unet in (ours.unet, peer.unet):
        with torch.no_grad():
            unet.conv_in.weight[:, 4:] = 0.2 * torch.randn(16, 5, 3, 3, generator=rng.manual_seed(3))
    asked = {"prompt": "the red boat", "image": picture, "mask_image": mask, "height": 64, "width": 64}
    asked |= {"num_inference_steps": 3, "strength": 1.0, "output_type": "latent"}
    drawn = ours(**asked, generator=torch.Generator().manual_seed(4)).images
    theirs = peer(**asked, generator=torch.Generator().manual_seed(4)).images
    assert relative_error(drawn, theirs) < 1e-4


def test_what_can_be_widened(families):
    parts = load_parts(families("inpaint")[0], FP32)
    assert widen(parts) is parts
    assert widen_unet(parts.unet) is parts.unet
    assert widen_unet(load_parts(families("sd1")[0], FP32).unet, 4).config.in_channels == 9
    for family, name, taken in (("pix2pix", "pix2pix", 8), ("upscaler", "upscale", 7)):
        parts = load_parts(families(family)[0], FP32)
        with pytest.raises(ldm.UserError, match=rf"\({name}\): its U-Net takes {taken} channels"):
            widen(parts)
        with pytest.raises(ldm.UserError, match=f"of {taken} input channels cannot be made"):
            widen_unet(parts.unet)


def tiny_vae(channels=3):
    torch.manual_seed(0)
    return build(
        {
            "_class_name": "AutoencoderTiny",
            "encoder_block_out_channels": [8] * 4,
            "decoder_block_out_channels": [8] * 4,
            "num_encoder_blocks": [0, 1, 1, 1],
            "num_decoder_blocks": [1, 1, 1, 0],
            "latent_channels": channels,
        }
    )


@torch.no_grad()
def test_a_vae_of_more_channels_draws_as_before_and_its_first_channels_are_the_old_ones():
    vae = tiny_vae()
    wide = widen_vae(vae, 5)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(wide.encode_latents(x)[:, :3], vae.encode_latents(x))
    assert wide.encode_latents(x)[:, 3:].std() > 0.001
    latents = torch.randn(2, 5, 4, 4)
    assert relative_error(wide.decode_latents(latents), vae.decode_latents(latents[:, :3])) < 1e-6
    assert wide.to_config() == vae.to_config() | {"latent_channels": 5}
    with pytest.raises(ldm.errors.UserError, match="can only widen"):
        widen_vae(wide, 3)


def test_the_unet_of_a_widened_vae_answers_as_before(families):
    unet = load_parts(families("sd1")[0], FP32).unet
    wide = widen_latents(unet, 6)
    latents = torch.randn(2, 6, 8, 8)
    out = call(wide, latents)
    assert relative_error(out[:, :4], call(unet, latents[:, :4])) < 1e-6
    assert not out[:, 4:].any()
    with pytest.raises(ldm.errors.UserError, match="can only widen"):
        widen_latents(wide, 4)
