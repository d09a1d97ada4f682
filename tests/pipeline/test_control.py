"""Control pictures in a request: kept, replayed, weighted, and refused where they cannot be."""

import numpy as np
import pytest
import torch
from family_inputs import picture
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint.keymap import module_keys, to_original
from ldm.checkpoint.save import save_module
from ldm.control.controls import soft_weights
from ldm.errors import UserError
from ldm.models import ControlNet, T2IAdapter
from ldm.models.control import T2IAdapterConfig
from ldm.pipeline.deciding.plan import WAYS
from ldm.pipeline.deciding.prepare import plan_of

HINT = {"conditioning_embedding_out_channels": (4, 8)}  # the tiny VAE halves pictures once


@pytest.fixture(scope="session")
def places(models, tmp_path_factory):
    """Folders with a ControlNet of each family, whose outputs are no longer zero; a control picture."""
    root = tmp_path_factory.mktemp("controls")
    torch.manual_seed(0)
    for family in ("sd1", "sdxl"):
        net = ControlNet.from_unet(models(family).unet, **HINT)
        for each in net.parameters():
            each.data += 0.1 * torch.randn_like(each)
        save_module(net, root / family)
    picture().save(root / "edges.png")
    return root


def drawn(pipe, **arguments):
    return pipe(
        "the red boat", **{"num_inference_steps": 3, "seed": 1, "output_type": "pt", **arguments}
    ).images


def use_of(places, family="sd1", **fields):
    return {"model": str(places / family), "image": str(places / "edges.png"), **fields}


def differ(a, b):
    return float((a - b).abs().max())


def test_a_strength_of_zero_is_no_control_bit_for_bit(models, places):
    pipe = models("sd1")
    assert torch.equal(drawn(pipe, control=[use_of(places, scale=0)]), drawn(pipe))
    assert pipe.prepare(ldm.Request(control=[{"model": "nowhere", "scale": 0}])).controls == ()


def test_what_a_picture_keeps_draws_it_again(models, places, tmp_path):
    pipe = models("sd1")
    fields = {"scale": 0.7, "end": 0.7, "mode": "control"}
    first = pipe(
        "a boat", num_inference_steps=3, seed=1, output_type="pt", control=[use_of(places, **fields)]
    )
    kept = ldm.Request.from_json(first.request.to_json())
    assert kept.control[0].sha256
    assert kept.control[0].image_sha256
    assert torch.equal(pipe.generate(kept, output_type="pt").images, first.images)
    changed = kept.replace(control=[kept.control[0].replace(sha256="0" * 64)])
    with pytest.raises(UserError, match="has changed: its SHA-256"):
        pipe.generate(changed)
    in_memory = pipe("a boat", num_inference_steps=3, seed=1, control=[use_of(places) | {"image": picture()}])
    assert in_memory.request.not_kept == ("control_image",)


def test_a_picture_of_a_batch_is_the_picture_alone(models, places):
    pipe = models("sd1")
    both = drawn(pipe, control=[use_of(places, mode="control")], num_images_per_prompt=2)
    alone = drawn(pipe, control=[use_of(places, mode="control")], seed=2)
    assert differ(both[1:], alone) < 1e-5


def test_modes_weigh_outputs_as_in_a1111(models, places):
    pipe = models("sd1")
    assert soft_weights(12) == pytest.approx([0.825 ** (12 - i) for i in range(13)])
    assert soft_weights(9) == pytest.approx([0.825 ** (12 - i) for i in range(10)])
    assert soft_weights(4)[0] == pytest.approx(0.825**12)
    found = [
        drawn(pipe, control=[use_of(places, mode=mode)])
        for mode in ("balanced", "prompt", "control", "guess")
    ]
    assert all(differ(a, b) > 1e-4 for i, a in enumerate(found) for b in found[:i])
    by_name = drawn(pipe, control=[use_of(places, mode="ControlNet is more important")])
    assert torch.equal(by_name, found[2])
    # Without a guidance there is no branch that could be spared.
    plain = {"guidance_scale": 1.0}
    assert torch.equal(
        drawn(pipe, control=[use_of(places, mode="control")], **plain),
        drawn(pipe, control=[use_of(places, mode="prompt")], **plain),
    )


