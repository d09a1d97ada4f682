"""What a pipeline with adapters shares, keeps, tells, saves; and how requests name adapters."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import peft_copy, save_diffusers, save_lycoris
from tiny_families import NARROW, WIDE, make_family

import ldm
from ldm.adapters import read_lora
from ldm.request import Request
from ldm.runtime import finite

DRAW = {"prompt": "the red boat", "num_inference_steps": 2, "output_type": "latent", "seed": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of the family sd1, LoRAs for it in loras/, and diffusers' pipeline."""
    root = tmp_path_factory.mktemp("adapted")
    peer = make_family("sd1", root / "model")
    (root / "loras" / "deep").mkdir(parents=True)
    save_diffusers(peer, root / "loras" / "style.safetensors")
    save_diffusers(peer, root / "loras" / "deep" / "other.safetensors", "rslora")
    save_lycoris(peft_copy(peer.unet, "loha", ["to_q", "conv1"]), root / "loras" / "hada.safetensors")
    return root


@pytest.fixture
def pipe(made):
    return ldm.load(made / "model", dtype="fp32", device="cpu")


@pytest.fixture
def style(made):
    return made / "loras" / "style.safetensors"


def tensors_of(pipe):
    parts = {"unet": pipe.unet, "text": pipe.parts.text_encoder}
    return {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }


def draw(pipe, **changes):
    return pipe(**{**DRAW, **changes}).images


def test_everything_is_shared_and_nothing_changes(pipe, style):
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(pipe).items()}
    picture, adapted = draw(pipe), pipe.with_lora(style, 0.8)
    assert not torch.equal(draw(adapted), picture)
    own, shared = tensors_of(pipe), tensors_of(adapted)
    assert list(own) == list(shared)
    assert all(own[name] is shared[name] for name in own)
    assert all(torch.equal(before[name], own[name]) for name in own)
    assert torch.equal(draw(pipe), picture)
    assert adapted.vae is pipe.vae


def test_fuse_and_unfuse(pipe, style):
    own = tensors_of(pipe)
    fused = pipe.with_lora(style, 0.8).fuse()
    weights = tensors_of(fused)
    assert list(weights) == list(own)
    assert any(weights[name] is not own[name] for name in own)
    assert torch.allclose(draw(fused), draw(pipe.with_lora(style, 0.8)), atol=1e-3)
    for restored in (fused.unfuse(), fused.base, fused.unfuse().base):
        again = tensors_of(restored)
        assert all(again[name].data_ptr() == own[name].data_ptr() for name in own)
    assert torch.equal(draw(fused.base), draw(pipe))
    assert fused.fuse() is fused
    assert pipe.base is pipe
    # One more adapter stays fused, and begins from the original weights again.
    twice = fused.with_lora(style, 0.3)
    assert torch.equal(draw(twice), draw(pipe.with_lora(style, 0.3).fuse()))


def test_a_weight_of_nothing_is_the_base(pipe, style, made):
    for file in (style, made / "loras" / "hada.safetensors"):
        assert torch.equal(draw(pipe.with_lora(file, 0)), draw(pipe))
    only_text = pipe.with_lora(style, 0, 1)
    assert only_text.unet is pipe.unet
    assert only_text.parts.text_encoder is not pipe.parts.text_encoder


def test_the_same_file_again_gets_the_new_weight(pipe, style):
    adapted = pipe.with_lora(style, 0.2).with_lora(style, 0.8)
    assert torch.equal(draw(adapted), draw(pipe.with_lora(style, 0.8)))
    assert len(adapted.adapted.loras) == 1


def test_report(pipe, style, made):
    (report,) = pipe.with_lora(style, 0.8, 0.5).adapted.reports
    unet = sum(name.startswith("unet.") for name in load_file(style))
    text = len(load_file(style)) - unet
    assert report.unet == (unet, unet)
    assert report.text == (text, text)
    assert report.layers == (unet + text) // 2
    told = f"matched U-Net {unet} of {unet} tensors (weight 0.8), text {text} of {text} tensors (weight 0.5)"
    assert str(report) == f"style: LoRA, {told}"
    (report,) = pipe.with_lora(made / "loras" / "hada.safetensors").adapted.reports
    assert report.kinds == ("LoHa",)
    assert report.text == (0, 0)


def test_16_bits(made, style):
    """Unfused factors and fused weights are in the model's dtype, near the result in fp32."""
    half = ldm.load(made / "model", dtype="bf16", device="cpu").with_lora(style)
    full = ldm.load(made / "model", dtype="fp32", device="cpu").with_lora(style)
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 16, NARROW)
    exact = full.unet(sample, 5, context)
    for pipe in (half, half.fuse()):
        out = pipe.unet(sample.bfloat16(), 5, context.bfloat16())
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).abs().max() / exact.abs().max() < 0.1


