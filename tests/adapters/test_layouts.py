"""The layouts that other programs write: each draws what the same LoRA draws in diffusers' spelling."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_adapters import save_diffusers, to_kohya
from tiny_families import NARROW, WIDE, make_family

import ldm
from ldm.checkpoint.keymap import unet_keys

UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "time_emb_proj"]
DRAW = {"prompt": "the red boat", "num_inference_steps": 2, "output_type": "latent", "seed": 3}
SMALL = {"height": 16, "width": 16}


class Family:
    """A pipeline of ours and diffusers', and a LoRA in diffusers' spelling, as tensors and as drawn."""

    def __init__(self, name, folder):
        self.peer = make_family(name, folder / name)
        self.pipe = ldm.load(folder / name, dtype="fp32", device="cpu")
        file = save_diffusers(self.peer, folder / f"{name}.safetensors", unet=UNET, metadata=False)
        self.tensors = load_file(file)
        if name == "refiner":  # diffusers calls the only text encoder there the second
            self.draw = {**DRAW, "image": torch.full((1, 3, 16, 16), 0.5), "strength": 1.0}
        else:
            self.draw = DRAW | SMALL
        self.plain = self(file)
        assert not torch.equal(self.plain, self.pipe(**self.draw).images)

    def __call__(self, file, weight=0.8, fused=False, **changes):
        adapted = self.pipe.with_lora(file, weight)
        return (adapted.fuse() if fused else adapted)(**self.draw | changes).images


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Family(name, tmp_path_factory.mktemp("layouts"))
        return made[name]

    return get


def respell(tensors, rename):
    """Each name as `rename` has it: of the stem, and "A" or "B"."""
    renamed = {}
    for name, tensor in tensors.items():
        stem, which, _ = name.rsplit(".", 2)
        renamed[rename(stem, which.removeprefix("lora_"))] = tensor
    assert renamed.keys() != tensors.keys()
    return renamed


OLD = {"A": "down", "B": "up"}


def without_zero(stem, which):
    return f"{stem.replace('to_out.0', 'to_out')}.lora.{OLD[which]}.weight"


def without_processor(stem, which):
    if ".attn" not in stem:
        return f"{stem}.lora.{OLD[which]}.weight"
    return f"{stem.replace('to_out.0', 'to_out')}_lora.{OLD[which]}.weight"


def refiner_first(stem, which):
    layer = stem.removeprefix("text_encoder_2.").removeprefix("text_model.")
    return f"{stem if layer == stem else f'text_encoder.text_model.{layer}'}.lora_{which}.weight"


def comfy(stem, which):
    part, _, path = stem.partition(".")
    clip = {"text_encoder_2": "clip_g", "text_encoder": "clip_l"}.get(part)
    if clip is None:
        return f"diffusion_model.{path}.lora_{OLD[which]}.weight"
    path = path.removeprefix("text_model.")
    return f"text_encoders.{clip}.transformer.text_model.{path}.lora_{OLD[which]}.weight"


LAYOUTS = {
    "adapter_name": lambda stem, which: f"{stem}.lora_{which}.default.weight",
    "another_adapter_name": lambda stem, which: f"{stem}.lora_{which}.default_0.weight",
    "no_weight": lambda stem, which: f"{stem}.lora_{which}",
    "adapter_name_no_weight": lambda stem, which: f"{stem}.lora_{which}.style",
    "without_zero": without_zero,
    "without_processor": without_processor,
    "comfy": comfy,
}
UNET_ONLY = {
    "peft_raw": lambda stem, which: (
        f"base_model.model.{stem.removeprefix('unet.')}.lora_{which}.default.weight"
    ),
    "lycoris": lambda stem, which: (
        f"lycoris_{stem.removeprefix('unet.').replace('.', '_')}.lora_{OLD[which]}.weight"
    ),
}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_spelling(family, tmp_path, name, layout):
    made = family(name)
    save_file(respell(made.tensors, LAYOUTS[layout]), tmp_path / "other.safetensors")
    assert torch.equal(made(tmp_path / "other.safetensors"), made.plain)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("layout", UNET_ONLY)
def test_another_spelling_of_the_unet(family, tmp_path, name, layout):
    made = family(name)
    unet = {name: tensor for name, tensor in made.tensors.items() if name.startswith("unet.")}
    save_file(unet, tmp_path / "plain.safetensors")
    save_file(respell(unet, UNET_ONLY[layout]), tmp_path / "other.safetensors")
    assert torch.equal(made(tmp_path / "other.safetensors"), made(tmp_path / "plain.safetensors"))


def test_the_refiners_only_encoder_is_the_first_to_some(family, tmp_path):
    made = family("refiner")
    save_file(respell(made.tensors, refiner_first), tmp_path / "other.safetensors")
    assert torch.equal(made(tmp_path / "other.safetensors"), made.plain)


def original(pipe, prefix):
    """Renames the U-Net's layers as single files have them."""

    def rename(stem, which):
        (key,) = unet_keys(pipe.unet.config, [f"{stem.removeprefix('unet.')}.weight"])
        return f"{prefix}{key.original.removesuffix('.weight')}.lora_{OLD[which]}.weight"

    return rename


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_names_of_checkpoints(family, tmp_path, name):
    made = family(name)
    unet = {name: tensor for name, tensor in made.tensors.items() if name.startswith("unet.")}
    save_file(unet, tmp_path / "plain.safetensors")
    renamed = respell(unet, original(made.pipe, "model.diffusion_model."))
    save_file(renamed, tmp_path / "other.safetensors")
    assert torch.equal(made(tmp_path / "other.safetensors"), made(tmp_path / "plain.safetensors"))


