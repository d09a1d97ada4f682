"""LoRAs trained by us, against diffusers and peft: pictures of the saved files, their contents, gradients."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import NARROW, POOLED, WIDE

import ldm
from ldm.adapters.lora import Lora, match, read_lora
from ldm.finetune.lora import ATTENTION, LOCON, TEXT_ATTENTION, add_lora
from ldm.finetune.lora_files import save_lora
from ldm.pipeline import Pipeline

NAMES = ["sd1", "sd2_v", "sdxl"]
PARTS = ("unet", "text_encoder", "text_encoder_2")
PARTS_OF = {name: PARTS if name == "sdxl" else PARTS[:2] for name in NAMES}
WIDTHS = {"sd1": NARROW, "sd2_v": WIDE, "sdxl": NARROW + WIDE}
RANK, ALPHA = 3, 5
KINDS = ("lora", "dora")


@pytest.fixture(scope="module", params=[(name, kind) for name in NAMES for kind in KINDS], ids="-".join)
def case(request, families, tmp_path_factory):
    """A family, a kind, our pipeline, its parts as if trained and saved to a folder: not to be changed."""
    name, kind = request.param
    pipe = ldm.load(families(name)[0], dtype="fp32", device="cpu")
    options = {"conv": True, "text": True, "use_dora": kind == "dora"}
    parts = as_if_trained(add_lora(pipe.parts, rank=RANK, alpha=ALPHA, **options))
    folder = tmp_path_factory.mktemp("loras") / "style"
    save_lora(parts, folder, "style")
    return SimpleNamespace(name=name, kind=kind, pipe=pipe, parts=parts, folder=folder)


def fresh_peer(families, name):
    """A pipeline of diffusers of its own, since loading an adapter changes it."""
    peer = copy.copy(families(name)[1])
    for part in PARTS_OF[name]:
        setattr(peer, part, copy.deepcopy(getattr(peer, part)))
    return peer


def as_if_trained(parts):
    """The same parts, with random B and magnitudes."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in PARTS:
            for name, p in getattr(parts, part).named_parameters() if getattr(parts, part) else ():
                if "lora_B" in name:
                    p.copy_(0.2 * torch.randn(p.shape, generator=rng))
                elif "lora_magnitude" in name:
                    p.mul_(1 + 0.3 * torch.rand(p.shape, generator=rng))
    return parts


def config(part, kind):
    """peft's for what `trained` trains."""
    targets = [*ATTENTION, *LOCON] if part == "unet" else list(TEXT_ATTENTION)
    options = {"init_lora_weights": "gaussian", "use_dora": kind == "dora"}
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **options)


def copy_values(source, to):
    values = {bare(key): p for key, p in source.named_parameters()}
    with torch.no_grad():
        for key, p in to.named_parameters():
            p.copy_(values[bare(key)])


def bare(key):
    """Without the prefix of text encoders, which some versions of transformers have."""
    return key.removeprefix("text_model.")


def draw(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    common = {"num_inference_steps": 2, "output_type": "latent", "latents": latents}
    common |= {"height": 16, "width": 16, "prompt": "the red boat", "negative_prompt": "sea"}
    return pipe(**common).images


def test_files_draw_what_the_trained_parts_draw(case, families):
    pipe, peer = case.pipe, fresh_peer(families, case.name)
    live = draw(Pipeline.from_parts(case.parts))
    assert relative_error(live, draw(pipe)) > 0.1
    for file in (case.folder, case.folder / "style.safetensors"):
        assert relative_error(draw(pipe.with_lora(file)), live) < 1e-4
    peer.load_lora_weights(case.folder)
    assert relative_error(draw(peer), live) < 1e-4


def test_both_files_read_by_us(case):
    expected = {
        f"{part}.{key}": p
        for part in PARTS_OF[case.name]
        for key, p in getattr(case.parts, part).named_parameters()
        if p.requires_grad
    }
    roles = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}
    roles["dora_scale"] = roles["magnitude"]
    for file in (case.folder, case.folder / "style.safetensors"):
        deltas, _ = match(Lora(read_lora(file), "style"), case.pipe.parts)
        assert {delta.scale for delta in deltas.values()} == {ALPHA / RANK}
        found = {
            f"{layer}.{roles[role]}.default.weight": tensor.flatten()
            for layer, delta in deltas.items()
            for role, tensor in delta.tensors.items()
            if role != "alpha"
        }
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key].flatten()) for key in found)


