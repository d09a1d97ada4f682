"""Adapters against diffusers' load_lora_weights and load_textual_inversion, and peft's layers, in fp32."""

import copy
import functools

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file, save_file
from tiny_adapters import (
    CONV,
    KINDS,
    LINEAR,
    TEXT,
    peft_copy,
    save_a1111,
    save_diffusers,
    save_lycoris,
    to_kohya,
)
from tiny_families import NARROW, WIDE

import ldm

PROMPT, NEGATIVE = "the red boat", "sea"


@pytest.fixture(scope="module")
def pipes(families):
    return {family: ldm.load(families(family)[0], dtype="fp32", device="cpu") for family in ("sd1", "sdxl")}


@pytest.fixture
def peers(families):
    """A fresh pipeline of diffusers, since loading an adapter changes all of it but the VAE."""

    def fresh(family):
        peer = families(family)[1]
        return copy.deepcopy(peer, {id(peer.vae): peer.vae})

    return fresh


@pytest.fixture(scope="module")
def saved(families, tmp_path_factory):
    """The file of a LoRA of all parts of a family, not to be changed."""
    folder = tmp_path_factory.mktemp("loras")
    return functools.cache(
        lambda family: save_diffusers(families(family)[1], folder / f"{family}.safetensors")
    )


def compare(pipe, peer, prompt=PROMPT):
    """Text encoders, U-Net and a whole picture."""
    torch.manual_seed(5)
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipe.parts, name) is not None:
            ids = torch.randint(0, 500, (2, 16))
            ours, theirs = (getattr(each, name)(ids)[0] for each in (pipe.parts, peer))
            assert relative_error(ours, theirs) < 1e-5
    # A whole picture calls the U-Net with everything that its family is told.
    common = {"num_inference_steps": 2, "output_type": "latent", "latents": torch.randn(1, 4, 8, 8)}
    common |= {"height": 16, "width": 16, "prompt": prompt, "negative_prompt": NEGATIVE}
    assert relative_error(pipe(**common).images, peer(**common).images) < 1e-4


def check_unet(unet, reference, width):
    torch.manual_seed(5)
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, width)
    with torch.no_grad():
        theirs = reference(sample, 301, context).sample
        assert relative_error(unet(sample, 301, context), theirs) < 1e-5
    return theirs


def differs(pipe, peer):
    """The adapter is large enough for the comparison to mean something."""
    common = {"num_inference_steps": 2, "output_type": "latent", "latents": torch.ones(1, 4, 8, 8)}
    common |= {"height": 16, "width": 16, "prompt": PROMPT}
    return relative_error(pipe(**common).images, pipe.base(**common).images) > 1e-2


@pytest.mark.parametrize(
    ("kind", "family"), [("lora", "sd1"), ("lora", "sdxl"), ("patterns", "sdxl"), ("rslora", "sd1")]
)
def test_lora_of_diffusers(pipes, peers, saved, tmp_path, family, kind):
    peer = peers(family)
    file = saved(family) if kind == "lora" else save_diffusers(peer, tmp_path / "style.safetensors", kind)
    peer.load_lora_weights(file, adapter_name="style")
    pipe = pipes[family].with_lora(file)
    compare(pipe, peer)
    assert differs(pipe, peer)


def test_weights_of_unet_and_text(pipes, peers, saved):
    peer, file = peers("sdxl"), saved("sdxl")
    peer.load_lora_weights(file, adapter_name="style")
    peer.set_adapters("style", {"unet": 0.7, "text_encoder": 0.4, "text_encoder_2": 0.4})
    compare(pipes["sdxl"].with_lora(file, 0.7, 0.4), peer)