def test_alpha_of_processors(family, tmp_path):
    made = family("sd1")
    attention = {name: tensor for name, tensor in made.tensors.items() if ".attn" in name}
    save_file(attention, tmp_path / "plain.safetensors")
    to_kohya(tmp_path / "plain.safetensors", tmp_path / "kohya.safetensors", alpha=1.5)
    old = {}
    for name, tensor in attention.items():
        head, _, last = name.replace("to_out.0", "to_out").rsplit(".", 2)[0].rpartition(".")
        old[f"{head}.processor.{last}_lora.{OLD[name.split('lora_')[1][0]]}.weight"] = tensor
        old[f"{head}.processor.{last}_lora.alpha"] = torch.tensor(1.5)
    save_file(old, tmp_path / "old.safetensors")
    assert torch.equal(made(tmp_path / "old.safetensors"), made(tmp_path / "kohya.safetensors"))


def test_both_spellings_at_once(family, tmp_path):
    """So that every program finds one; but they must be the same."""
    made = family("sdxl")
    renamed = respell(made.tensors, LAYOUTS["comfy"])
    both = made.tensors | {name: tensor.clone() for name, tensor in renamed.items()}
    save_file(both, tmp_path / "both.safetensors")
    assert torch.equal(made(tmp_path / "both.safetensors"), made.plain)
    (report,) = made.pipe.with_lora(tmp_path / "both.safetensors").adapted.reports
    assert report.layers == len(made.tensors) // 2
    both[next(iter(renamed))].mul_(2)
    save_file(both, tmp_path / "different.safetensors")
    with pytest.raises(ldm.UserError, match="twice, in two spellings, and not the same"):
        made(tmp_path / "different.safetensors")


def test_two_adapters_in_one_file(family, tmp_path):
    made = family("sd1")
    both = respell(made.tensors, LAYOUTS["adapter_name"]) | respell(
        {name: tensor.clone() for name, tensor in made.tensors.items()}, LAYOUTS["adapter_name_no_weight"]
    )
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(ldm.UserError, match="holds 2 adapters, default and style") as caught:
        made(tmp_path / "both.safetensors")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_one_byte(family, tmp_path, dtype, suffix):
    """A LoRA in float8 is drawn as its copy in fp32 is; NaN is found there too."""
    made = family("sd1")
    to_kohya(save(made.tensors, tmp_path / "plain.safetensors"), tmp_path / "kohya.safetensors", alpha=2)
    small = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "kohya.safetensors").items()}
    save(small, tmp_path / f"small{suffix}")
    save({name: tensor.float() for name, tensor in small.items()}, tmp_path / "wide.safetensors")
    for fused in (False, True):
        picture = made(tmp_path / f"small{suffix}", fused=fused)
        assert torch.equal(picture, made(tmp_path / "wide.safetensors", fused=fused))
    small[sorted(small)[-1]] = torch.full((3, 4), float("nan")).to(dtype)
    save(small, tmp_path / f"nan{suffix}")
    with pytest.raises(ldm.UserError, match="NaN"):
        made(tmp_path / f"nan{suffix}")


def save(tensors, path):
    (torch.save if path.suffix == ".pt" else save_file)(tensors, path)
    return path


# --- plain sums ---


def edited(peer, changes, weight):
    """diffusers' pipeline with changes of weights and biases, by part and name, added to copies."""
    parts = {part: copy.deepcopy(getattr(peer, part)) for part in {part for part, _ in changes}}
    with torch.no_grad():
        for (part, name), change in changes.items():
            parts[part].get_parameter(name).add_(
                weight * change.reshape(parts[part].get_parameter(name).shape)
            )
    return parts