def test_masks_say_where_it_acts(models, places):
    pipe, half = models("sd1"), np.zeros((16, 16), dtype=np.uint8)
    half[:, :8] = 255
    from PIL import Image

    Image.fromarray(half).save(places / "half.png")
    Image.fromarray(half * 0).save(places / "none.png")
    Image.fromarray(half * 0 + 255).save(places / "all.png")
    whole = drawn(pipe, control=[use_of(places)])
    masked = {
        name: drawn(pipe, control=[use_of(places, mask=str(places / f"{name}.png"))])
        for name in ("none", "half", "all")
    }
    assert differ(masked["none"], drawn(pipe)) < 1e-6
    assert differ(masked["all"], whole) < 1e-6
    assert differ(masked["half"], whole) > 1e-4 < differ(masked["half"], masked["none"])


def test_tiles_see_their_part_of_the_picture(models, places):
    """Of one window of all it is the same; of a constant picture a tile's part is as any other's."""
    pipe, flat = models("sd1"), picture(16, 32)
    use = {"model": str(places / "sd1"), "image": flat}
    whole = drawn(pipe, control=[use], width=32, height=16)
    tiled = drawn(pipe, control=[use], width=32, height=16, tile_size=16)
    assert differ(whole, tiled) > 1e-4
    job = pipe.prepare(
        ldm.Request(control=[use_of(places)], width=32, height=16, tile_size=16, num_inference_steps=1)
    )
    from ldm.control.controls import _cut

    (control,) = job.controls
    windows = job.tiles.windows(8, 16)
    parts = [_cut(control.pictures[0], window) for window in windows]
    assert torch.equal(parts[0], control.pictures[0][..., :16])
    assert torch.equal(parts[-1], control.pictures[0][..., 16:])


def test_a_seamless_picture_has_seamless_controls(models, places):
    (control,) = models("sd1").prepare(ldm.Request(control=[use_of(places)], tiling="xy")).controls
    shown, network = control.pictures[0], control.file.network
    with torch.no_grad():
        rolled = network.hint(shown.roll((4, 6), (2, 3)))
        assert differ(rolled, network.hint(shown).roll((2, 3), (2, 3))) < 1e-5


def test_deep_features_and_merged_tokens_go_on_with_it(models, places):
    pipe, control = models("sd1"), [use_of(places)]
    plain = drawn(pipe, control=control, num_inference_steps=6)
    assert torch.equal(drawn(pipe, control=control, num_inference_steps=6, cache_interval=1), plain)
    cached = drawn(pipe, control=control, num_inference_steps=6, cache_interval=2)
    assert 1e-6 < differ(cached, plain) < differ(drawn(pipe, num_inference_steps=6), plain)
    assert differ(drawn(pipe, control=control, token_merging_ratio=0.5), drawn(pipe, control=control)) > 1e-6


def test_a_second_pass_is_shown_it_again(models, places):
    pipe = models("sd1")
    large = drawn(pipe, control=[use_of(places)], hires_scale=2.0)
    job = pipe.prepare(ldm.Request(control=[use_of(places)], hires_scale=2.0, num_inference_steps=3))
    assert job.then.job.controls[0].pictures[0].shape[-2:] == (32, 32)
    assert large.shape[-2:] == (32, 32)


def test_a_picture_of_another_size_is_stretched_or_cropped(models, places, tmp_path):
    pipe, wide = models("sd1"), tmp_path / "wide.png"
    picture(16, 32).save(wide)
    use = use_of(places) | {"image": str(wide)}
    with pytest.warns(UserWarning, match="stretched to fit"):
        pipe.prepare(ldm.Request(control=[use]))
    (control,) = pipe.prepare(ldm.Request(control=[use | {"resize": "crop"}])).controls
    middle = np.asarray(picture(16, 32))[:, 8:24]
    assert torch.equal(control.pictures[0][0].movedim(0, -1) * 255, torch.from_numpy(middle.copy()).float())


