"""What would go wrong on a GPU, found without one: by torch's `meta` device, by fakes, and by counting."""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny_finetune import QUICK, WORD, write_pictures
from tiny_tasks import tiny_parts, tiny_pictures, tiny_tokenizer, tiny_vae, unet_config
from tiny_upscaler import SIDE, upscaler_parts
from torch._dynamo.testing import CompileCounter

from ldm.checkpoint import load_parts
from ldm.cli.drawing.draw import draw_images
from ldm.dataset.buckets import make_crop
from ldm.dataset.cache import _opened as opened
from ldm.dataset.examine import examine
from ldm.diffusion.schedule import Schedule
from ldm.errors import UserError
from ldm.finetune import finetune as finetuning
from ldm.finetune.recipe import FinetuneRecipe
from ldm.kernels import native
from ldm.models import build
from ldm.models.conditioning import Conditioning
from ldm.pipeline import Pipeline
from ldm.pipeline.networks import predict
from ldm.postcards.scoring.agreement import names
from ldm.postcards.scoring.fit import ScorerTask
from ldm.postcards.scoring.scorer import Scorer
from ldm.pretrain.clip import CLIPTask
from ldm.pretrain.data import Pictures
from ldm.pretrain.distil import DistilTask
from ldm.pretrain.unet import UNetTask, prepare
from ldm.pretrain.upscaler import UpscalerTask, make_pairs
from ldm.pretrain.vae import VAETask
from ldm.runtime import Runtime
from ldm.train.loss import noisy_latents, training_target
from ldm.train.task import Task

