"""Image prompts in a drawing: what they leave alone, beside what they go, and what is refused."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from conftest import relative_error
from family_inputs import mask, picture
from hub_configs import UNETS
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from tiny_image_prompts import adapter_shapes, make_adapter, make_encoder

import ldm
from ldm.adapters.image_prompt import _numbered, _shaped, cross_layers
from ldm.errors import UserError
from ldm.models import UNet
from ldm.pipeline import Inputs
from ldm.pipeline.image_prompts import layer_scales
from ldm.pipeline.model.moving import move
from ldm.pipeline.sample import draw_batch
from ldm.request import Request

FEW = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16, "prompt": "sea"}
LARGE = FEW | {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("image_prompts")
    peer = make_family("sd1", root / "sd1")
    make_family("sdxl", root / "sdxl")
    make_encoder(root / "image_encoder")
    make_adapter(peer.unet, root / "plain.safetensors")
    make_adapter(peer.unet, root / "plus.safetensors", "plus", seed=1)
    picture().save(root / "ref.png")
    mask().save(root / "mask.png")
    return root


@pytest.fixture(scope="module")
def base(made):
    return ldm.load(made / "sd1", dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def pipe(made, base):
    return base.with_ip_adapter(made / "plus.safetensors")


def drawn(pipe, **arguments):
    common = {"ip_adapter_image": picture(), "seed": 3, "sampler": "euler"} | FEW
    return pipe(**common | arguments).images


def test_the_model_stays_what_it_is(made, base, pipe):
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    plain = base(**FEW, seed=3, sampler="euler").images
    assert not torch.equal(drawn(pipe), plain)
    assert pipe.base.unet is base.unet
    after = base.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(pipe.base(**FEW, seed=3, sampler="euler").images, plain)


@pytest.mark.parametrize("scale", [0.0, {"mid": 0}])
def test_a_scale_of_zero_is_the_plain_drawing_bit_for_bit(made, base, scale):
    none = base.with_ip_adapter(made / "plus.safetensors", scale=scale)
    assert torch.equal(drawn(none), base(**FEW, seed=3, sampler="euler").images)


def test_a_picture_of_a_batch_is_that_drawn_alone(pipe):
    batch = drawn(pipe, seed=[4, 5, 6], num_images_per_prompt=3)
    alone = [drawn(pipe, seed=seed) for seed in (4, 5, 6)]
    assert relative_error(batch, torch.cat(alone)) < 1e-5
    prompts = drawn(pipe, prompt=["sea", "the red boat"], seed=[4, 5])
    assert relative_error(prompts[1:], drawn(pipe, prompt="the red boat", seed=5)) < 1e-5


@pytest.mark.parametrize(
    "beside",
    [
        {"cache_interval": 2, "num_inference_steps": 4},
        {"token_merging_ratio": 0.5},
        {"guidance_interval": (0.0, 0.5)},
        {"prompt": "sea AND the red boat"},
        {"prompt": "[sea:the red boat:0.5]"},
        {"hires_scale": 2.0, "hires_strength": None},
        {"tile_size": 16, "height": 32, "width": 32},
        {"tiling": "x"},
        {"guidance": "apg"},
        {"regions": [{"box": (0, 0, 8, 16), "prompt": "the red boat"}]},
    ],
    ids=lambda each: next(iter(each)),
)
def test_beside_what_else_changes_a_drawing(base, pipe, beside):
    given = {name: value for name, value in beside.items() if value is not None}
    with_picture = drawn(pipe, **given)
    common = {"seed": 3, "sampler": "euler"} | FEW | given
    assert relative_error(with_picture, base(**common).images) > 1e-2
    assert torch.equal(drawn(pipe, **given), with_picture)


def test_branches_one_by_one_are_those_together(pipe):
    request = Request(prompt="sea", num_inference_steps=2, sampler="euler", width=16, height=16)
    job = pipe.prepare(request, Inputs(ip_adapter_image=[[picture()]]))
    together = draw_batch(job, job.batches[0]).images
    unet = move(pipe.unet, pipe.device, None)
    unet.in_turn = True
    apart = replace(job, model=replace(job.model, parts=replace(job.model.parts, unet=unet)))
    assert relative_error(draw_batch(apart, job.batches[0]).images, together) < 1e-5


def test_weights_in_16_bits_and_what_overflows_in_them(made):
    """A drawing that is done again in fp32 has the adapter's layers in fp32 too."""
    half = ldm.load(made / "sd1", dtype="fp16", device="cpu").with_ip_adapter(made / "plain.safetensors")
    full = ldm.load(made / "sd1", dtype="fp32", device="cpu").with_ip_adapter(made / "plain.safetensors")
    assert relative_error(drawn(half), drawn(full)) < 0.1
    assert relative_error(drawn(full.to(torch.float16)), drawn(half)) < 1e-3
    unet = move(half.unet, half.device, torch.float16)
    with torch.no_grad():
        unet.conv_in.weight.mul_(60000)
    broken = replace(half, parts=replace(half.parts, unet=unet))
    with pytest.warns(UserWarning, match="done again in float32"):
        assert drawn(broken).isfinite().all()


