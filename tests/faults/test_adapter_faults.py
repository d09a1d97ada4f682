"""Adapters that do not belong: each an error at once, of one or two lines, that names the file and why."""

import pickle
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import edit_file, peft_copy, save_a1111, save_diffusers, save_lycoris, to_kohya
from tiny_families import NARROW, WIDE, make_family

import ldm


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of two families, and a LoRA for each in each spelling."""
    root = tmp_path_factory.mktemp("faults")
    for family in ("sd1", "sdxl"):
        peer = make_family(family, root / family)
        save_diffusers(peer, root / f"{family}.safetensors", unet=["to_q", "to_k", "conv1"], metadata=False)
        to_kohya(root / f"{family}.safetensors", root / f"{family}_kohya.safetensors", alpha=2)
        if family == "sd1":
            loha = peft_copy(peer.unet, "loha", ["to_k", "conv1"])
            save_lycoris(loha, root / "sd1_loha.safetensors")
            save_file({f"{TO_K}.diff": torch.ones(16, NARROW)}, root / "sd1_full.safetensors")
    return root


@pytest.fixture(scope="module")
def pipes(made):
    return {family: ldm.load(made / family, dtype="fp32", device="cpu") for family in ("sd1", "sdxl")}


def complaint(call, *arguments):
    start = time.perf_counter()
    with pytest.raises(ldm.UserError) as caught:
        call(*arguments)
    assert time.perf_counter() - start < 2
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


# --- files ---


@pytest.mark.parametrize("what", ["lora", "embedding"])
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.safetensors", b"", "empty"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.safetensors", b"\x00\xff" * 500, "damaged or cut short"),
        ("a.safetensors", (2**63).to_bytes(8, "little") + b"{}", "damaged or cut short"),
        ("a.pt", b"\x00\xff" * 500, "damaged, cut short"),
        ("a.gguf", b"GGUF" * 500, ""),
        ("a.safetensors", None, ""),
    ],
)
def test_damaged_file(pipes, tmp_path, what, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    pipe = pipes["sd1"]
    message = complaint(pipe.with_lora if what == "lora" else pipe.with_embedding, path)
    assert str(path) in message
    assert says in message


@pytest.mark.parametrize("share", [0.001, 0.1, 0.999])
def test_truncated(pipes, made, tmp_path, share):
    content = (made / "sd1.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[: int(len(content) * share)])
    assert "cut short" in complaint(pipes["sd1"].with_lora, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt", "a.safetensors"])
def test_code_is_not_run(pipes, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for call in (pipes["sd1"].with_lora, pipes["sd1"].with_embedding):
        (tmp_path / name).write_bytes(pickle.dumps({"string_to_param": Bomb(), "a.alpha": torch.ones(1)}))
        assert name in complaint(call, tmp_path / name)
        torch.save({"string_to_param": {"*": Bomb()}, "lora_unet_a.alpha": Bomb()}, tmp_path / name)
        assert name in complaint(call, tmp_path / name)
    assert not (tmp_path / "exploded").exists()


# --- LoRAs ---


def test_pickles_of_tensors_are_read(pipes, made, tmp_path):
    torch.save(load_file(made / "sd1_kohya.safetensors"), tmp_path / "style.pt")
    assert pipes["sd1"].with_lora(tmp_path / "style.pt").adapted.reports[0].unet[0] > 0


def test_nan(pipes, made, tmp_path):
    def damage(tensors):
        name = sorted(tensors)[-1]
        tensors[name].view(-1)[0] = float("nan")

    path = edit_file(made / "sd1.safetensors", damage, tmp_path / "nan.safetensors")
    message = complaint(pipes["sd1"].with_lora, path)
    assert "up_blocks.1" in message
    assert "NaN" in message


@pytest.mark.parametrize("spelling", ["", "_kohya", "_loha", "_full"])
def test_wrong_family(pipes, made, spelling):
    path = made / f"sd1{spelling}.safetensors"
    message = complaint(pipes["sdxl"].with_lora, path)
    assert message.startswith(f"{path}: made for ")
    assert f"text of {NARROW} channels; this model is" in message
    assert f"text of {NARROW + WIDE} channels" in message


@pytest.mark.parametrize("spelling", ["", "_kohya"])
def test_wrong_family_the_other_way_round(pipes, made, spelling):
    message = complaint(pipes["sd1"].with_lora, made / f"sdxl{spelling}.safetensors")
    assert f"text of {NARROW + WIDE} channels; this model is" in message


def test_real_widths_have_names(pipes, tmp_path):
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": torch.ones(4, 2048), f"{stem}.lora_up.weight": torch.ones(640, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert "made for SDXL with text of 2048" in complaint(pipes["sd1"].with_lora, tmp_path / "a.safetensors")


def test_nothing_matches(pipes, tmp_path):
    stem = "lora_unet_double_blocks_0_img_attn_qkv"  # Flux
    tensors = {f"{stem}.lora_down.weight": torch.ones(4, 8), f"{stem}.lora_up.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    message = complaint(pipes["sd1"].with_lora, tmp_path / "a.safetensors")
    assert "only 0 of 2 U-Net tensors and 0 of 0 text tensors belong to this model" in message
    assert stem in message


def test_some_do_not_match(pipes, made, tmp_path):
    def rename(tensors):
        name = next(name for name in tensors if name.startswith("text_encoder"))
        tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)

    path = edit_file(made / "sd1.safetensors", rename, tmp_path / "a.safetensors")
    message = complaint(pipes["sd1"].with_lora, path)
    count = sum(name.startswith("text") for name in load_file(path))
    assert f"{count - 1} of {count} text tensors belong" in message
    assert "layers.7" in message


def test_not_an_adapter(pipes, made, tmp_path):
    model = made / "sd1" / "unet" / "diffusion_pytorch_model.safetensors"
    message = complaint(pipes["sd1"].with_lora, model)
    assert "no LoRA, LoHa, LoKr or DoRA tensors" in message
    save_file({"<cat>": torch.ones(1, NARROW)}, tmp_path / "cat.safetensors")
    assert "--embedding" in complaint(pipes["sd1"].with_lora, tmp_path / "cat.safetensors")
    path = edit_file(
        made / "sd1.safetensors",
        lambda t: t.update({"bundle_emb.x": torch.ones(1)}),
        tmp_path / "b.safetensors",
    )
    assert "bundle_emb.x" in complaint(pipes["sd1"].with_lora, path)


@pytest.mark.parametrize("content", [{}, {"bundle_emb.cat.string_to_param.*": torch.ones(1, NARROW)}])
def test_no_layers(pipes, tmp_path, content):
    save_file(content, tmp_path / "a.safetensors", metadata={"ss_output_name": "a"})
    message = complaint(pipes["sd1"].with_lora, tmp_path / "a.safetensors")
    assert f"{tmp_path / 'a.safetensors'}: has no LoRA" in message
    assert "it changes no layer" in message


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
OTHERS = {
    "GLoRA": {f"{TO_K}.{name}.weight": torch.ones(4, 4) for name in ("a1", "a2", "b1", "b2")},
    "OFT or BOFT": {f"{TO_K}.oft_blocks": torch.ones(4, 4, 4), f"{TO_K}.alpha": torch.ones(())},
    "(IA)3": {f"{TO_K}.weight": torch.ones(16), f"{TO_K}.on_input": torch.ones(1)},
    "AdaLoRA": {f"a.lora_{name}": torch.ones(4, 4) for name in "ABE"},
    "VeRA": {"base_model.model.conv_in.vera_lambda_b": torch.ones(4)},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("beside", [False, True])
def test_a_kind_that_is_not_read_is_called_by_its_name(pipes, made, tmp_path, kind, beside):
    tensors = OTHERS[kind] | (load_file(made / "sd1_kohya.safetensors") if beside else {})
    save_file(tensors, tmp_path / "a.safetensors")
    message = complaint(pipes["sd1"].with_lora, tmp_path / "a.safetensors")
    assert message.startswith(f"{tmp_path / 'a.safetensors'}: has tensors of {kind} (")
    assert "which is not supported" in message


QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_B.weight": torch.ones(16, 4)}, "different ranks"),
        ({"lora_B.weight": torch.ones(17, 3)}, "changes a layer of 16 -> 17"),
        ({"lora_A.weight": torch.ones(3, 15)}, "changes a layer of 15 -> 16"),
        ({"lora_A.weight": None}, "has no down"),
        ({"lora_magnitude_vector": torch.ones(5)}, "magnitudes [5]"),
        ({"hada_w1_a": torch.ones(16, 3)}, "hada_w1_a beside"),
        ({"lora_A.weight": torch.ones(())}, "its down has the shape []"),
        ({"alpha": torch.ones(2)}, "its alpha has the shape [2]"),
    ],
)
def test_a_layer_that_does_not_fit(pipes, made, tmp_path, changes, says):
    def damage(tensors):
        for ending, tensor in changes.items():
            tensors.pop(f"{QUERY}.{ending}", None)
            if tensor is not None:
                tensors[f"{QUERY}.{ending}"] = tensor

    path = edit_file(made / "sd1.safetensors", damage, tmp_path / "a.safetensors")
    message = complaint(pipes["sd1"].with_lora, path)
    assert message.startswith(f"{path}: {QUERY}: ")
    assert says in message


TOKENS = "text_encoder.text_model.embeddings.token_embedding"
NORM = "unet.down_blocks.0.resnets.0.norm1"


@pytest.mark.parametrize(
    ("stem", "tensors", "says"),
    [
        (QUERY, {"diff_b": torch.ones(16)}, "it changes a bias, and this layer has none"),
        (QUERY, {"diff": torch.ones(16, 17)}, "changes a layer of 17 -> 16"),
        (QUERY, {"diff": torch.ones(())}, "its diff has the shape []"),
        (QUERY, {"lora_B.bias": torch.ones(16)}, "has no down, up"),
        (NORM, {"w_norm": torch.ones(17)}, "changes a layer of 1 -> 17"),
        (NORM, {"b_norm": torch.ones(17)}, "it changes a bias of [17], this one is [16]"),
        (NORM, {"lora_A.weight": torch.ones(3, 1), "lora_B.weight": torch.ones(16, 3)}, "not GroupNorm"),
        (TOKENS, {"lora_A.weight": torch.ones(3, 24), "lora_B.weight": torch.ones(16, 3)}, "not Embedding"),
        (TOKENS, {"diff": torch.ones(3, NARROW)}, "changes a layer of 24 -> 3"),
        (NORM, {"diff": torch.ones(16), "dora_scale": torch.ones(16)}, "dora_scale beside"),
        (NORM, {"diff": torch.ones(16), "lora_A.weight": torch.ones(3, 16)}, "has no up"),
    ],
)
def test_a_sum_that_does_not_fit(pipes, tmp_path, stem, tensors, says):
    path = tmp_path / "a.safetensors"
    save_file({f"{stem}.{ending}": tensor for ending, tensor in tensors.items()}, path)
    message = complaint(pipes["sd1"].with_lora, path)
    assert message.startswith(f"{path}: {stem}: ")
    assert says in message


def test_one_layer_in_two_spellings(pipes, made, tmp_path):
    path = edit_file(
        made / "sd1.safetensors",
        lambda tensors: tensors.update(load_file(made / "sd1_kohya.safetensors")),
        tmp_path / "a.safetensors",
    )
    assert "twice, in two spellings" in complaint(pipes["sd1"].with_lora, path)


@pytest.mark.parametrize(
    "settings",
    [
        "[]",
        "{",
        '{"unet.lora_alpha": "much", "unet.r": 3}',
        '{"unet.lora_alpha": 3, "unet.r": 0}',
        '{"unet.lora_alpha": 3, "unet.r": 3, "unet.alpha_pattern": {"(": 1}}',
        '{"unet.lora_alpha": 3, "unet.r": 3, "unet.alpha_pattern": [1]}',
        '{"unet.lora_alpha": NaN, "unet.r": 3}',
        '{"unet.lora_alpha": 3, "unet.r": -3, "unet.use_rslora": true}',
    ],
)
def test_settings_that_are_none(pipes, made, tmp_path, settings):
    tensors = load_file(made / "sd1.safetensors")
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": settings})
    assert "a.safetensors" in complaint(pipes["sd1"].with_lora, tmp_path / "a.safetensors")


def test_two_files_of_one_name(pipes, made, tmp_path):
    def double(tensors):
        next(iter(tensors.values())).mul_(2)

    path = edit_file(made / "sd1.safetensors", double, tmp_path / "sd1.safetensors")
    adapted = pipes["sd1"].with_lora(made / "sd1.safetensors")
    assert "rename one" in complaint(adapted.with_lora, path)


def test_the_word_of_a_lora_that_the_model_has(pipes, made, tmp_path):
    for name, word in (("a", "boat</w>"), ("b", "<cat>"), ("c", "<cat>")):
        bundle = {f"bundle_emb.{word}.string_to_param.*": torch.ones(1, NARROW)}
        edit_file(made / "sd1.safetensors", lambda t, b=bundle: t.update(b), tmp_path / f"{name}.safetensors")
    message = complaint(pipes["sd1"].with_lora, tmp_path / "a.safetensors")
    assert "'boat</w>' already; rename the tensors bundle_emb.boat</w>.* in the file" in message
    adapted = pipes["sd1"].with_lora(tmp_path / "b.safetensors")
    assert "'<cat>' already; rename" in complaint(adapted.with_lora, tmp_path / "c.safetensors")
    wide = {"bundle_emb.<cat>.string_to_param.*": torch.ones(1, WIDE)}
    path = edit_file(made / "sd1.safetensors", lambda t: t.update(wide), tmp_path / "d.safetensors")
    assert f"vectors of width {WIDE}; this model takes {NARROW}" in complaint(pipes["sd1"].with_lora, path)


def test_nothing_is_half_done(pipes, made):
    pipe = pipes["sd1"]
    before = pipe.unet(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 4, NARROW))
    complaint(pipe.with_lora, made / "sdxl.safetensors")
    assert torch.equal(pipe.unet(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 4, NARROW)), before)


# --- textual inversions ---


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"<cat>": torch.ones(2, 768)}, f"width 768 (Stable Diffusion 1); this model takes {NARROW}"),
        ({"<cat>": torch.ones(1024)}, f"width 1024 (Stable Diffusion 2); this model takes {NARROW}"),
        (
            {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)},
            f"width 768 and 1280 (SDXL); this model takes {NARROW}",
        ),
        ({"clip_l": torch.ones(2, NARROW), "clip_g": torch.ones(2, WIDE)}, f"{NARROW} and {WIDE} (SDXL)"),
        ({"clip_l": torch.ones(2, NARROW), "clip_g": torch.ones(1, WIDE)}, "different numbers"),
        ({"a": torch.ones(2, NARROW), "b": torch.ones(1, WIDE)}, "not a textual inversion"),
        ({"<cat>": torch.full((1, NARROW), float("nan"))}, "NaN"),
        ({"<cat>": torch.ones(0, NARROW)}, "empty"),
        ({"<cat>": torch.ones(1, 2, NARROW)}, "not a textual inversion"),
        ({"<cat>": torch.ones(2, NARROW, dtype=torch.long)}, "not a textual inversion"),
        ({"boat</w>": torch.ones(1, NARROW)}, "'boat</w>' already"),
    ],
)
def test_embedding_that_does_not_fit(pipes, tmp_path, tensors, says):
    save_file(tensors, tmp_path / "cat.safetensors")
    message = complaint(pipes["sd1"].with_embedding, tmp_path / "cat.safetensors")
    assert str(tmp_path / "cat.safetensors") in message
    assert says in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_embedding_of_one_byte(pipes, tmp_path, dtype):
    rows = torch.randn(2, NARROW).to(dtype)
    save_file({"<cat>": rows}, tmp_path / "cat.safetensors")
    adapted = pipes["sd1"].with_embedding(tmp_path / "cat.safetensors")
    table = adapted.parts.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[-2:], rows.float())
    save_file({"<cat>": torch.full((1, NARROW), float("nan")).to(dtype)}, tmp_path / "nan.safetensors")
    assert "NaN" in complaint(pipes["sd1"].with_embedding, tmp_path / "nan.safetensors")


def test_embedding_of_one_encoder_on_xl(pipes, tmp_path):
    save_a1111(tmp_path / "cat.pt", torch.ones(2, NARROW))
    message = complaint(pipes["sdxl"].with_embedding, tmp_path / "cat.pt")
    assert f"width {NARROW}; this model takes {NARROW} and {WIDE} (SDXL)" in message


def test_the_same_word_twice(pipes, tmp_path):
    save_file({"<cat>": torch.ones(2, NARROW)}, tmp_path / "cat.safetensors")
    adapted = pipes["sd1"].with_embedding(tmp_path / "cat.safetensors")
    assert "choose a name" in complaint(adapted.with_embedding, tmp_path / "cat.safetensors")
    assert "choose a name" in complaint(adapted.with_embedding, tmp_path / "cat.safetensors", "<cat>_1")
    assert "choose a name" in complaint(adapted.with_embedding, tmp_path / "cat.safetensors", " ")
    adapted.with_embedding(tmp_path / "cat.safetensors", "<dog>")


@pytest.mark.parametrize("content", [{"string_to_param": 3}, {"string_to_param": {}}, [1], {}, 3, {"a": "b"}])
def test_pickles_of_other_things(pipes, tmp_path, content):
    torch.save(content, tmp_path / "cat.pt")
    assert "not a textual inversion" in complaint(pipes["sd1"].with_embedding, tmp_path / "cat.pt")