SCHEDULER = {"_class_name": "DDPMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULER |= {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


@pytest.fixture
def compiled():
    """A backend of torch.compile that counts graphs and changes nothing."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


# --- drawing ----------------------------------------------------------------------------------------------


def small_unet(**changes):
    """One level without attention: torch.compile is slow to read more."""
    torch.manual_seed(0)
    one = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    return build(unet_config() | one | {"mid_block_type": None} | changes).eval().requires_grad_(False)


def test_steps_share_one_compiled_graph_and_see_the_very_same_timesteps(compiled, monkeypatch):
    """Whole ones and fractions. A number would be a constant to torch.compile, which soon gives up then."""
    monkeypatch.setattr(native, "available", lambda: False)  # as torch.compile has none, so bits are the same
    unet, schedule = small_unet(), Schedule.from_config(SCHEDULER)
    grid = schedule.grid(12, "karras", "euler")
    x, cond = torch.randn(2, 3, 4, 4), Conditioning(torch.randn(2, 8, 16))
    asked = predict(unet, grid, {"cond": cond})

    def drawn():
        return [asked(x, sigma, ("cond",))["cond"] for sigma in grid.sigmas[:-1]]

    expected = []
    for sigma in grid.sigmas[:-1]:
        sample = (x * (sigma**2 + 1).rsqrt()).to(memory_format=torch.channels_last)
        expected.append(unet(sample, float(grid.t(sigma)), cond.tokens))
    assert any(float(t) % 1 for t in grid.timesteps)
    assert all(torch.equal(a, b) for a, b in zip(drawn(), expected, strict=True))
    unet.compile(backend=compiled)
    assert all(torch.equal(a, b) for a, b in zip(drawn(), expected, strict=True))
    assert compiled.frame_count == 1


def test_an_overflow_costs_one_copy_of_the_network_in_a_drawing(tiny_folder):
    """Not one in each step; and the next drawing begins anew, as nothing is kept by the model."""
    pipe = Pipeline.from_parts(load_parts(tiny_folder, None))
    unet, calls = pipe.unet.bfloat16(), []

    def overflow(module, _, output):
        calls.append(module)
        return output * math.inf if output.dtype is torch.bfloat16 else output

    unet.conv_out.register_forward_hook(overflow)
    request = {"prompt": "sea", "height": 16, "width": 16, "num_inference_steps": 5, "seed": 0}
    for drawing in (1, 2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            images = pipe(**request, output_type="pt").images
        assert images.isfinite().all()
        assert len({id(module) for module in calls}) == 1 + drawing, "itself and a copy for each drawing"
        assert len(calls) == drawing * (1 + 5)
        assert len([each for each in told if "the U-Net gave NaN" in str(each.message)]) == 1
    assert unet.conv_out.weight.dtype is torch.bfloat16


def test_networks_get_the_layout_of_their_device(tiny_folder, monkeypatch):
    """MPS is slow and was wrong in channels_last: what `Runtime.place` spares it, no call may bring back."""
    monkeypatch.setattr("ldm.pipeline.networks.memory_format", lambda device: torch.contiguous_format)
    pipe, seen = Pipeline.from_parts(load_parts(tiny_folder, None)), []
    for module in (pipe.unet, pipe.vae.encoder, pipe.vae.decoder):
        module.to(memory_format=torch.contiguous_format)
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    image = torch.rand(3, 16, 16)
    pipe("sea", image=image, strength=0.5, height=16, width=16, num_inference_steps=2, seed=0)
    assert len(seen) == 3
    assert all(seen)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: ..."),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("required rank 4 tensor to use channels_last memory format"), False),
        (RuntimeError("memory efficient attention: head_dim must be a multiple of 8"), False),
    ],
)
def test_a_fault_that_speaks_of_memory_is_not_taken_for_too_little_of_it(monkeypatch, error, told):
    def fail(*_):
        raise error

    monkeypatch.setattr("ldm.pipeline.sample.draw_batch", fail)
    job = SimpleNamespace(request=SimpleNamespace(width=8, height=8), grid=SimpleNamespace(timesteps=[1]))
    with pytest.raises(UserError if told else RuntimeError) as raised:
        draw_images(job, (None,), "", quiet=True)
    assert isinstance(raised.value, UserError) == told


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        ({"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512]}, 256),
        ({"_class_name": "AutoencoderKL", "block_out_channels": [32]}, 32),
        ({"_class_name": "AutoencoderTiny"}, 64),
        (
            {
                "_class_name": "AsymmetricAutoencoderKL",
                "down_block_out_channels": [32, 64],
                "up_block_out_channels": [96, 128],
                "down_block_types": ["DownEncoderBlock2D"] * 2,
                "up_block_types": ["UpDecoderBlock2D"] * 2,
            },
            128,
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_how_many_pictures_a_card_holds_follows_from_its_vae(
    tiny_folder, monkeypatch, config, numbers, dtype
):
    """From the widest features at full size, as the decoder makes them."""
    if config["_class_name"] == "AutoencoderKL":
        levels = len(config["block_out_channels"])
        config = config | {"down_block_types": ["DownEncoderBlock2D"] * levels}
        config |= {"up_block_types": ["UpDecoderBlock2D"] * levels, "layers_per_block": 1}
    with torch.device("meta"):
        vae, widest = build(config).to(dtype), []
    size = (8 * vae.downscale, 8 * vae.downscale)

    def look(module, args, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[2:] == size:
            widest.append(output.shape[1])

    for module in vae.decoder.modules():
        module.register_forward_hook(look)
    vae.decode_latents(torch.zeros(1, vae.latent_channels, 8, 8, dtype=dtype, device="meta"))
    assert max(widest) == numbers
    asked = []
    monkeypatch.setattr(Runtime, "images_at_once", lambda self, *given: asked.append(given) or 1)
    pipe = Pipeline.from_parts(replace(load_parts(tiny_folder, None), vae=vae))
    pipe.runtime.images_at_once(512, 512, pipe.bytes_per_pixel)
    assert asked == [(512, 512, numbers * dtype.itemsize)]


# --- training ---------------------------------------------------------------------------------------------


def test_the_loss_is_one_graph_of_tables_made_once(tmp_path, compiled):
    parts = tiny_parts(tiny_tokenizer(tmp_path / "tokenizer"), "v_prediction")
    data = prepare(tiny_pictures(), parts.vae, parts.tokenizer, tmp_path / "cache")
    task = UNetTask(parts, data, data, {}, [])
    batch = task.batch(torch.Generator().manual_seed(0), 6)

    def step(x0, noise, t):
        levels = task.levels
        return noisy_latents(x0, noise, t, levels), training_target(x0, noise, t, levels)

    given = batch["x0"], batch["noise"], batch["t"]
    for ours, plain in zip(
        torch.compile(step, backend=compiled, fullgraph=True)(*given), step(*given), strict=True
    ):
        assert torch.equal(ours, plain)
    assert compiled.frame_count == 1
    task.to("meta")
    assert {each.device.type for each in task.levels.buffers()} == {"meta"}
    assert not any(name.startswith("levels") for name in task.state_dict()), "states hold what they held"


def test_a_whole_step_is_one_graph(tmp_path, compiled):
    """`run.compile`, of a U-Net without attention and with the text encoder frozen."""
    parts = tiny_parts(tiny_tokenizer(tmp_path / "tokenizer"), "v_prediction")
    parts = replace(parts, unet=small_unet().train().requires_grad_())
    data = prepare(tiny_pictures(), parts.vae, parts.tokenizer, tmp_path / "cache")
    task = UNetTask(parts, data, data, {}, [])
    task.text_encoder = TextStandIn()
    model = torch.compile(task, backend=compiled)
    for number in range(3):
        batch = task.batch(torch.Generator().manual_seed(number), 4)
        assert torch.equal(model(batch)[0], task(batch)[0])
    assert compiled.frame_count == 1


class Read(NamedTuple):
    last_hidden_state: torch.Tensor


class TextStandIn(torch.nn.Module):
    """torch.compile takes long to read transformers' own."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(600, 16)

    def forward(self, input_ids):
        return Read(self.table(input_ids))


def clip_task(folder):
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"projection_dim": 8, "text_config": tower, "vision_config": tower | {"patch_size": 8}}
    pictures = tiny_pictures()
    return CLIPTask(model, tiny_tokenizer(folder / "tokenizer"), pictures, pictures, {})