def test_kohya_file_read_by_diffusers(case, families):
    """But for DoRA's magnitudes, which diffusers leaves out of files of this kind."""
    peer = fresh_peer(families, case.name)
    peer.load_lora_weights(case.folder / "style.safetensors", adapter_name="default")
    for part in PARTS_OF[case.name]:
        theirs = getattr(peer, part)
        tensors = {bare(key): p for key, p in theirs.named_parameters() if "lora_" in key}
        ours = getattr(case.parts, part).named_parameters()
        expected = {bare(key): p for key, p in ours if "lora_A" in key or "lora_B" in key}
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
        scales = {m.scaling["default"] for m in theirs.modules() if getattr(m, "scaling", None)}
        assert scales == {ALPHA / RANK}


def test_file_is_that_of_diffusers(case, families, tmp_path):
    """Tensors, names and metadata as its training scripts write them."""
    peer = fresh_peer(families, case.name)
    modules = {part: getattr(peer, part) for part in PARTS_OF[case.name]}
    for part, model in modules.items():
        model.add_adapter(config(part, case.kind))
        copy_values(getattr(case.parts, part), model)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(model) for part, model in modules.items()}
    peer.save_lora_weights(tmp_path, **layers, **_collate_lora_metadata(modules))
    files = [folder / "pytorch_lora_weights.safetensors" for folder in (case.folder, tmp_path)]
    ours, theirs = map(load_file, files)
    theirs = {readable(key): tensor for key, tensor in theirs.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert settings(files[0]) == settings(files[1])


def readable(key):
    """Of text encoders: the prefix for every version, and the name of magnitudes that transformers reads."""
    part, _, rest = key.partition(".")
    if part == "unet":
        return key
    return f"{part}.text_model.{rest.removeprefix('text_model.')}".replace("_vector", "_vector.weight")


def settings(file):
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header.keys() == {"format", "lora_adapter_metadata"}
    values = json.loads(header["lora_adapter_metadata"])
    # transformers adds where its models were loaded from.
    return {
        key: sorted(value) if isinstance(value, list) else value
        for key, value in values.items()
        if not key.endswith("base_model_name_or_path")
    }


def test_gradients_are_those_of_diffusers(case, families):
    """In double precision, where those that are small count as much."""
    ours, theirs = copy.deepcopy(case.parts.unet), fresh_peer(families, case.name).unet
    theirs.add_adapter(config("unet", case.kind))
    copy_values(ours, theirs)
    ours, theirs = ours.double().train(), theirs.double().train()
    rng = torch.Generator().manual_seed(3)
    shapes = {"x": (2, 4, 8, 8), "target": (2, 4, 8, 8), "tokens": (2, 7, WIDTHS[case.name])}
    batch = {key: torch.randn(shape, generator=rng).double() for key, shape in shapes.items()}
    t, added = torch.tensor([3, 600]), {}
    if case.name == "sdxl":
        added = {"text_embeds": torch.ones(2, POOLED).double(), "time_ids": torch.arange(12.0).view(2, 6)}
    told = {"pooled": added["text_embeds"], "time_ids": added["time_ids"]} if added else {}
    outputs = (
        ours(batch["x"], t, batch["tokens"], **told),
        theirs(batch["x"], t, batch["tokens"], added_cond_kwargs=added).sample,
    )
    for output in outputs:
        (output - batch["target"]).square().mean().backward()
    expected = {key: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    found = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        assert relative_error(found[key], grad) < 1e-5, key