def check_parts(pipe, parts):
    """The U-Net and the text encoder against diffusers' and transformers'."""
    torch.manual_seed(5)
    sample, context, ids = torch.randn(1, 4, 8, 8), torch.randn(1, 7, NARROW), torch.randint(0, 500, (2, 16))
    with torch.no_grad():
        if "unet" in parts:
            theirs, ours = parts["unet"](sample, 301, context).sample, pipe.unet(sample, 301, context)
            assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5
        if "text_encoder" in parts:
            theirs, ours = parts["text_encoder"](ids)[0], pipe.parts.text_encoder(ids)[0]
            assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


def text_path(peer, path):
    """transformers before 5.6 has `text_model.` there."""
    names = dict(peer.text_encoder.named_parameters())
    return path if f"{path}.weight" in names else f"text_model.{path}"


def random(peer, part, path, kind):
    shape = getattr(peer, part).get_parameter(f"{path}.{kind}").shape
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(path)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spelling", ["lycoris", "comfy", "dots"])
def test_differences_are_added(family, tmp_path, spelling, fused):
    """Of weights, biases and norms, in the names of LyCORIS and of ComfyUI's extracts."""
    made = family("sd1")
    block = "down_blocks.0.attentions.0"
    paths = [
        ("unet", "conv_in"),
        ("unet", "down_blocks.0.resnets.0.conv2"),
        ("unet", "down_blocks.0.resnets.0.norm1"),
        ("unet", f"{block}.transformer_blocks.0.attn2.to_k"),  # has no bias
        ("unet", f"{block}.transformer_blocks.0.norm2"),
        ("unet", "conv_norm_out"),
        ("text_encoder", text_path(made.peer, "encoder.layers.1.layer_norm2")),
        ("text_encoder", text_path(made.peer, "encoder.layers.0.mlp.fc1")),
        ("text_encoder", text_path(made.peer, "final_layer_norm")),
        ("text_encoder", text_path(made.peer, "embeddings.position_embedding")),
    ]
    changes, tensors = {}, {}
    for part, path in paths:
        norm = "norm" in path.rpartition(".")[2]
        for kind in ("weight",) if path.endswith(("to_k", "embedding")) else ("weight", "bias"):
            change = changes[part, f"{path}.{kind}"] = random(made.peer, part, path, kind)
            called = {"weight": "diff", "bias": "diff_b"}[kind]
            if norm and spelling == "lycoris":
                called = {"weight": "w_norm", "bias": "b_norm"}[kind]
            tensors[f"{stem_of(made.pipe, part, path, spelling)}.{called}"] = change
    save_file(tensors, tmp_path / "full.safetensors")
    adapted = made.pipe.with_lora(tmp_path / "full.safetensors", 0.7)
    check_parts(adapted.fuse() if fused else adapted, edited(made.peer, changes, 0.7))
    (report,) = adapted.adapted.reports
    assert report.kinds == ("difference",)
    assert report.layers == len(paths)
    # The base is as it was, and shares all that is not changed.
    check_parts(made.pipe, {"unet": made.peer.unet, "text_encoder": made.peer.text_encoder})
    own, changed = (each.unet.state_dict(keep_vars=True) for each in (made.pipe, adapted))
    assert {name for name in own if own[name] is not changed[name]} == {
        name for part, name in changes if part == "unet"
    }


def stem_of(pipe, part, path, spelling):
    bare = path.removeprefix("text_model.")
    if part == "text_encoder":
        flat = f"lora_te_text_model_{bare.replace('.', '_')}"
        names = {
            "comfy": f"text_encoders.clip_l.transformer.text_model.{bare}",
            "dots": f"text_encoder.{bare}",
        }
        return names.get(spelling, flat)
    (key,) = unet_keys(pipe.unet.config, [f"{path}.weight"])
    stored = key.original.removesuffix(".weight")
    names = {"comfy": f"diffusion_model.{stored}", "dots": f"unet.{path}"}
    return names.get(spelling, f"lora_unet_{path.replace('.', '_')}")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rank", [2, 4])