def vae_task(folder):
    return VAETask(tiny_vae(), tiny_pictures(), tiny_pictures(), {}, decoder_only=False)


def unet_task(folder, kind=UNetTask, **loss):
    parts = tiny_parts(tiny_tokenizer(folder / "tokenizer"), "v_prediction")
    things = np.ones((12, 2, 2), np.uint8)
    data = prepare(replace(tiny_pictures(), things=things), parts.vae, parts.tokenizer, folder / "cache")
    return kind(parts, data, data, loss, [])


def distil_task(folder):
    return unet_task(folder, DistilTask, steps=2, substeps=2)


def upscaler_task(folder):
    parts = upscaler_parts(folder / "tokenizer")
    rng = np.random.default_rng(0)
    large, small = (
        Pictures(rng.integers(0, 256, (4, side, side, 3), dtype=np.uint8), [["a"]] * 4)
        for side in (2 * SIDE, SIDE)
    )
    pairs = make_pairs(large, small, parts.vae, folder, latent_noise=0.2)
    return UpscalerTask(parts, pairs, pairs, {"crop": 8, "pixels": 1.0})


def scorer_task(folder):
    return ScorerTask(Scorer(names()), held_out=2, loss={})


@pytest.fixture
def another_device(monkeypatch):
    """`meta` in place of a GPU: it refuses tensors of the CPU, and what is read from it is 0, or true."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: 0.0)
    truth, cpu = torch.Tensor.__bool__, torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: self.is_meta or truth(self))
    monkeypatch.setattr(
        torch.Tensor,
        "cpu",
        lambda self: torch.zeros(self.shape, dtype=self.dtype) if self.is_meta else cpu(self),
    )
    return torch.device("meta")


MAKERS = (clip_task, vae_task, unet_task, distil_task, upscaler_task, scorer_task)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_task_is_looked_at_and_trained_where_its_modules_are(tmp_path, another_device, make):
    task: Task = make(tmp_path)
    task.to(another_device)
    with torch.no_grad():
        assert task.evaluate()
    if make is vae_task:  # the others draw what they have exported
        assert task.picture(tmp_path).size
    batch = task.batch(torch.Generator().manual_seed(0), 4, 0)
    if make is not scorer_task:  # its loss counts, which `meta` cannot
        loss, _ = task({name: value.to(another_device) for name, value in batch.items()})
        assert loss.is_meta


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "lora", "center_crop": False, "shuffle_tags": True},
        {"mode": "full", "train_text_encoder": True, "snr_gamma": 5.0},
        WORD,
    ],
    ids=lambda options: options["mode"],
)
def test_a_fine_tuning_is_looked_at_and_made_where_its_modules_are(
    tiny_folder, tmp_path, monkeypatch, another_device, options
):
    """What is not cached is encoded there too, and comes back as a batch on the CPU."""
    tasks = []
    monkeypatch.setattr(finetuning, "train", lambda task, *_: tasks.append(task.train()))
    monkeypatch.setattr(finetuning, "_report", lambda *_: None)
    given = {
        "model": str(tiny_folder),
        "train_data_dir": write_pictures(tmp_path / "data", words="<it> boat"),
    }
    given |= {"output_dir": tmp_path / "run", "held_out": 0.2, "train_batch_size": 2}
    finetuning.finetune(FinetuneRecipe.model_validate(QUICK | given | options))
    (task,) = tasks
    for module in (task, task.parts.vae):
        module.to(another_device)
    batch = task.batch(torch.Generator().manual_seed(0), 2, 0)
    assert {value.device.type for value in batch.values()} == {"cpu"}
    assert task({name: value.to(another_device) for name, value in batch.items()})[0].is_meta
    task.eval()
    with torch.no_grad():
        assert task.evaluate() == {"held_out_loss": 0}
        assert task.picture(tmp_path) is not None


@pytest.mark.parametrize(("processes", "readers"), [("1", 8), ("4", 2), ("16", 1)])
def test_processes_of_one_machine_do_not_read_a_folder_with_all_its_cores_each(
    tmp_path, monkeypatch, processes, readers
):
    write_pictures(tmp_path / "data", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    pools = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers):
            pools.append(workers)
            super().__init__(workers)

    monkeypatch.setattr("ldm.dataset.examine.ThreadPoolExecutor", Pool)
    monkeypatch.setattr("ldm.dataset.cache.ThreadPoolExecutor", Pool)
    (first, _) = examine(tmp_path / "data").examples
    ((_, (picture,)),) = opened([[(first, make_crop(first.size, (64, 64)))]])
    assert picture.shape == (3, 64, 64)
    assert pools == [readers, readers + 4]