def test_two_uses_of_an_adapter(made, base):
    """Of one file with other pictures and blocks: as the two of diffusers, each loaded."""
    use = {"adapter": str(made / "plus.safetensors"), "images": [str(made / "ref.png")]}
    uses = [use | {"scale": {"mid": 1}}, use | {"scale": {"up": {"block_1": [1, 0]}}}]
    common = {"seed": 3, "sampler": "euler"} | FEW
    both = base(**common, image_prompts=uses).images
    once = base(**common, image_prompts=[use | {"scale": {"mid": 1, "up": {"block_1": [1, 0]}}}]).images
    assert relative_error(both, once) < 1e-5


def test_a_mask_says_where(base, made):
    use = {"adapter": str(made / "plus.safetensors"), "images": [str(made / "ref.png")]}
    common = {"seed": 3, "sampler": "euler"} | FEW
    whole = base(**common, image_prompts=[use]).images
    assert torch.equal(base(**common, image_prompts=[use]).images, whole)
    within = base(**common, image_prompts=[use | {"masks": [str(made / "mask.png")]}])
    assert relative_error(within.images, whole) > 1e-2
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(made / "white.png")
    everywhere = base(**common, image_prompts=[use | {"masks": [str(made / "white.png")]}]).images
    assert relative_error(everywhere, whole) < 1e-5


# --- files -------------------------------------------------------------------------------------------------


WIDE = {"width": 1280, "hidden": 1280, "inner": 1280, "tokens": 16}
FULL = {  # projections of published files: their kinds and widths, with the U-Net of the family
    "ip-adapter_sd15": ("sd1", "plain", {"width": 1024}),
    "ip-adapter-plus_sd15": ("sd1", "plus", {"width": 1280, "hidden": 768, "inner": 768, "tokens": 16}),
    "ip-adapter-full-face_sd15": ("sd1", "full", {"width": 1280}),
    "ip-adapter_sdxl": ("sdxl", "plain", {"width": 1280}),
    "ip-adapter-plus_sdxl_vit-h": (
        "sdxl",
        "plus",
        {"width": 1280, "hidden": 1280, "inner": 1280, "tokens": 16},
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_key_lists_are_diffusers(name, tmp_path):
    """Every name and shape that diffusers' converter makes of such a file is ours, in the layer it means."""
    family, kind, sizes = FULL[name]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(UNETS[family])
        ours = UNet.from_config(UNETS[family])
        shapes = adapter_shapes(theirs, kind, **sizes)
        tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
    adapter = _shaped(_numbered(tensors, cross_layers(ours), tmp_path), cross_layers(ours), tmp_path)
    assert {key: t.shape for key, t in adapter.state_dict().items()} == {
        key: t.shape for key, t in _numbered(tensors, cross_layers(ours), tmp_path).items()
    }
    nested = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        nested[part][rest] = tensor
    projection = theirs._convert_ip_adapter_image_proj_to_diffusers(nested["image_proj"], True)
    assert {key: t.shape for key, t in projection.state_dict().items()} == {
        key: t.shape for key, t in adapter.image_proj.state_dict().items()
    }
    # diffusers counts its cross-attentions in this order, by twos.
    order = [each.removesuffix(".processor") for each in theirs.attn_processors if "attn2" in each]
    counted = {layer: str(2 * k + 1) for k, layer in enumerate(order)}
    assert {layer.name: layer.number for layer in cross_layers(ours)} == counted
    assert len(nested["ip_adapter"]) == 2 * len(order) == {"sd1": 32, "sdxl": 140}[family]


def test_other_spellings_of_a_file(made, base, tmp_path):
    tensors = load_file(made / "plain.safetensors")
    names = {layer.number: layer.name for layer in cross_layers(base.unet)}
    trained, within = {}, {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part == "image_proj":
            trained[f"image_proj_model.{rest}"] = tensor
            renamed = rest.replace("proj.", "image_embeds.")
            within[f"encoder_hid_proj.image_projection_layers.0.{renamed}"] = tensor
        else:
            number, to, _ = rest.split(".")
            trained[f"adapter_modules.{rest}"] = tensor
            within[f"{names[number]}.processor.{to}.0.weight"] = tensor
    wanted = drawn(base.with_ip_adapter(made / "plain.safetensors"))
    for k, spelled in enumerate((trained, within)):
        save_file(spelled, tmp_path / f"{k}.safetensors")
        found = base.with_ip_adapter(tmp_path / f"{k}.safetensors", made / "image_encoder")
        assert torch.equal(drawn(found), wanted)


def test_a_file_that_is_saved_is_the_one_that_was_read(made, base, tmp_path):
    base.with_ip_adapter(made / "plain.safetensors").adapted.image_prompts[0].network.save(
        tmp_path / "again.safetensors"
    )
    before, after = load_file(made / "plain.safetensors"), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- faults ------------------------------------------------------------------------------------------------


def broken(made, path, change):
    tensors = load_file(made / "plain.safetensors")
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: [t.pop(key) for key in [*t] if key.startswith("image_proj")], "no image projection"),
        (lambda t: t.pop("ip_adapter.1.to_k_ip.weight"), "missing: ip_adapter.1.to_k_ip.weight"),
        (lambda t: t.update({"lora_unet_x.alpha": torch.ones(1)}), "no IP-Adapter"),
        (lambda t: t.update({"ip_adapter.99.to_k_ip.weight": torch.ones(2, 24)}), "not of this model"),
        (lambda t: t["ip_adapter.1.to_v_ip.weight"].fill_(torch.nan), "holds NaN or Inf"),
        (lambda t: t.update({"ip_adapter.0.to_q_lora.down.weight": torch.ones(1, 24)}), "FaceID"),
    ],
)
def test_files_that_do_not_belong(made, base, tmp_path, change, says):
    file = broken(made, tmp_path / "a.safetensors", change)
    with pytest.raises(UserError, match=says):
        base.with_ip_adapter(file)


