"""The loss and gradients of `ldm finetune` against plain torch with diffusers' and transformers' modules.

The task makes the batch; what follows is done again here, as diffusers' training scripts do it.
"""

import copy
import json

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from tiny_finetune import QUICK, write_pictures
from torch.nn import functional as F

from ldm.dataset.cache import open_and_crop
from ldm.finetune import finetune as module
from ldm.finetune.finetune import finetune
from ldm.finetune.recipe import FinetuneRecipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 6)


@pytest.fixture
def task(families, data, tmp_path, monkeypatch):
    """A factory: the task of a fine-tuning, and diffusers' pipeline of the same weights."""

    def make(family, **options):
        tasks = []
        monkeypatch.setattr(module, "train", lambda task, *_: tasks.append(task.train()))
        monkeypatch.setattr(module, "_report", lambda *_: None)
        folder, pipe = families(family)
        given = {"model": str(folder), "train_data_dir": data, "output_dir": tmp_path / "run", "held_out": 0}
        finetune(FinetuneRecipe.model_validate(QUICK | given | {"train_batch_size": 3} | options))
        return tasks[-1], Reference(folder, pipe)

    return make


class Reference:
    """diffusers' U-Net, transformers' encoders and a DDPMScheduler, to train."""

    def __init__(self, folder, pipe):
        self.unet = copy.deepcopy(pipe.unet).train()
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        self.scheduler = DDPMScheduler.from_config(config)
        self.pipe, self.encoders = pipe, [copy.deepcopy(pipe.text_encoder).train()]
        self.tokenizers = [pipe.tokenizer]
        if hasattr(pipe, "text_encoder_2"):
            self.encoders.append(copy.deepcopy(pipe.text_encoder_2).train())
            self.tokenizers.append(pipe.tokenizer_2)

    def text(self, captions):
        """As encode_prompt of diffusers' train_text_to_image_sdxl.py, or as train_text_to_image.py."""
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                captions,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            out = encoder(ids, output_hidden_states=True, return_dict=True)
            if len(self.encoders) == 1:
                return out.last_hidden_state, None
            hidden.append(out.hidden_states[-2])
            pooled = out[0]
        return torch.cat(hidden, -1), pooled

    def losses(self, batch, captions, snr_gamma=None):
        """[B], each picture's mean, weighted."""
        x0, noise, t = batch["x0"], batch["noise"], batch["t"]
        sample = self.scheduler.add_noise(x0, noise, t)
        if "mask" in batch:
            small = F.interpolate(batch["mask"], size=x0.shape[2:])
            sample = torch.cat([sample, small, batch["masked"]], dim=1)
        tokens, pooled = self.text(captions)
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled, "time_ids": batch["time_ids"]}
        output = self.unet(sample, t, tokens, added_cond_kwargs=added).sample
        v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(x0, noise, t) if v else noise
        losses = F.mse_loss(output, target, reduction="none").mean((1, 2, 3))
        if snr_gamma is not None:
            snr = compute_snr(self.scheduler, t)
            weights = torch.stack([snr, snr_gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
            losses = losses * weights / (snr + 1 if v else snr)
        return losses


def captions_of(task, batch):
    return [task.examples[int(i)].caption for i in batch["example"]]


def gradients(model):
    prefix = "text_model."
    return {n.removeprefix(prefix): p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(ours, theirs, tolerance=2e-5):  # fp32 sums in another order: 1.2e-5 with AVX2
    """Of each tensor's largest; some, as those of keys' biases, are 0 but for rounding."""
    ours, theirs = gradients(ours), gradients(theirs)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, grad in theirs.items():
        scale = max(float(grad.abs().max()), 0.01 * largest)
        assert float((ours[name] - grad).abs().max()) < tolerance * scale, name


def check_loss(loss, reference):
    assert float(loss.detach()) == pytest.approx(float(reference), rel=1e-5)


def rng():
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd1", {}),
        ("sd1", {"snr_gamma": 5.0, "random_flip": True, "center_crop": False}),
        ("sd1", {"train_text_encoder": True}),
        ("sd2_v", {}),
        ("sd2_v", {"snr_gamma": 5.0, "train_text_encoder": True}),
        ("sdxl", {"center_crop": False}),
        ("sdxl", {"snr_gamma": 5.0, "train_text_encoder": True}),
        ("inpaint", {"inpainting": True}),
        ("sd1", {"gradient_checkpointing": True}),
    ],
)
def test_a_step_of_full_fine_tuning_equals_diffusers(task, family, options):
    ours, theirs = task(family, mode="full", **options)
    batch = ours.batch(rng(), 3, 1)
    loss, extra = ours(batch)
    loss.backward()
    reference = theirs.losses(batch, captions_of(ours, batch), options.get("snr_gamma")).mean()
    reference.backward()
    check_loss(loss, reference)
    assert extra == {}
    check_gradients(ours.unet, theirs.unet)
    for mine, other in zip((ours.text_encoder, ours.text_encoder_2), theirs.encoders, strict=False):
        if options.get("train_text_encoder"):
            check_gradients(mine, other)
        else:
            assert gradients(mine) == {} if mine is not None else True


def test_prior_preservation_is_the_sum_of_two_means(task, tmp_path):
    of_class = {"class_prompt": "sea", "class_data_dir": write_pictures(tmp_path / "class", 3)}
    of_class |= {"num_class_images": 3, "prior_loss_weight": 0.3}
    ours, theirs = task("sd1", mode="full", snr_gamma=5.0, **of_class)
    batch = ours.batch(rng(), 3, 0)
    loss, extra = ours(batch)
    loss.backward()
    own = {name: value for name, value in batch.items() if not name.startswith("prior.")}
    prior = {name.removeprefix("prior."): value for name, value in batch.items() if name.startswith("prior.")}
    assert captions_of(ours, prior) == ["sea"] * 3
    assert "sea" not in captions_of(ours, own)
    assert not torch.equal(own["noise"], prior["noise"])
    of_theirs = theirs.losses(prior, ["sea"] * 3, 5.0).mean()
    reference = theirs.losses(own, captions_of(ours, own), 5.0).mean() + 0.3 * of_theirs
    reference.backward()
    check_loss(loss, reference)
    check_loss(extra["prior_loss"], of_theirs)
    check_gradients(ours.unet, theirs.unet)


def test_gradients_of_a_lora_are_those_of_peft(task):
    from peft import LoraConfig

    ours, theirs = task("sd1", rank=2, lora_alpha=3)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    theirs.unet.requires_grad_(False)
    theirs.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    own = dict(ours.unet.named_parameters())
    with torch.no_grad():
        for name, p in theirs.unet.named_parameters():
            if "lora" in name:
                own[name].normal_(generator=rng(), std=0.3)
                p.copy_(own[name])
    batch = ours.batch(rng(), 3, 1)
    loss, _ = ours(batch)
    loss.backward()
    reference = theirs.losses(batch, captions_of(ours, batch)).mean()
    reference.backward()
    check_loss(loss, reference)
    check_gradients(ours.unet, theirs.unet, 3e-5)


def test_the_gradient_of_a_word_is_that_of_its_row(task, families):
    """In transformers the table is resized, as in diffusers' textual_inversion.py."""
    word = {"mode": "textual_inversion", "placeholder_token": "<it>", "initializer_token": "boat"}
    ours, theirs = task("sd1", **word, instance_prompt="red <it>, sea")
    (encoder,), (tokenizer,) = theirs.encoders, [copy.deepcopy(theirs.tokenizers[0])]
    theirs.tokenizers = [tokenizer]
    assert tokenizer.add_tokens("<it>") == 1
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-1] = table[tokenizer.convert_tokens_to_ids("boat</w>")]
    batch = ours.batch(rng(), 3, 0)
    loss, _ = ours(batch)
    loss.backward()
    reference = theirs.losses(batch, ["red <it>, sea"] * 3).mean()
    reference.backward()
    check_loss(loss, reference)
    (grad,) = [p.grad for p in ours.parameters() if p.requires_grad]
    assert float((grad[0] - table.grad[-1]).abs().max()) < 1e-5 * float(grad.abs().max())


def test_latents_are_those_of_diffusers(task, data):
    """What a batch is made of: the picture's moments, scaled, and what SDXL is told of the crop."""
    ours, theirs = task("sdxl")
    rows = ours.splits.train.at(0)
    batch = ours.batch(rng(), 3, 0)
    pictures = torch.stack([open_and_crop(row.example, row.crop) for row in rows])
    with torch.no_grad():
        moments = theirs.pipe.vae.encode(pictures).latent_dist
    noise = torch.randn(moments.mean.shape, generator=rng())
    expected = (moments.mean + moments.std * noise) * theirs.pipe.vae.config.scaling_factor
    assert float((batch["x0"] - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    expected = [[*row.example.size, row.crop.top, row.crop.left, *row.crop.size] for row in rows]
    assert batch["time_ids"].tolist() == expected
    assert ours.names(batch) == [str(row.example.path) for row in rows]
