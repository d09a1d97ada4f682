"""Learning a word: live, from its file and in diffusers it is the same, and nothing else is learnt."""

from dataclasses import replace

import diffusers
import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file
from tiny_families import FAMILIES
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

import ldm
from ldm.adapters import read_embedding
from ldm.checkpoint import load_parts
from ldm.checkpoint.io import read_metadata
from ldm.finetune import inversion
from ldm.finetune.inversion import LearntWord, add_word, save_word
from ldm.pipeline import Pipeline
from ldm.runtime import choose

PROMPT = "the <cat> boat, <cat>"
DRAW = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
FP32 = choose("cpu", "fp32")


def encoders(parts):
    return [each for each in (parts.text_encoder, parts.text_encoder_2) if each is not None]


def learnt(parts):
    return [encoder.get_input_embeddings().learnt.weight for encoder in encoders(parts)]


def teach(folder, vectors, runtime=FP32):
    """A model, and the same with a word whose rows have moved on from where they began."""
    parts = load_parts(folder, runtime)
    initial = "red boat sea" if vectors == 3 else "boat"
    taught = add_word(parts, word="<cat>", initial=initial, vectors=vectors)
    for rows in learnt(taught):
        with torch.no_grad():
            rows += 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    return parts, taught


def peer_of(folder, family, file):
    """diffusers' pipeline with the word of a file, given as its users do."""
    peer = getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(folder)
    peer.set_progress_bar_config(disable=True)
    if family != "sdxl":
        peer.load_textual_inversion(file.parent)
        return peer
    tensors = load_file(file)
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = (getattr(peer, part + suffix) for part in ("text_encoder", "tokenizer"))
        peer.load_textual_inversion(tensors[key], "<cat>", text_encoder=encoder, tokenizer=tokenizer)
        for module in encoder.modules():
            if hasattr(module, "eos_token_id"):  # 2 would pool at the highest id, which is the new word's
                module.eos_token_id = tokenizer.eos_token_id
    return peer


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("family", ["sd1", "sd2_v", "sdxl"])
def test_live_and_from_its_file_and_in_diffusers(families, family, vectors, tmp_path):
    folder, _ = families(family)
    parts, taught = teach(folder, vectors)
    live, file = Pipeline.from_parts(taught), save_word(taught, tmp_path / "word")
    assert file == tmp_path / "word" / "learned_embeds.safetensors"
    assert [rows.dtype for rows in load_file(file).values()] == [torch.float32] * len(encoders(parts))
    read = Pipeline.from_parts(parts).with_embedding(file)
    assert read.adapted.embeddings[0].name == "<cat>"

    ours, theirs = live.text.encode([PROMPT, ""]), read.text.encode([PROMPT, ""])
    assert relative_error(ours.tokens, theirs.tokens) < 1e-5
    if family == "sdxl":
        assert relative_error(ours.pooled, theirs.pooled) < 1e-5
    picture = live(PROMPT, **DRAW, seed=3).images
    assert relative_error(picture, read(PROMPT, **DRAW, seed=3).images) < 1e-5
    assert relative_error(picture, live("the boat", **DRAW, seed=3).images) > 1e-3

    peer, start = peer_of(folder, family, file), torch.randn(1, 4, 8, 8)
    drawn = live(PROMPT, **DRAW, latents=start).images
    assert relative_error(drawn, peer(PROMPT, **DRAW, latents=start).images) < 1e-5


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_gradient_is_that_of_training_the_whole_table(families, vectors, tmp_path):
    """As diffusers' script has it, which then undoes what happens to other words."""
    folder, _ = families("sd1")
    parts, taught = teach(folder, vectors)
    peer = peer_of(folder, "sd1", save_word(taught, tmp_path))
    table = peer.text_encoder.get_input_embeddings().weight.requires_grad_()
    noisy, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    ids = Pipeline.from_parts(taught).text.clips[0].tokenise("the <cat> <cat> boat").expand(2, -1)

    theirs = peer.unet(noisy, 400, peer.text_encoder(ids)[0]).sample
    F.mse_loss(theirs, target).backward()
    first = len(parts.tokenizer)
    expected = table.grad[first : first + vectors]
    assert table.grad[:first].abs().max() > 0  # what zeroing is for

    F.mse_loss(taught.unet(noisy, 400, taught.text_encoder(ids)[0]), target).backward()
    (rows,) = learnt(taught)
    assert relative_error(rows.grad, expected) < 1e-5
    assert all(p.grad is None for p in taught.text_encoder.parameters() if p is not rows)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_only_the_rows_change(families, family):
    parts, taught = teach(families(family)[0], 3)
    assert taught.unet is parts.unet
    assert taught.vae is parts.vae
    for old, new in zip(encoders(parts), encoders(taught), strict=True):
        table, word = old.get_input_embeddings().weight, new.get_input_embeddings()
        before = table.clone()
        assert word.table.weight.data_ptr() == table.data_ptr()
        pointers = {p.data_ptr() for p in old.parameters()}
        own = [p for p in new.parameters() if p.data_ptr() not in pointers]
        assert own == [p for p in new.parameters() if p.requires_grad] == [word.learnt.weight]
        assert isinstance(old.get_input_embeddings(), nn.Embedding)
        assert old.config.vocab_size == len(table)
        # Given all of a model too, an optimiser changes the rows alone.
        optimiser = AdamW(new.parameters(), lr=0.1, weight_decay=0.5)
        start = word.learnt.weight.detach().clone()
        new(torch.arange(len(table) - 4, len(table) + 3)[None])[0].square().sum().backward()
        optimiser.step()
        assert torch.equal(table, before)
        assert (word.learnt.weight - start).abs().amax(1).min() > 0.01


