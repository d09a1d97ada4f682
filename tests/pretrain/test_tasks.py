"""The three tasks: losses against diffusers' schedulers and closed forms, exports against loaders."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny_tasks import tiny_parts, tiny_pictures, tiny_tokenizer, tiny_vae, unet_config
from transformers import CLIPTokenizer

import ldm
from ldm.checkpoint import load_text_encoder, load_tokenizer, save_module
from ldm.errors import UserError
from ldm.evaluate.features import ImageTower, unit
from ldm.models import build
from ldm.pretrain.clip import CLIPTask, tokenise
from ldm.pretrain.unet import UNetTask, prepare
from ldm.pretrain.vae import VAETask, build_vae, load_vae
from ldm.pretrain.widen import widen_vae


@pytest.fixture
def pictures():
    return tiny_pictures()


@pytest.fixture
def tokenizer_dir(tmp_path):
    return tiny_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_unet_loss_and_gradients_equal_a_plain_step(tokenizer_dir, pictures, prediction):
    parts = tiny_parts(tokenizer_dir, prediction)
    data = prepare(pictures, parts.vae, parts.tokenizer, tokenizer_dir.parent / "cache")
    task = UNetTask(parts, data, data, {"object_weight": 2.0}, ["a red car"])
    batch = task.batch(torch.Generator().manual_seed(3), 6)
    batch["t"][0] = 999  # at zero terminal SNR: an infinite sigma
    loss, _ = task(batch)
    loss.backward()
    ours = parts.unet.conv_in.weight.grad.clone()
    parts.unet.zero_grad()

    scheduler = DDPMScheduler.from_config(parts.scheduler)
    noisy = scheduler.add_noise(batch["x0"], batch["noise"], batch["t"])
    target = {
        "epsilon": batch["noise"],
        "v_prediction": scheduler.get_velocity(batch["x0"], batch["noise"], batch["t"]),
        "sample": batch["x0"],
    }[prediction]
    output = parts.unet(noisy, batch["t"], parts.text_encoder(input_ids=batch["ids"]).last_hidden_state)
    weight = batch["weight"][:, None].expand_as(target)
    reference = (weight * (output - target) ** 2).sum() / weight.sum()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    theirs = parts.unet.conv_in.weight.grad
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


def test_the_layout_s_share_of_timesteps_has_much_noise(tokenizer_dir, pictures):
    parts = tiny_parts(tokenizer_dir, "epsilon")
    data = prepare(pictures, parts.vae, parts.tokenizer, tokenizer_dir.parent / "cache")
    task = UNetTask(parts, data, data, {"layout": 0.5}, [])
    t = task.batch(torch.Generator().manual_seed(0), 4000)["t"]
    assert (t >= 600).float().mean().item() == pytest.approx(0.5 + 0.5 * 0.4, abs=0.02)
    assert t.min() < 20
    assert t.max() > 980


def test_alignment_is_learnt_from_words_and_noise(tokenizer_dir, pictures):
    """Its loss equals one written out by hand, and trains the U-Net up to where it looks, and the text."""
    parts = tiny_parts(tokenizer_dir, "epsilon")
    things = np.zeros((12, 2, 2), np.uint8)
    things[:, 0, 1] = 1 + 3 * 8 + 5  # the fourth kind in the sixth colour
    known = replace(pictures, things=things)
    data = prepare(known, parts.vae, parts.tokenizer, tokenizer_dir.parent / "cache")
    task = UNetTask(parts, data, data, {"align": 0.5}, [])
    batch = task.batch(torch.Generator().manual_seed(0), 4)
    kept = []
    parts.unet.up_blocks[0].register_forward_hook(lambda *call: kept.append(call[2]))
    loss, extra = task(batch)
    logits = task.alignment.head(torch.nn.functional.avg_pool2d(kept[0], 2))
    kinds, colours = logits[:, :15].log_softmax(1), logits[:, 15:].log_softmax(1)
    kind = torch.tensor([[0, 4], [0, 0]]).expand(4, 1, 2, 2)
    expected = -kinds.gather(1, kind).mean() - colours[:, 5, 0, 1].sum() / 16
    assert extra["align"].item() == pytest.approx(expected.item(), rel=1e-5)
    plain = UNetTask(parts, data, data, {}, [])(batch)[0]
    assert loss.item() == pytest.approx(plain.item() + 0.5 * expected.item(), rel=1e-5)
    parts.unet(batch["x0"], 5, parts.text_encoder(input_ids=batch["ids"]).last_hidden_state)
    task.alignment(batch["things"]).backward()
    assert parts.unet.conv_in.weight.grad.abs().max() > 0
    assert parts.unet.conv_out.weight.grad is None
    assert parts.text_encoder.get_input_embeddings().weight.grad.abs().max() > 0


def test_noise_may_hold_the_scene_in_other_colours(tokenizer_dir, pictures):
    """Where it does, the noisy latents are those of the other painting, and x0 is still the right one."""
    parts = tiny_parts(tokenizer_dir, "v_prediction")
    told = np.tile([True, False], (12, 1))
    painted = replace(pictures, repainted=pictures.images[::-1].copy(), names_colours=told)
    data = prepare(painted, parts.vae, parts.tokenizer, tokenizer_dir.parent / "cache")
    assert torch.equal(data.repainted, data.latents.flip(0))
    tasks = [UNetTask(parts, data, data, {"repainted": share, "drop": 0.25}, []) for share in (0, 0.5)]
    plain, batch = (task.batch(torch.Generator().manual_seed(0), 4000) for task in tasks)
    assert all(torch.equal(plain[name], batch[name]) for name in ("x0", "t", "ids"))
    number = (batch["x0"][:, None] == data.latents.float()).all((2, 3, 4)).float().argmax(1)
    chosen = (batch["noise"] != plain["noise"]).any((1, 2, 3))
    may = (batch["ids"] == data.token_ids[number, 0]).all(1) & (batch["t"] >= 300)
    assert not chosen[~may].any()
    assert chosen[may].float().mean().item() == pytest.approx(0.5, abs=0.05)
    scheduler = DDPMScheduler.from_config(parts.scheduler)
    held = scheduler.add_noise(data.repainted[number].float(), plain["noise"], batch["t"])
    noisy = scheduler.add_noise(batch["x0"], batch["noise"], batch["t"])
    assert ((noisy - held)[chosen].abs().max() / held.abs().max()).item() < 1e-6
    unknown = UNetTask(parts, replace(data, repainted=None), data, {"repainted": 0.5, "drop": 0.25}, [])
    assert torch.equal(unknown.batch(torch.Generator().manual_seed(0), 4000)["noise"], plain["noise"])


def test_captions_are_dropped_at_the_rate_asked_for(tokenizer_dir, pictures):
    parts = tiny_parts(tokenizer_dir, "epsilon")
    data = prepare(pictures, parts.vae, parts.tokenizer, tokenizer_dir.parent / "cache")
    task = UNetTask(parts, data, data, {"drop": 0.25}, [])
    ids = task.batch(torch.Generator().manual_seed(0), 4000)["ids"]
    empty = torch.tensor(parts.tokenizer("", padding="max_length").input_ids)
    assert (ids == empty).all(1).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_latents_are_those_of_the_vae_and_cached_by_its_weights(tokenizer_dir, pictures, tmp_path):
    vae = tiny_vae()
    tokenizer = load_tokenizer(tokenizer_dir)
    data = prepare(pictures, vae, tokenizer, tmp_path / "cache")
    expected = vae.encode_latents(pictures.tensors(torch.arange(12)))
    assert ((data.latents.float() - expected).abs().max() / expected.abs().max()).item() < 0.03  # bf16
    with torch.no_grad():
        next(vae.parameters()).mul_(1.5)
    assert not torch.equal(prepare(pictures, vae, tokenizer, tmp_path / "cache").latents, data.latents)
    assert len(list((tmp_path / "cache").glob("latents*"))) == 2


def test_unet_export_opens_and_draws(tokenizer_dir, pictures, tmp_path):
    parts = tiny_parts(tokenizer_dir, "v_prediction")
    data = prepare(pictures, parts.vae, parts.tokenizer, tmp_path / "cache")
    task = UNetTask(parts, data, data, {}, ["a red car", "snow"])
    task.export(tmp_path / "model")
    assert task.picture(tmp_path / "model").size[1] >= 32
    loaded = ldm.load(tmp_path / "model", dtype="fp32").unet.state_dict()
    for name, value in parts.unet.state_dict().items():
        assert torch.equal(loaded[name], value.to(torch.bfloat16).float())


def test_vae_export_is_the_autoencoder_as_it_was_measured(pictures, tmp_path):
    vae = tiny_vae()
    VAETask(vae, pictures, pictures, {}, decoder_only=False).export(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    for folder in (tmp_path / "vae", tmp_path):  # of the autoencoder, or of a model that has it
        for name, value in load_vae(folder).state_dict().items():
            assert torch.equal(value, vae.state_dict()[name])


def test_a_widened_vae_is_kept_near_the_narrow_one(pictures, tmp_path):
    narrow = tiny_vae()
    task = VAETask(widen_vae(narrow, 5), pictures, pictures, {"keep": 2.0}, False, narrow)
    batch = task.batch(torch.Generator().manual_seed(0), 4)
    assert task(batch)[1]["drift"] == 0
    with torch.no_grad():
        task.vae.encoder.layers[-1].bias += 0.5
    free = VAETask(task.vae, pictures, pictures, {}, False)
    assert task(batch)[1]["drift"].item() == pytest.approx(0.25, rel=1e-5)
    assert task(batch)[0].item() == pytest.approx(free(batch)[0].item() + 2 * 0.25, rel=1e-5)
    task(batch)[0].backward()
    assert all(p.grad is None for p in task.narrow.parameters())


def test_channels_for_details_are_pulled_to_a_spread_of_their_own(pictures):
    """An encoder that gives known latents: the loss of their moments, by hand."""
    batch = {"x": torch.zeros(4, 3, 32, 32), "noise": torch.zeros(()), "pooled": torch.tensor(False)}
    vae = tiny_vae()
    count = vae.latent_channels
    z = torch.randn(4, count, 4, 4, generator=torch.Generator().manual_seed(0))
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
    z[:, -1] *= 0.25
    vae.encode_latents = lambda x: z
    for loss, expected in (
        ({}, 0.75**2),
        ({"fine_channels": 1}, 0.25**2),
        ({"fine_channels": 2}, 0.25**2 + 0.5**2),
    ):
        said = VAETask(vae, pictures, pictures, loss, decoder_only=False)(batch)[1]
        assert said["moments"].item() == pytest.approx(expected / count, rel=1e-4)
    exact = VAETask(vae, pictures, pictures, {"fine_channels": 1, "fine_std": 0.25}, decoder_only=False)
    assert exact(batch)[1]["moments"].item() < 1e-10
    for wrong in (0.5, count + 1):
        with pytest.raises(UserError, match=f"from 0 to the {count} latent channels"):
            VAETask(vae, pictures, pictures, {"fine_channels": wrong}, decoder_only=False)


def test_decoder_only_leaves_the_encoder_alone(pictures, tmp_path):
    vae = tiny_vae()
    task = VAETask(vae, pictures, pictures, {}, decoder_only=True)
    loss, _ = task(task.batch(torch.Generator().manual_seed(0), 4))
    loss.backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert any(p.grad is not None for p in vae.decoder.parameters())
    task.export(tmp_path / "vae")
    for name, value in load_vae(tmp_path / "vae").state_dict().items():
        assert torch.equal(value, vae.state_dict()[name])


def test_what_the_autoencoder_s_trainer_cannot_do_is_said(pictures, tmp_path):
    with pytest.raises(UserError, match="a multiple of 16 pixels"):
        VAETask(tiny_vae(), pictures, pictures, {"crop": 24}, decoder_only=False)
    with pytest.raises(UserError, match="exclude each other"):
        VAETask(tiny_vae(), pictures, pictures, {}, True, tiny_vae())
    with pytest.raises(UserError, match="this trains an AutoencoderTiny"):
        build_vae(unet_config())
    save_module(build(unet_config()), tmp_path / "unet")
    with pytest.raises(UserError, match="give the folder of an autoencoder"):
        load_vae(tmp_path / "unet")


def test_crops_are_parts_of_the_pictures(pictures):
    task = VAETask(tiny_vae(), pictures, pictures, {"crop": 16}, decoder_only=False)
    crops = task.batch(torch.Generator().manual_seed(0), 5)["x"]
    assert crops.shape == (5, 3, 16, 16)
    whole = pictures.tensors(torch.arange(12)).unfold(2, 16, 1).unfold(3, 16, 1)
    for crop in crops:
        assert (whole == crop[None, :, None, None]).all((1, 4, 5)).any()


def test_clip_loss_is_the_papers_and_export_loads(tokenizer_dir, pictures, tmp_path):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"text_config": tower, "vision_config": tower | {"patch_size": 8}, "projection_dim": 8}
    torch.manual_seed(0)
    task = CLIPTask(model, tokenizer_dir, pictures, pictures, {"naming": 0.0})
    batch = task.batch(torch.Generator().manual_seed(0), 6)
    reference = task.clip(input_ids=batch["ids"], pixel_values=batch["x"], return_loss=True).loss
    assert task(batch)[0].item() == pytest.approx(reference.item(), rel=1e-5)
    task.export(tmp_path / "clip")
    text = load_text_encoder(tmp_path / "clip" / "text_encoder")
    ours = text(input_ids=batch["ids"]).last_hidden_state
    theirs = task.clip.text_model(input_ids=batch["ids"]).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    images, captions = pictures.images[:4], [captions[0] for captions in pictures.captions[:4]]
    both = ImageTower.load(tmp_path / "clip" / "clip")
    ids = tokenise(CLIPTokenizer.from_pretrained(tokenizer_dir), [[caption] for caption in captions])[:, 0]
    with torch.no_grad():
        x = pictures.tensors(torch.arange(4))
        image, words, _ = task._embed(x, ids.long())
    np.testing.assert_allclose(both.embed(images), image, atol=1e-5)
    np.testing.assert_allclose(unit(both.texts(captions)), words, atol=1e-5)
