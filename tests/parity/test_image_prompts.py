"""IP-Adapters against diffusers' load_ip_adapter, in fp32, with the same weights and noise."""

import diffusers
import pytest
import torch
from conftest import relative_error
from diffusers.image_processor import IPAdapterMaskProcessor
from family_inputs import mask, picture
from tiny_families import FAMILIES, make_family
from tiny_image_prompts import make_adapter, make_encoder

import ldm
from ldm.request import ImagePromptUse, Request

COMMON = {
    "num_inference_steps": 2,
    "output_type": "latent",
    "height": 16,
    "width": 16,
    "prompt": "the red boat",
}
LAYOUT = {
    "sd1": {"up": {"block_1": [0.0, 0.9]}, "mid": 0.4},
    "sdxl": {"down": {"block_1": [0.7]}, "mid": 0.3},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of families, each with files of adapters and their image encoder beside."""
    root = tmp_path_factory.mktemp("image_prompts")
    for family in ("sd1", "sdxl"):
        peer = make_family(family, root / family)
        own = root / f"{family}_adapters"
        own.mkdir()
        make_encoder(own / "image_encoder")
        make_adapter(peer.unet, own / "plain.safetensors")
        make_adapter(peer.unet, own / "plain.bin")
        make_adapter(peer.unet, own / "plus.safetensors", "plus", seed=1)
        make_adapter(peer.unet, own / "full.bin", "full", seed=2)
    return root


@pytest.fixture(scope="module")
def pipes(made):
    return {family: ldm.load(made / family, dtype="fp32", device="cpu") for family in ("sd1", "sdxl")}


def pair(made, pipes, family, *files, scale=1.0):
    """Our pipeline and a fresh one of diffusers, both with these adapters."""
    folder, pipe = made / f"{family}_adapters", pipes[family]
    scales = scale if isinstance(scale, list) else [scale] * len(files)
    for file, own in zip(files, scales, strict=True):
        pipe = pipe.with_ip_adapter(folder / file, scale=own)
    peer = getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(made / family)
    peer.set_progress_bar_config(disable=True)
    peer.load_ip_adapter(str(folder), "", list(files))
    peer.set_ip_adapter_scale(scales)
    return pipe, peer


def compare(pipe, peer, images, guidance_scale=5.0, **arguments):
    """The same latents, and others than without the adapters."""
    torch.manual_seed(4)
    common = COMMON | {"latents": torch.randn(1, 4, 8, 8), "guidance_scale": guidance_scale}
    ours = pipe(**common, ip_adapter_image=images, **arguments).images
    assert relative_error(ours, peer(**common, ip_adapter_image=images, **arguments).images) < 1e-4
    assert relative_error(ours, pipe.base(**common).images) > 1e-2
    return ours


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("file", ["plain.safetensors", "plain.bin", "plus.safetensors", "full.bin"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_one_picture(made, pipes, family, file, guidance_scale):
    compare(*pair(made, pipes, family, file, scale=0.7), picture(), guidance_scale)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_pictures_of_an_adapter(made, pipes, family):
    pipe, peer = pair(made, pipes, family, "plus.safetensors")
    two = compare(pipe, peer, [[picture(), picture(seed=2)]])
    assert relative_error(two, compare(pipe, peer, [[picture(), picture(seed=3)]])) > 1e-3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_adapters(made, pipes, family):
    pipe, peer = pair(made, pipes, family, "plain.safetensors", "plus.safetensors", scale=[0.6, 0.9])
    compare(pipe, peer, [picture(), [picture(seed=2), picture(seed=3)]])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_scales_by_block(made, pipes, family):
    pipe, peer = pair(made, pipes, family, "plain.safetensors", scale=[LAYOUT[family]])
    compare(pipe, peer, picture())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_mask_for_each_picture(made, pipes, family, guidance_scale):
    pipe, peer = pair(made, pipes, family, "plus.safetensors", "plain.safetensors", scale=[0.8, 0.5])
    masks = IPAdapterMaskProcessor().preprocess([mask(), mask().rotate(90)], height=16, width=16)
    whole = IPAdapterMaskProcessor().preprocess([mask().rotate(180)], height=16, width=16)
    masks = {"ip_adapter_masks": [masks.reshape(1, 2, 16, 16), whole]}
    images = [[picture(), picture(seed=2)], [picture(seed=3)]]
    compare(pipe, peer, images, guidance_scale, cross_attention_kwargs=masks)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("file", ["plain.safetensors", "plus.safetensors"])
def test_embeddings_in_place_of_pictures(made, pipes, family, file):
    pipe, peer = pair(made, pipes, family, file)
    embeds = peer.prepare_ip_adapter_image_embeds(picture(), None, "cpu", 1, True)
    common = COMMON | {"latents": torch.randn(1, 4, 8, 8)}
    ours = pipe(**common, ip_adapter_image_embeds=embeds).images
    assert relative_error(ours, peer(**common, ip_adapter_image_embeds=embeds).images) < 1e-4
    assert relative_error(ours, pipe(**common, ip_adapter_image=picture()).images) < 1e-5


def test_files_of_a_request_draw_what_the_call_draws(made, pipes, tmp_path):
    """A mask of a file is made as IPAdapterMaskProcessor makes it."""
    folder = made / "sdxl_adapters"
    picture().save(tmp_path / "ref.png")
    mask(24, 24).save(tmp_path / "mask.png")
    _, peer = pair(made, pipes, "sdxl", "plus.safetensors", scale=0.6)
    torch.manual_seed(4)
    common = COMMON | {"latents": torch.randn(1, 4, 8, 8), "guidance_scale": 5.0}
    use = ImagePromptUse(
        adapter=str(folder / "plus.safetensors"), images=str(tmp_path / "ref.png"),
        masks=str(tmp_path / "mask.png"), scale=0.6,
    )  # fmt: skip
    ours = pipes["sdxl"](**common, image_prompts=[use])
    ready = IPAdapterMaskProcessor().preprocess([mask(24, 24)], height=16, width=16)
    theirs = peer(
        **common, ip_adapter_image=picture(), cross_attention_kwargs={"ip_adapter_masks": [ready]}
    ).images
    assert relative_error(ours.images, theirs) < 1e-4
    noted = ours.request.image_prompts[0]
    assert len(noted.images_sha256) == len(noted.masks_sha256) == 1
    assert None not in (noted.sha256, noted.image_encoder_sha256)
    assert Request.from_json(ours.request.to_json()) == ours.request