def test_a_model_that_was_not_frozen_is(families):
    parts = load_parts(families("sd1")[0], FP32)
    parts.text_encoder.requires_grad_()
    taught = add_word(parts, word="<cat>", initial="boat")
    trained = [p for p in taught.text_encoder.parameters() if p.requires_grad]
    assert trained == learnt(taught)


def test_rows_lie_where_their_tokens_say():
    """In the padding that some tables end with, or beyond; against one table of all."""
    table = nn.Embedding(10, 4)
    rows = torch.randn(3, 4)
    for first in (5, 8, 10):
        whole = torch.cat([table.weight[:first], rows, table.weight[first + 3 :]])
        ids = torch.arange(len(whole)).flip(0).view(1, -1)
        assert torch.equal(LearntWord(table, rows, first)(ids), F.embedding(ids, whole))


def test_16_bits(families):
    """A model in bf16 learns in fp32, with nearly the gradient of fp32."""
    folder, _ = families("sd1")
    grads = []
    for dtype in ("fp32", "bf16"):
        _, taught = teach(folder, 3, choose("cpu", dtype))
        clip = Pipeline.from_parts(taught).text.clips[0]
        assert next(clip.model.parameters()).dtype is choose("cpu", dtype).dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            ids = clip.tokenise("the <cat> boat")
            embedded = clip.model.get_input_embeddings()(ids)
            assert embedded.dtype is choose("cpu", dtype).dtype
            clip.model(ids)[0].float().square().mean().backward()
        (rows,) = learnt(taught)
        assert rows.dtype is rows.grad.dtype is torch.float32
        grads.append(rows.grad)
    assert relative_error(grads[1], grads[0]) < 0.1


@pytest.mark.parametrize(("initial", "vectors"), [("boat", 1), ("boat", 3), ("red boat", 3), ("red boat", 2)])
def test_begins_as_another_word(families, initial, vectors):
    parts = load_parts(families("sdxl")[0], choose("cpu", "bf16"))
    taught = add_word(parts, word="<cat>", initial=initial, vectors=vectors)
    words = initial.split()
    for encoder, tokenizer, rows in zip(
        encoders(parts), (parts.tokenizer, parts.tokenizer_2), learnt(taught), strict=True
    ):
        ids = [tokenizer.convert_tokens_to_ids(f"{words[i % len(words)]}</w>") for i in range(vectors)]
        assert torch.equal(rows, encoder.get_input_embeddings().weight[ids].float())
    assert "<cat>" not in parts.tokenizer.get_vocab()