def test_several_at_once(pipes, peers, saved, tmp_path):
    peer, one = peers("sd1"), saved("sd1")
    two = save_diffusers(
        peer, tmp_path / "two.safetensors", "rslora", unet=["to_q", "conv1"], text=["out_proj", "fc1"]
    )
    for file in (one, two):
        peer.load_lora_weights(file, adapter_name=file.stem)
    peer.set_adapters([one.stem, two.stem], [0.7, -0.4])
    pipe = pipes["sd1"].with_lora(one, 0.7).with_lora(two, -0.4)
    compare(pipe, peer)
    compare(pipe.fuse(), peer)
    compare(pipe.fuse().unfuse(), peer)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_kohya_names_and_alpha(pipes, peers, tmp_path, family):
    peer = peers(family)
    file = save_diffusers(peer, tmp_path / "style.safetensors", metadata=False)
    if family == "sd1":
        rename = lambda name: name.replace("lora_te_", "lora_te_text_model_")  # noqa: E731
    else:
        rename = lambda name: name.replace("lora_te1_", "lora_te1_text_model_")  # noqa: E731
    kohya = to_kohya(file, tmp_path / "kohya.safetensors", alpha=1.5, rename=rename)
    assert all(name.startswith("lora_") for name in load_file(kohya))
    peer.load_lora_weights(kohya)
    pipe = pipes[family].with_lora(kohya)
    compare(pipe, peer)
    assert differs(pipe, peer)


# By hand, from the original U-Net of this shape: two levels, one layer each, attention on the second.
ORIGINAL = {
    "lora_unet_time_embed_0": "time_embedding.linear_1",
    "lora_unet_input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "lora_unet_input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
    "lora_unet_input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "lora_unet_input_blocks_3_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k": (
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
    ),
    "lora_unet_input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0": (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ),
    "lora_unet_middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "lora_unet_output_blocks_1_1_transformer_blocks_0_ff_net_0_proj": (
        "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "lora_unet_output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_2_0_in_layers_2": "up_blocks.1.resnets.0.conv1",
}


def test_original_names_of_xl(pipes, peers, tmp_path):
    peer = peers("sdxl")
    file = save_diffusers(peer, tmp_path / "style.safetensors", metadata=False, text=())
    tensors = load_file(file)
    renamed, kept = {}, {}
    for stem, module in ORIGINAL.items():
        for ours, theirs in (("lora_down", "lora_A"), ("lora_up", "lora_B")):
            name = f"unet.{module}.{theirs}.weight"
            renamed[f"{stem}.{ours}.weight"] = kept[name] = tensors[name]
        renamed[f"{stem}.alpha"] = torch.tensor(3.0)
    save_file(renamed, tmp_path / "original.safetensors")
    save_file(kept, tmp_path / "kept.safetensors")
    peer.load_lora_weights(tmp_path / "kept.safetensors", adapter_name="kept")
    compare(pipes["sdxl"].with_lora(tmp_path / "original.safetensors"), peer)


def test_old_attention_processors(pipes, peers, tmp_path):
    peer = peers("sd1")
    file = save_diffusers(peer, tmp_path / "new.safetensors", unet=LINEAR[:4], text=TEXT, metadata=False)
    old, up_down = {}, {"lora_A": "down", "lora_B": "up"}
    text = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    for name, tensor in load_file(file).items():
        module, kind, _ = name.replace("to_out.0", "to_out").rsplit(".", 2)
        head, _, last = module.replace("text_encoder.", "text_encoder.text_model.").rpartition(".")
        if name.startswith("unet."):
            old[f"{head}.processor.{last}_lora.{up_down[kind]}.weight"] = tensor
        elif last in text:
            old[f"{head}.{text[last]}_lora.{up_down[kind]}.weight"] = tensor
        else:
            old[f"{head}.{last}.lora_linear_layer.{up_down[kind]}.weight"] = tensor
    save_file(old, tmp_path / "old.safetensors")
    peer.load_lora_weights(file)
    compare(pipes["sd1"].with_lora(tmp_path / "old.safetensors"), peer)
    # Without a prefix, as `unet.save_attn_procs` wrote them.
    bare = {name.removeprefix("unet."): tensor for name, tensor in old.items() if name.startswith("unet.")}
    save_file(bare, tmp_path / "bare.safetensors")
    pipe = pipes["sd1"].with_lora(tmp_path / "bare.safetensors")
    check_unet(pipe.unet, peer.unet, NARROW)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_peft(pipes, peers, tmp_path, kind):
    """Linear layers and convolutions of every kind, from the folder that peft saves."""
    peer = peers("sd1")
    reference = peft_copy(peer.unet, kind, [*LINEAR, *CONV])
    reference.save_pretrained(tmp_path / "style")
    pipe = pipes["sd1"].with_lora(tmp_path / "style")
    plain = check_unet(pipes["sd1"].unet, peer.unet, NARROW)
    assert relative_error(check_unet(pipe.unet, reference, NARROW), plain) > 1e-2
    check_unet(pipe.fuse().unet, reference, NARROW)
    assert pipe.adapted.loras[0].name == "style"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("lo") and kind != "lora"])