def test_memory_counts_it_and_weights_come_when_they_are_used(models, places, folder_of):
    pipe = models("sd1")
    expected = drawn(pipe, control=[use_of(places)])
    sleeping = ldm.load(folder_of("sd1"), device="cpu", dtype="fp32", max_memory="8GiB")
    assert torch.equal(drawn(sleeping, control=[use_of(places)]), expected)
    job = pipe.prepare(ldm.Request(control=[use_of(places)], num_inference_steps=2))
    plan = plan_of(job, 8 << 30)
    (control,) = job.controls
    own = sum(each.nbytes for each in control.file.network.parameters())
    assert plan.weights["control sd1"] == own
    for way in WAYS:
        stages = {stage.name.partition(",")[0]: stage for stage in plan.predict(way).stages}
        assert stages["control sd1"].beside > 0
    without = plan_of(pipe.prepare(ldm.Request(num_inference_steps=2)), 8 << 30).predict(WAYS[0])
    assert plan.predict(WAYS[0]).peak >= without.peak + own - (without.base - plan.base)


# --- files -----------------------------------------------------------------------------------------------


def test_an_original_file_is_the_folder(models, places, tmp_path):
    pipe, net = models("sd1"), None
    from ldm.checkpoint.original.component import load_module

    net = load_module(places / "sd1")
    tensors = to_original(module_keys(net), net.state_dict())
    assert "zero_convs.0.0.weight" in tensors
    assert "input_hint_block.0.weight" in tensors
    save_file(
        {f"control_model.{name}": t.contiguous() for name, t in tensors.items()},
        tmp_path / "original.safetensors",
    )
    save_file(
        load_file(places / "sd1" / "diffusion_pytorch_model.safetensors"), tmp_path / "diffusers.safetensors"
    )
    expected = drawn(pipe, control=[use_of(places)])
    for name in ("original", "diffusers"):
        found = drawn(pipe, control=[use_of(places) | {"model": str(tmp_path / f"{name}.safetensors")}])
        assert torch.equal(found, expected), name
    del tensors["zero_convs.1.0.bias"]
    save_file(
        {f"control_model.{name}": t.contiguous() for name, t in tensors.items()},
        tmp_path / "less.safetensors",
    )
    with pytest.raises(UserError, match=r"tensors missing: control_model.zero_convs.1.0.bias"):
        drawn(pipe, control=[use_of(places) | {"model": str(tmp_path / "less.safetensors")}])


def test_a_control_lora_is_the_u_net_and_its_differences(models, places, tmp_path):
    pipe = models("sd1")
    from ldm.checkpoint.original.component import load_module

    net = load_module(places / "sd1")
    unet = dict(pipe.unet.named_parameters())
    tensors = {"lora_controlnet": torch.zeros(1)}
    for key in module_keys(net):
        (name,) = key.names
        tensor = net.state_dict()[name]
        if name.endswith(".weight") and tensor.ndim > 1 and name in unet:
            change = (tensor - unet[name]).flatten(1)
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            stem = key.original.removesuffix(".weight")
            tensors |= {f"{stem}.up": (u * s).contiguous(), f"{stem}.down": v.contiguous()}
        else:
            tensors[key.original] = tensor.contiguous()
    save_file(tensors, tmp_path / "lora.safetensors")
    found = drawn(pipe, control=[use_of(places) | {"model": str(tmp_path / "lora.safetensors")}])
    assert differ(found, drawn(pipe, control=[use_of(places)])) < 1e-4


def test_an_original_adapter_is_read(models, places, tmp_path):
    pipe = models("sd1")
    torch.manual_seed(2)
    net = T2IAdapter(T2IAdapterConfig(channels=(16, 32), downscale_factor=8))
    tensors = {}
    for name, tensor in net.state_dict().items():
        parts = name.removeprefix("adapter.").split(".")
        if "resnets" in parts:
            parts[1:4] = [str(2 * int(parts[1]) + int(parts[3]))]
        elif parts[0] == "body":
            parts[1] = str(2 * int(parts[1]))
        tensors[".".join(parts)] = tensor
    assert {"body.0.block1.weight", "body.2.in_conv.weight"} <= tensors.keys()
    save_file(tensors, tmp_path / "adapter.safetensors")
    file = pipe.controls.get(str(tmp_path / "adapter.safetensors"))
    assert file.network.config == net.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(file.network.state_dict().values(), net.state_dict().values(), strict=True)
    )


def lllite(unet, scale=0.1):
    """kohya's tensors for the queries of the finest level that attends."""
    tensors = {}
    for place, module in unet.named_modules():
        if place.startswith("down_blocks.0") and place.endswith("attn1.to_q"):
            dim, name = module.in_features, "lllite_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
            shapes = {
                "conditioning1.0": (4, 3, 2, 2), "conditioning1.2": (6, 4, 1, 1),
                "down.0": (5, dim), "mid.0": (5, 5 + 6), "up.0": (dim, 5),
            }  # fmt: skip
            for role, shape in shapes.items():
                tensors[f"{name}.{role}.weight"] = torch.randn(shape)
                tensors[f"{name}.{role}.bias"] = scale * torch.randn(shape[0])
    return tensors


