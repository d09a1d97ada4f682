"""A U-Net that goes on from deep features of another call, and one that merges tokens, against diffusers'."""

import pytest
import torch

from ldm.models import build
from ldm.models.attention import SpatialTransformer

EARLY, LATE = 900.0, 850.0


def ours_like(reference):
    model = build({"_class_name": "UNet2DConditionModel"} | dict(reference.config))
    model.load_state_dict(reference.state_dict(), strict=True)
    return model.eval()


def flat(unet):
    """The resnets of diffusers' way up, by the number of their skip."""
    return [resnet for block in unet.up_blocks for resnet in block.resnets][::-1]


def deepcache(unet, branch, first, second, context):
    """DeepCache's answer to `second`, plainly: the whole network, with what the layer of that branch has from
    below put in its place, as it was in the call with `first`.
    """
    layer, kept = flat(unet)[branch], []

    def hook(_, inputs):
        below = inputs[0][:, : inputs[0].shape[1] - skip]
        if not kept:
            kept.append(below)
            return None
        return (torch.cat([kept[0], inputs[0][:, below.shape[1] :]], dim=1), *inputs[1:])

    skip = skip_channels(unet)[branch]
    handle = layer.register_forward_pre_hook(hook)
    try:
        unet(first, EARLY, context)
        return unet(second, LATE, context).sample
    finally:
        handle.remove()


def skip_channels(unet):
    wide = unet.config.block_out_channels
    found = [wide[0]]
    for k, channels in enumerate(wide):
        found += [channels] * (unet.config.layers_per_block + (k < len(wide) - 1))
    return found


# Sizes matter to layers, and the number of layers to what is kept: neither to the other.
@pytest.mark.parametrize(("layers", "size"), [(1, (9, 13)), (2, (8, 8))])
def test_deep_features_are_kept_as_in_deepcache(reference_unet, layers, size):
    reference = reference_unet(layers_per_block=layers)
    ours, context = ours_like(reference), torch.randn(2, 7, 24)
    first, second = torch.randn(2, 4, *size), torch.randn(2, 4, *size)
    assert ours.num_skips == len(skip_channels(reference)) == 4 * (layers + 1)
    with torch.no_grad():
        early, whole = ours(first, EARLY, context), ours(second, LATE, context)
        for branch in range(ours.num_skips):
            out, deep = ours.from_deep(first, EARLY, context, branch)
            assert torch.equal(out, early)
            out, again = ours.from_deep(second, LATE, context, branch, deep)
            assert again is deep
            want = deepcache(reference, branch, first, second, context)
            assert (out - want).abs().max() < 1e-5 * want.abs().max()
            assert (out - whole).abs().max() > 1e-3 * want.abs().max()


def test_only_what_lies_above_is_computed(reference_unet):
    ours, x, context = ours_like(reference_unet()), torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    ran = []
    for name, module in ours.named_modules():
        if name.endswith(("resnets.0", "resnets.1", "resnets.2", "rs.0")):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with torch.no_grad():
        _, deep = ours.from_deep(x, EARLY, context, 2)
        ran.clear()
        ours.from_deep(x, LATE, context, 2, deep)
    top = ["down_blocks.0.resnets.0", "down_blocks.0.resnets.1"]
    assert ran == [*top, "up_blocks.3.resnets.0", "up_blocks.3.resnets.1", "up_blocks.3.resnets.2"]


def test_tokens_are_merged_at_the_finest_level_that_attends(reference_unet):
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    ours = ours_like(reference_unet(down_block_types=down, up_block_types=up))
    seen = {}
    for name, module in ours.named_modules():
        if isinstance(module, SpatialTransformer):
            module.register_forward_pre_hook(
                lambda _, given, name=name: seen.update({name: (*given, 0.0)[2]})
            )
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    with torch.no_grad():
        assert not torch.equal(ours(x, EARLY, context, merging=0.5), ours(x, EARLY, context))
        out = ours(x, EARLY, context, merging=0.5)
        assert torch.equal(ours.from_deep(x, EARLY, context, 0, merging=0.5)[0], out)
    finest = {name for name in seen if name.startswith(("down_blocks.1", "up_blocks.2"))}
    assert len(finest) == 5
    assert {name: merging for name, merging in seen.items() if merging} == dict.fromkeys(finest, 0.5)