def test_the_bias_of_pefts_b(family, tmp_path, rank, fused):
    """It is scaled by alpha / rank as B is, whether alpha is in the config or in kohya's names."""
    made = family("sd1")
    targets = ["conv1", "ff.net.2", "time_emb_proj", "proj_in"]
    config = LoraConfig(r=rank, lora_alpha=3, lora_bias=True, init_lora_weights=False, target_modules=targets)
    torch.manual_seed(4)
    model = get_peft_model(copy.deepcopy(made.peer.unet), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "peft")
    tensors = get_peft_model_state_dict(model)
    assert any(name.endswith("lora_B.bias") for name in tensors)
    kohya = {}
    for name, tensor in tensors.items():
        stem, called, kind = name.removeprefix("base_model.model.").rsplit(".", 2)
        stem = f"lora_unet_{stem.replace('.', '_')}"
        kohya[f"{stem}.{'lora_down' if called == 'lora_A' else 'lora_up'}.{kind}"] = tensor.contiguous()
        kohya[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    for file in (tmp_path / "peft", tmp_path / "kohya.safetensors"):
        adapted = made.pipe.with_lora(file)
        check_parts(adapted.fuse() if fused else adapted, {"unet": model.base_model.model})


@pytest.mark.parametrize("fused", [False, True])
def test_a_difference_of_a_bias_beside_a_lora(family, tmp_path, fused):
    """As ComfyUI's extracts have it; alpha / rank is not the bias's."""
    made, path = family("sd1"), "down_blocks.0.resnets.0.conv1"
    up, down, bias = torch.randn(16, 2), torch.randn(2, 16, 3, 3) / 9, torch.randn(16)
    stem = stem_of(made.pipe, "unet", path, "comfy")
    tensors = {"lora_up.weight": up[:, :, None, None], "lora_down.weight": down, "diff_b": bias}
    tensors["alpha"] = torch.tensor(1.0)
    save_file({f"{stem}.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    adapted = made.pipe.with_lora(tmp_path / "a.safetensors", 0.6)
    weight = 0.5 * (up @ down.flatten(1)).reshape(16, 16, 3, 3)
    changes = {("unet", f"{path}.weight"): weight, ("unet", f"{path}.bias"): bias}
    check_parts(adapted.fuse() if fused else adapted, edited(made.peer, changes, 0.6))
    assert adapted.unet.get_parameter(f"{path}.weight") is made.pipe.unet.get_parameter(f"{path}.weight")


def test_a_difference_of_tokens_beside_new_words(family, tmp_path):
    made = family("sd1")
    old = made.pipe.parts.text_encoder.get_input_embeddings().weight
    change, rows = torch.randn(old.shape), torch.randn(2, NARROW)
    stem = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding"
    save_file({f"{stem}.diff": change}, tmp_path / "full.safetensors")
    save_file({"<cat>": rows}, tmp_path / "cat.safetensors")
    one = made.pipe.with_lora(tmp_path / "full.safetensors", 0.5).with_embedding(tmp_path / "cat.safetensors")
    two = made.pipe.with_embedding(tmp_path / "cat.safetensors").with_lora(tmp_path / "full.safetensors", 0.5)
    for pipe in (one, two):
        new = pipe.parts.text_encoder.get_input_embeddings().weight
        assert torch.equal(new, torch.cat([old + 0.5 * change, rows]))


def test_what_is_saved_has_the_sums(family, tmp_path):
    made = family("sd1")
    stem = "lora_unet_conv_norm_out"
    save_file(
        {f"{stem}.w_norm": torch.ones(16), f"{stem}.b_norm": torch.ones(16)}, tmp_path / "a.safetensors"
    )
    adapted = made.pipe.with_lora(tmp_path / "a.safetensors", 0.5)
    adapted.save(tmp_path / "saved")
    again = ldm.load(tmp_path / "saved", dtype="fp32", device="cpu")
    assert torch.equal(again(**made.draw).images, adapted(**made.draw).images)
    assert torch.equal(again.unet.conv_norm_out.bias, made.pipe.unet.conv_norm_out.bias + 0.5)
    assert torch.equal(adapted.base(**made.draw).images, made.pipe(**made.draw).images)


# --- words ---


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_word_within_a_lora(family, tmp_path, name):
    """OneTrainer's: both act, as the LoRA and a file of the word do."""
    made = family(name)
    vectors = {"clip_l": torch.randn(2, NARROW), "clip_g": torch.randn(2, WIDE)}
    if name == "sd1":
        vectors = {"string_to_param.*": vectors["clip_l"]}
    save_file(vectors, tmp_path / "mycat.safetensors")
    save_file(made.tensors, tmp_path / "plain.safetensors")
    bundle = {f"bundle_emb.mycat.{key}": tensor for key, tensor in vectors.items()}
    save_file(made.tensors | bundle, tmp_path / "both.safetensors")
    pipe = made.pipe.with_lora(tmp_path / "both.safetensors", 0.8)
    apart = made.pipe.with_lora(tmp_path / "plain.safetensors", 0.8)
    apart = apart.with_embedding(tmp_path / "mycat.safetensors")
    draw = made.draw | {"prompt": "a mycat boat"}
    assert torch.equal(pipe(**draw).images, apart(**draw).images)
    assert not torch.equal(pipe(**draw).images, made(tmp_path / "plain.safetensors", prompt="a mycat boat"))
    assert str(pipe.adapted.reports[0]).endswith("; for what it learnt, write mycat in the prompt")
    assert not pipe.base.adapted.loras
    # By the word's own file too, it would be there twice.
    with pytest.raises(ldm.UserError, match="'mycat' already; choose a name"):
        pipe.with_embedding(tmp_path / "mycat.safetensors")
    pipe.with_embedding(tmp_path / "mycat.safetensors", "other")