def test_begins_as_a_learnt_word(families, tmp_path):
    parts, taught = teach(families("sd1")[0], 3)
    known = Pipeline.from_parts(parts).with_embedding(save_word(taught, tmp_path)).parts
    again = add_word(known, word="<dog>", initial="<cat>", vectors=4)
    (cat,), (dog,) = learnt(taught), learnt(again)
    assert torch.equal(dog, cat[[0, 1, 2, 0]])


def test_a_model_with_the_second_encoder_alone(families, tmp_path):
    parts, taught = teach(families("refiner")[0], 3)
    file = save_word(taught, tmp_path)
    assert list(load_file(file)) == ["<cat>"]
    pipe = Pipeline.from_parts(parts).with_embedding(file)
    ours, theirs = Pipeline.from_parts(taught).text.encode([PROMPT]), pipe.text.encode([PROMPT])
    assert torch.equal(ours.tokens, theirs.tokens)


# --- files ---


def test_files_of_two_encoders_tell_the_word(families, tmp_path):
    _, taught = teach(families("sdxl")[0], 3)
    file = save_word(taught, tmp_path)
    rows = load_file(file)
    assert rows.keys() == {"clip_l", "clip_g"}
    assert torch.equal(rows["clip_l"], learnt(taught)[0])
    assert torch.equal(rows["clip_g"], learnt(taught)[1])
    assert read_metadata(file)["word"] == "<cat>"
    assert read_embedding(file).name == "<cat>"
    assert read_embedding(file, "<dog>").name == "<dog>"


def test_a_file_is_written_whole_or_not_at_all(families, tmp_path, monkeypatch):
    _, taught = teach(families("sd1")[0], 1)
    before = save_word(taught, tmp_path).read_bytes()

    def fails(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inversion, "write_tensors", fails)
    with pytest.raises(ldm.UserError, match=r"cannot write to .*learned_embeds.safetensors: No space left"):
        save_word(taught, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["learned_embeds.safetensors"]
    assert (tmp_path / "learned_embeds.safetensors").read_bytes() == before


# --- what cannot be ---


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"word": "boat"}, "has 'boat' already: give a word that is new to it, such as <my-boat>"),
        ({"word": "Boat"}, "has 'Boat' already"),
        ({"word": "b"}, "has 'b' already"),
        ({"word": "a cat"}, "'a cat': give one without blanks, such as <cat>"),
        ({"word": "<cat>\n"}, "without blanks"),
        ({"word": ""}, "'': give one without blanks"),
        ({"vectors": 0}, "0 vectors are not allowed: a word has 1 to 14"),
        ({"vectors": 15}, "15 vectors are not allowed"),
        ({"initial": " "}, "begin as ' ': give what it is close to"),
        ({"initial": "<|endoftext|>"}, "the model does not know that"),
        ({"initial": "red boat sea"}, "that is 3 tokens and the word has 2; give it 3 vectors, or a shorter"),
    ],
)
def test_faults(families, asked, message):
    parts = load_parts(families("sd1")[0], FP32)
    with pytest.raises(ldm.UserError, match=message):
        add_word(parts, **{"word": "<cat>", "initial": "boat", "vectors": 2} | asked)


def test_a_word_that_was_learnt_before(families, tmp_path):
    parts, taught = teach(families("sd1")[0], 3)
    known = Pipeline.from_parts(parts).with_embedding(save_word(taught, tmp_path)).parts
    with pytest.raises(ldm.UserError, match=r"has '<cat>' already.* such as <my-cat>"):
        add_word(known, word="<cat>", initial="boat")
    with pytest.raises(ldm.UserError, match="has '<Cat>' already"):  # prompts are read in lower case
        add_word(known, word="<Cat>", initial="boat")
    with pytest.raises(ldm.UserError, match="has '<cat>_1' already"):
        add_word(known, word="<cat>_1", initial="boat")


def test_a_model_that_lists_its_words(families):
    parts = replace(load_parts(families("sd1")[0], FP32), words=frozenset({"boat"}))
    add_word(parts, word="<cat>", initial="boat")
    with pytest.raises(ldm.UserError, match="cannot begin as 'sea': the model does not know that"):
        add_word(parts, word="<cat>", initial="sea")