def test_what_is_refused_before_anything_is_drawn(made, base, pipe, tmp_path):
    xl = ldm.load(made / "sdxl", dtype="fp32", device="cpu")
    with pytest.raises(UserError, match=r"made for a model with text of 24 channels"):
        xl.with_ip_adapter(made / "plain.safetensors")
    with pytest.raises(UserError, match="no such file"):
        base.with_ip_adapter(tmp_path / "none.bin")
    make_encoder(tmp_path / "other", projection_dim=24, hidden_size=24)
    wrong = base.with_ip_adapter(made / "plus.safetensors", tmp_path / "other")
    alone = base.with_ip_adapter(broken(made, tmp_path / "b.safetensors", lambda t: None))
    cases = [
        (wrong, {}, "is not the image encoder of plus.safetensors, which reads states of 32 channels"),
        (alone, {}, "image encoder is not there"),
        (pipe, {"ip_adapter_image": None}, "has no picture"),
        (pipe, {"ip_adapter_image": [picture(), picture()]}, "has 2 for 1 IP-Adapters"),
        (pipe, {"ip_adapter_image": str(tmp_path / "none.png")}, "cannot read the picture"),
        (
            pipe,
            {"ip_adapter_image": None, "ip_adapter_image_embeds": [torch.ones(2, 1, 5, 9)]},
            "give .2, ",
        ),
        (base, {}, "has 1 for 0 IP-Adapters"),
        (pipe, {"target_prompt": "a boat", "image": picture(), "sampler": None}, "not allowed for an edit"),
    ]
    for model, changes, says in cases:
        with pytest.raises(UserError, match=says):
            drawn(model, **changes)
    use = {"adapter": str(made / "plus.safetensors"), "images": [str(made / "ref.png")]}
    common = {"seed": 3} | FEW
    masked = use | {"masks": [str(made / "mask.png")]}
    for given, more, says in [
        (use | {"sha256": "0" * 64}, {}, "is not the IP-Adapter that this picture was drawn with"),
        (use | {"images_sha256": ["0" * 64]}, {}, "has changed"),
        (use | {"image_encoder_sha256": "0" * 64}, {}, "is not the image encoder that"),
        (use | {"scale": {"up": {"block_7": 1}}}, {}, "this model has down.block_0, up.block_1, mid"),
        (use | {"scale": {"mid": [1, 2]}}, {}, "2 numbers for 1 transformers"),
        (use | {"masks": [str(made / "mask.png")] * 3}, {}, "3 masks for 1 pictures"),
        (masked, {"tile_size": 16, "height": 32, "width": 32}, "beside tile_size"),
    ]:
        with pytest.raises(UserError, match=says):
            base(**common | more, image_prompts=[given])


def test_an_encoder_that_gives_nan_is_told_of(made, base, tmp_path):
    model = make_encoder(tmp_path / "broken")
    with torch.no_grad():
        model.visual_projection.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match="gives NaN or Inf"):
        drawn(base.with_ip_adapter(made / "plain.safetensors", tmp_path / "broken"))


def test_scales_of_layers_follow_the_blocks(base):
    scales = layer_scales(base.unet, (("up.block_1", (0.5, 2.0)), ("down", (3.0,))))
    by_place = {name.partition(".transformer")[0]: scale for name, scale in scales.items()}
    assert by_place == {
        "down_blocks.0.attentions.0": 3.0, "up_blocks.1.attentions.0": 0.5,
        "up_blocks.1.attentions.1": 2.0, "mid_block.attentions.0": 0.0,
    }  # fmt: skip