def test_lycoris_names_and_alpha(pipes, peers, tmp_path, kind):
    reference = peft_copy(peers("sd1").unet, kind, [*LINEAR, *CONV])
    for module in reference.modules():  # two whole matrices have no rank there, so no scale
        if len(getattr(module, "lokr_w1", ())) and len(module.lokr_w2):
            module.scaling["default"] = 1.0
    file = save_lycoris(reference, tmp_path / "style.safetensors")
    check_unet(pipes["sd1"].with_lora(file).unet, reference, NARROW)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_dora_of_diffusers(pipes, peers, tmp_path, family):
    peer = peers(family)
    file = save_diffusers(peer, tmp_path / "style.safetensors", "dora")
    pipe = pipes[family].with_lora(file)
    # diffusers 0.42 loses the magnitudes of text encoders: there, peft's own layers are the reference.
    encoders = {
        name: peft_copy(getattr(peer, name), "dora", TEXT).merge_and_unload()
        for name in ("text_encoder", "text_encoder_2")
        if getattr(peer, name, None) is not None
    }
    peer.load_lora_weights(file)
    peer.register_modules(**encoders)
    compare(pipe, peer)


# --- textual inversion ---


def vectors(count, width, seed=1):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


LAYOUTS = ["diffusers", "diffusers_bin", "a1111", "parameter_dict", "emb_params"]


@pytest.mark.parametrize(
    ("layout", "count"), [*((each, 3) for each in LAYOUTS), ("diffusers", 1), ("a1111", 1)]
)
def test_textual_inversion(pipes, peers, tmp_path, layout, count):
    rows, peer = vectors(count, NARROW), peers("sd1")
    match layout:
        case "diffusers":
            save_file({"<cat>": rows}, file := tmp_path / "learned_embeds.safetensors")
        case "diffusers_bin":
            torch.save({"<cat>": rows}, file := tmp_path / "learned_embeds.bin")
        case "emb_params":
            save_file({"emb_params": rows}, file := tmp_path / "<cat>.safetensors")
        case _:
            file = save_a1111(tmp_path / "<cat>.pt", rows, parameter_dict=layout == "parameter_dict")
    peer.load_textual_inversion({"<cat>": rows})
    pipe = pipes["sd1"].with_embedding(file)
    assert pipe.adapted.embeddings[0].name == "<cat>"
    compare(pipe, peer, "the <cat> boat, <cat>")


def test_textual_inversion_of_xl(pipes, peers, tmp_path):
    narrow, wide, peer = vectors(2, NARROW), vectors(2, WIDE), peers("sdxl")
    save_file({"clip_l": narrow, "clip_g": wide}, tmp_path / "style.safetensors")
    peer.load_textual_inversion({"<cat>": narrow}, text_encoder=peer.text_encoder, tokenizer=peer.tokenizer)
    peer.load_textual_inversion({"<cat>": wide}, text_encoder=peer.text_encoder_2, tokenizer=peer.tokenizer_2)
    # With eos_token_id 2 transformers pools at the highest id, which is the new word's and not the end's:
    # "can't work correctly with extra new tokens", says its source. Ours pools at the end.
    second = getattr(peer.text_encoder_2, "text_model", peer.text_encoder_2)
    for module in (peer.text_encoder_2, second):
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = peer.tokenizer_2.eos_token_id
    pipe = pipes["sdxl"].with_embedding(tmp_path / "style.safetensors", "<cat>")
    compare(pipe, peer, "the <cat> boat")


def test_both_kinds_of_adapters(pipes, peers, saved, tmp_path):
    rows, peer, file = vectors(2, NARROW), peers("sd1"), saved("sd1")
    save_file({"<cat>": rows}, tmp_path / "cat.safetensors")
    peer.load_textual_inversion({"<cat>": rows})
    peer.load_lora_weights(file)
    pipe = pipes["sd1"]
    for made in (
        pipe.with_lora(file).with_embedding(tmp_path / "cat.safetensors"),
        pipe.with_embedding(tmp_path / "cat.safetensors").with_lora(file),
    ):
        compare(made, peer, "a <cat>")