def test_an_lllite_changes_what_its_layers_are_given(models, places, tmp_path):
    """Against kohya's forward pass, written out, in a hook that only this test has."""
    pipe = models("sd1")
    torch.manual_seed(3)
    tensors = lllite(pipe.unet)
    save_file(tensors, tmp_path / "lite.safetensors")
    use = {"model": str(tmp_path / "lite.safetensors"), "image": str(places / "edges.png"), "scale": 0.8}
    found = drawn(pipe, control=[use])
    t = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    pixels = torch.from_numpy(np.array(picture())).movedim(-1, 0)[None].float() / 127.5 - 1
    import torch.nn.functional as F

    cond = F.conv2d(pixels, t["conditioning1.0.weight"], t["conditioning1.0.bias"], stride=2).relu()
    cond = F.conv2d(cond, t["conditioning1.2.weight"], t["conditioning1.2.bias"]).flatten(2).mT

    def hook(_, inputs):
        (x,) = inputs
        seen = F.linear(x, t["down.0.weight"], t["down.0.bias"]).relu()
        seen = torch.cat([cond.expand(len(x), -1, -1), seen], dim=2)
        seen = F.linear(seen, t["mid.0.weight"], t["mid.0.bias"]).relu()
        return (x + 0.8 * F.linear(seen, t["up.0.weight"], t["up.0.bias"]),)

    layer = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    plain = drawn(pipe)
    handle = layer.register_forward_pre_hook(hook)
    try:
        expected = drawn(pipe)
    finally:
        handle.remove()
    assert differ(found, expected) < 1e-5 < differ(found, plain)
    assert torch.equal(drawn(pipe), plain)
    with pytest.raises(UserError, match="token_merging_ratio is not allowed beside an LLLite"):
        drawn(pipe, control=[use], token_merging_ratio=0.5)


# --- faults ----------------------------------------------------------------------------------------------


def test_another_family_is_refused_by_name(models, places):
    with pytest.raises(
        UserError, match="a ControlNet for models with text of width 64, and this model is of models"
    ):
        drawn(models("sd1"), control=[use_of(places, "sdxl")])


def test_what_is_damaged_is_named(models, places, tmp_path):
    pipe, folder = models("sd1"), tmp_path / "net"
    folder.mkdir()
    file = "diffusion_pytorch_model.safetensors"
    (folder / "config.json").write_bytes((places / "sd1" / "config.json").read_bytes())
    tensors = load_file(places / "sd1" / file)
    for damage, message in (
        ({"conv_in.weight": tensors["conv_in.weight"] * torch.nan}, "conv_in.weight"),
        ({"strange": torch.zeros(1)}, "not of this model: strange"),
        ({"conv_in.bias": torch.zeros(3)}, "of the wrong shape: conv_in.bias"),
    ):
        save_file(tensors | damage, folder / file)
        with pytest.raises(UserError, match=message):
            drawn(pipe, control=[use_of(places) | {"model": str(folder)}])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": None}, "has no picture"),
        ({"type": "depth"}, "control type depth is of union models"),
        ({"start": 0.5, "end": 0.5}, "never acts"),
        ({"mode": "loud"}, "mode 'loud' is not allowed: it must be balanced, prompt, control or guess"),
        ({"strength": 1}, "strength is not a field of a ControlUse"),
        ({"model": "nowhere/at all"}, "no such folder or file"),
        ({"preprocess": "inpaint"}, "give one \\(mask_image, --mask\\)"),
        ({"preprocess": "cany"}, "canny"),
    ],
)
def test_what_cannot_be_is_told_before_drawing(models, places, fields, message):
    with pytest.raises(UserError, match=message):
        models("sd1").prepare(ldm.Request(control=[use_of(places) | fields]))


def test_pictures_without_a_network_say_what_to_write(models):
    with pytest.raises(UserError, match="control_image is of a ControlNet or T2I-Adapter: write pipe = "):
        models("sd1")("a boat", control_image=picture())