def test_a_rescue_in_fp32_keeps_the_adapter(made, style):
    """`finite` copies the module to fp32: the factors must follow."""
    half = ldm.load(made / "model", dtype="bf16", device="cpu").with_lora(style)

    def call(unet):
        dtype = unet.conv_in.weight.dtype
        out = unet(torch.ones(1, 4, 8, 8, dtype=dtype), 5, torch.ones(1, 3, NARROW, dtype=dtype))
        return out * float("nan") if dtype == torch.bfloat16 else out

    with pytest.warns(UserWarning, match="done again in float32"):
        rescued = finite(half.unet, call, "the U-Net")
    plain = half.unet(torch.ones(1, 4, 8, 8).bfloat16(), 5, torch.ones(1, 3, NARROW).bfloat16()).float()
    assert (rescued - plain).abs().max() / plain.abs().max() < 0.1


def test_threads_draw_with_different_adapters(pipe, style, made):
    pipes = [pipe, pipe.with_lora(style), pipe.with_lora(made / "loras" / "hada.safetensors")]
    alone = [draw(each) for each in pipes]
    together = [None] * len(pipes)

    def work(k):
        together[k] = draw(pipes[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(pipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_save_writes_what_is_drawn(pipe, style, made, tmp_path):
    save_file({"<cat>": torch.randn(3, NARROW)}, tmp_path / "cat.safetensors")
    adapted = pipe.with_lora(style, 0.8).with_embedding(tmp_path / "cat.safetensors")
    adapted.save(tmp_path / "saved")
    again = ldm.load(tmp_path / "saved", dtype="fp32", device="cpu")
    assert torch.equal(draw(again, prompt="a <cat>"), draw(adapted.fuse(), prompt="a <cat>"))
    assert not again.adapted.loras
    with pytest.raises(ldm.UserError, match="a single file cannot hold <cat>"):
        adapted.save(tmp_path / "saved.safetensors")


# --- in requests ---


@pytest.fixture
def in_place(made, monkeypatch):
    monkeypatch.chdir(made)


@pytest.mark.usefixtures("in_place")
def test_tags(pipe, style):
    tagged = pipe(**{**DRAW, "prompt": "the red <lora:style:0.8> boat <lora:other:0.1:-0.3>"})
    other = Path("loras/deep/other.safetensors")
    expected = pipe.with_lora(style, 0.8).with_lora(other, -0.3, 0.1)
    assert torch.equal(tagged.images, draw(expected))
    (request,) = tagged.requests
    assert "lora" not in request.prompt
    assert [(use.name, use.weight, use.text_weight) for use in request.loras] == [
        ("style", 0.8, 0.8),
        ("other", -0.3, 0.1),
    ]
    assert request.loras[0].sha256 == read_lora(style).sha256
    # The request draws the same picture again, from JSON too.
    again = Request.from_json(request.to_json())
    assert torch.equal(pipe.generate(again, output_type="latent").images, tagged.images)
    assert torch.equal(pipe.generate(request.replace(loras=None), output_type="latent").images, draw(pipe))


@pytest.mark.usefixtures("in_place")
def test_tags_reweight_what_the_pipeline_has(pipe, style):
    adapted = pipe.with_lora(style, 0.5)
    assert torch.equal(draw(adapted, prompt="the red boat<lora:style:0.8>"), draw(pipe.with_lora(style, 0.8)))
    (request,) = adapted(**DRAW).requests
    assert request.loras[0].weight == 0.5
    assert torch.equal(pipe.generate(request, output_type="latent").images, draw(adapted))
    assert torch.equal(next(iter(pipe.denoise(request))).x, next(iter(adapted.denoise(request))).x)


@pytest.mark.usefixtures("in_place")
def test_the_next_batch_finds_the_pipeline_ready(pipe):
    request = pipe.resolve(Request(prompt="a <lora:style:0.8>"))
    assert pipe.for_request(request) is pipe.for_request(request.replace(seeds=(5,)))
    assert pipe.for_request(Request()) is pipe


@pytest.mark.usefixtures("in_place")
def test_one_call_has_one_set(pipe):
    with pytest.raises(ldm.UserError, match="same LoRAs"):
        pipe(["a <lora:style:1>", "b"], num_inference_steps=1)


def test_a_changed_file_is_refused(pipe, style, tmp_path):
    copied = tmp_path / "style.safetensors"
    copied.write_bytes(style.read_bytes())
    request = pipe.with_lora(copied).resolve(Request())
    tensors = load_file(copied)
    next(iter(tensors.values())).mul_(2)
    save_file(tensors, copied)
    for changed in (pipe.with_lora(copied), ldm.load(pipe.parts.weights.parents[1], device="cpu")):
        object.__setattr__(changed, "lora_dir", tmp_path)
        with pytest.raises(ldm.UserError, match="not the file that this picture was drawn with"):
            changed.resolve(request)


def test_names_never_leave_the_folder(pipe, style, tmp_path):
    (tmp_path / "loras").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(style.read_bytes())
    object.__setattr__(pipe, "lora_dir", tmp_path / "loras")
    for name in ("../secret", str(tmp_path / "secret"), "missing"):
        with pytest.raises(ldm.UserError, match="no LoRA"):
            pipe.resolve(Request(loras=[{"name": name}]))


# --- words ---


def test_words_leave_the_model_as_it_was(pipe, tmp_path):
    save_file({"<cat>": torch.randn(3, NARROW)}, tmp_path / "cat.safetensors")
    before = pipe.text.clips[0].tokenise("a <cat> boat")
    rows = pipe.parts.text_encoder.get_input_embeddings().weight
    count, adapted = len(rows), pipe.with_embedding(tmp_path / "cat.safetensors")
    first = len(pipe.parts.tokenizer)
    ids = adapted.text.clips[0].tokenise("a <cat> boat").flatten().tolist()
    assert ids[2:5] == [first, first + 1, first + 2]
    assert torch.equal(pipe.text.clips[0].tokenise("a <cat> boat"), before)
    assert len(pipe.parts.text_encoder.get_input_embeddings().weight) == count
    assert pipe.parts.text_encoder.config.vocab_size == count
    own, shared = tensors_of(pipe), tensors_of(adapted)
    changed = [name for name in own if own[name] is not shared[name]]
    assert changed == ["text.embeddings.token_embedding.weight"] or len(changed) == 1
    assert torch.equal(draw(adapted), draw(pipe))  # without the word nothing is different
    assert adapted.base.parts is pipe.parts


def test_a_plain_word_is_not_found_within_others(pipe, tmp_path):
    save_file({"ed": torch.randn(1, NARROW)}, tmp_path / "x.safetensors")
    adapted = pipe.with_embedding(tmp_path / "x.safetensors", "ed")
    new = len(pipe.parts.tokenizer)
    assert new not in adapted.text.clips[0].tokenise("a red bed")
    assert new in adapted.text.clips[0].tokenise("a ed, bed")


def test_words_in_requests(pipe, tmp_path):
    save_file({"<cat>": torch.randn(1, NARROW)}, tmp_path / "cat.safetensors")
    adapted = pipe.with_embedding(tmp_path / "cat.safetensors")
    assert adapted.resolve(Request(prompt="a boat")).embeddings is None
    request = adapted.resolve(Request(prompt="a boat", negative_prompt="bad <Cat>"))
    assert [use.name for use in request.embeddings] == ["<cat>"]
    assert adapted.resolve(request) == request
    with pytest.raises(ldm.UserError, match="is not given: give it by --embedding <cat>=FILE"):
        pipe.resolve(request)
    save_file({"<cat>": torch.randn(1, NARROW)}, tmp_path / "cat.safetensors")
    with pytest.raises(ldm.UserError, match="is not the file"):
        pipe.with_embedding(tmp_path / "cat.safetensors").resolve(request)


def test_pooled_text_is_that_of_the_end(tmp_path):
    """SDXL: a new word has the highest id, which must not be taken for the end of the text."""
    make_family("sdxl", tmp_path / "xl")
    pipe = ldm.load(tmp_path / "xl", dtype="fp32", device="cpu")
    same = pipe.parts.text_encoder_2.get_input_embeddings().weight[320:321].clone()
    first = pipe.parts.text_encoder.get_input_embeddings().weight[320:321].clone()
    word = pipe.parts.tokenizer.convert_ids_to_tokens([320])[0].removesuffix("</w>")
    save_file({"clip_l": first, "clip_g": same}, tmp_path / "copy.safetensors")
    adapted = pipe.with_embedding(tmp_path / "copy.safetensors", "<copy>")
    ours, theirs = adapted.text.encode(["the <copy> boat"]), pipe.text.encode([f"the {word} boat"])
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.pooled, theirs.pooled)
    assert same.shape[1] == WIDE


def test_words_that_an_adapter_brings_are_not_unknown(families, tmp_path):
    pipe = ldm.load(families("sd1")[0], device="cpu", dtype="fp32")
    pipe = replace(pipe, parts=replace(pipe.parts, words=frozenset({"a", "boat"})))
    assert pipe.unknown_words("a mill boat") == ["mill"]
    save_file(
        {"<mill>": torch.zeros(pipe.parts.text_encoder.config.hidden_size)}, tmp_path / "word.safetensors"
    )
    assert pipe.with_embedding(tmp_path / "word.safetensors").unknown_words("a <mill> wheel") == ["wheel"]
