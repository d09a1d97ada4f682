"""FSDP in two processes over gloo: the numbers of one process, states in shards, and on with any number."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import forked, two_processes
from safetensors.torch import load_file
from tiny_finetune import arguments, result, write_pictures
from tiny_finetune import both as both_finetune
from tiny_finetune import run as finetune_alone
from tiny_training import Line, child, exported, tiny_recipe
from torch import nn

from ldm.checkpoint import load_parts
from ldm.errors import UserError
from ldm.finetune.lora import add_lora
from ldm.finetune.modes import freeze
from ldm.finetune.recipe import FinetuneRecipe
from ldm.runtime import Runtime
from ldm.train.changes import batches_a_step
from ldm.train.loop import train
from ldm.train.sharding import Sharded, full_tensor, own_rows
from ldm.train.state import _read, damage, newest_state

EVERY = {
    "steps": 6,
    "checkpointing_steps": 3,
    "validation_steps": 3,
    "logging_steps": 1,
    "max_grad_norm": 0.05,
}


def both(run_dir: Path, interrupts=(0, 0), **options) -> None:
    run_dir.mkdir(exist_ok=True)
    statuses = two_processes(
        lambda rank, port: (
            child,
            (run_dir,),
            EVERY | options | {"rank": rank, "port": port, "interrupt": interrupts[rank]},
        )
    )
    assert statuses == [0, 0], [(run_dir / f"output-{rank}.txt").read_text() for rank in (0, 1)]


def one(run_dir: Path, **options) -> str:
    """In one process; what it said."""
    run_dir.mkdir(exist_ok=True)
    process = forked().Process(target=child, args=(run_dir,), kwargs=EVERY | options | {"rank": 2})
    process.start()
    process.join(60)
    said = (run_dir / "output-2.txt").read_text()
    assert process.exitcode in (0, 2), said
    return said


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of a tensor from its like."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - t).norm() / t.norm().clamp(min=1e-12)) for name, t in theirs.items())


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        row[name]
        for row in rows
        for name in ("loss", "grad_norm", "held_out", "held_out_loss")
        if name in row
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Six steps of two processes that share the weights."""
    folder = tmp_path_factory.mktemp("sharded") / "whole"
    both(folder, distributed="fsdp")
    return folder


def test_what_is_sharded_is_trained_as_by_one_process_and_by_ddp(whole, tmp_path):
    """With dropout, averages, and gradients that are clipped by their norm over all shards."""
    both(tmp_path / "ddp")
    one(tmp_path / "one", parts=2)
    assert apart(exported(tmp_path / "ddp"), exported(tmp_path / "one")) == 0
    for other in ("ddp", "one"):
        assert apart(exported(whole), exported(tmp_path / other)) < 1e-6
        assert losses(whole) == pytest.approx(losses(tmp_path / other), rel=1e-6)
    assert min(row for row in losses(whole)) > 0.05  # so that clipping does something


def test_a_state_in_shards_is_whole_or_not_and_goes_on_bit_for_bit(whole, tmp_path):
    state = newest_state(whole)
    names = [
        f"{kind}-0000{i}-of-00002.safetensors" for kind in ("ema", "optimiser", "weights") for i in (1, 2)
    ]
    assert sorted(path.name for path in state.glob("*.safetensors")) == names
    shards = [load_file(state / name) for name in names[-2:]]
    assert [len(shard["layer.0.weight"]) for shard in shards] == [4, 4]
    both(tmp_path / "parts", interrupts=(0, 4), distributed="fsdp")
    assert newest_state(tmp_path / "parts").name == "state-00000004"
    both(tmp_path / "parts", distributed="fsdp")
    assert result(tmp_path / "parts") == result(whole)

    broken = shutil.copytree(state, tmp_path / "broken")
    (broken / names[1]).unlink()
    assert damage(broken) == f"{names[1]} is missing"


def test_a_state_of_two_is_gone_on_with_by_one_and_back(whole, tmp_path):
    """Each step is of the same pictures and the same noise, whoever has them; only sums are ordered anew."""
    both(tmp_path, steps=2, distributed="fsdp")
    said = one(tmp_path, steps=4)
    assert "the recipe has changed since state-00000002: run.distributed fsdp -> ddp, run.max_train" in said
    assert "run.processes 2 -> 1" in said
    assert [path.name for path in newest_state(tmp_path).glob("w*")] == ["weights.safetensors"]
    both(tmp_path, distributed="fsdp")
    assert newest_state(tmp_path).name == newest_state(whole).name
    assert apart(exported(tmp_path), exported(whole)) < 1e-6
    assert "another recipe: run.gradient" not in one(tmp_path, parts=2)  # what two processes of one each are
    assert "error: " in one(tmp_path, parts=3)


@pytest.mark.slow
def test_a_tiny_unet_is_fine_tuned_as_by_one_process(families, tmp_path):
    """All of its weights and the text encoder's, with accumulation and averages.

    AdamW's epsilon is above the rounding of gradients: what is next to zero would be divided by itself.
    """
    data, model = write_pictures(tmp_path / "data", 8), families("sd1")[0]
    options = {
        "mode": "full",
        "train_text_encoder": True,
        "text_encoder_lr": 1e-4,
        "ema_decay": 0.9,
        "max_train_steps": 3,
        "checkpointing_steps": 2,
        "validation_steps": 2,
        "held_out": 0.2,
        "adam_epsilon": 1e-4,
        "max_grad_norm": 0.1,
        "gradient_checkpointing": True,
    }
    two = arguments(
        model, data, tmp_path / "two", distributed="fsdp", gradient_accumulation_steps=2, **options
    )
    assert both_finetune(tmp_path / "logs", two) == [0, 0], (tmp_path / "logs/output-0.txt").read_text()
    assert finetune_alone(model, data, tmp_path / "one", gradient_accumulation_steps=4, **options) == 0
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        ours, theirs = (load_file(tmp_path / run / f"export/{part}.safetensors") for run in ("two", "one"))
        assert apart(ours, theirs) < 1e-6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert (tmp_path / "two" / "grids" / "00000003.png").exists()


def test_a_single_picture_goes_through_shards_in_the_same_bits(families):
    """A LoRA, forwards; backwards gradients of what is read more than once are added in another order."""
    cpu, parts = Runtime(torch.device("cpu"), torch.float32), load_parts(families("sd1")[0], None)
    freeze(parts, cpu)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 16, generator=rng).to(memory_format=torch.channels_last)
    tokens = torch.randn(1, 77, parts.unet.config.cross_attention_dim, generator=rng)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for shards in (False, True):
            task = nn.Module()
            task.unet = add_lora(parts, rank=4, alpha=4).unet.train()
            if shards:
                Sharded(task, cpu.device, 1)
            out = task.unet(x, torch.tensor([500]), tokens)
            (out - x).square().mean().backward()
            grads = [full_tensor(p.grad) for p in task.parameters() if p.requires_grad]
            found.append((out.detach(), torch.cat([grad.flatten() for grad in grads])))
    finally:
        torch.distributed.destroy_process_group()
    (ours, grads), (theirs, their_grads) = found
    assert torch.equal(ours, theirs)
    assert (grads - their_grads).norm() < 1e-6 * their_grads.norm()


def test_weights_that_are_whole_again_count_as_changed():
    """Else a kernel that keeps a copy of them would go by the last look's, where the address is the same."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        task = nn.Module()
        task.network = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
        sharded, x = Sharded(task, torch.device("cpu"), 1), torch.ones(1, 4, 8, 8)
        seen = []
        for _ in range(2):
            with torch.no_grad(), sharded.whole(True):
                (weight,) = task.network.parameters()
                seen.append((task.network(x), weight._version))
            with torch.no_grad():
                own_rows(next(task.parameters())).mul_(2)
    finally:
        torch.distributed.destroy_process_group()
    (before, version), (after, later) = seen
    assert torch.equal(after, 2 * before)
    assert later > version


def of_all(state: Path, kind: str, end: str) -> torch.Tensor:
    """The tensors of a state whose names end so, one after the other, in float64."""
    whole = {name: torch.cat(parts) for name, parts in _read(state, kind).items() if name.endswith(end)}
    return torch.cat([whole[name].flatten() for name in sorted(whole)]).double()


@pytest.mark.slow
def test_a_lora_differs_by_what_adamw_makes_of_rounding(families, tmp_path):
    """The gradients are those of one process but for the order of sums, and AdamW's first step of each is

        u(g) = lr g / (|g| + epsilon)
        u(g') - u(g) = lr epsilon (g' - g) / ((|g| + epsilon) (|g'| + epsilon))   where signs agree

    which is lr (g' - g) / epsilon where they are small: for 1e-8 rounding a hundred million fold.
    """
    data, model = write_pictures(tmp_path / "data", 4), families("sd1")[0]
    options = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 3, "held_out": 0}
    options |= {"num_validation_images": 0, "adam_weight_decay": 0}
    two = arguments(model, data, tmp_path / "two", distributed="fsdp", **options)
    assert both_finetune(tmp_path / "logs", two) == [0, 0], (tmp_path / "logs/output-0.txt").read_text()
    assert finetune_alone(model, data, tmp_path / "one", gradient_accumulation_steps=2, **options) == 0
    states = [tmp_path / run / "state-00000001" for run in ("two", "one")]
    ours, theirs = (of_all(state, "optimiser", "exp_avg") / (1 - 0.9) for state in states)
    rounded = (ours - theirs).norm() / theirs.norm()
    assert rounded < 1e-6
    ours, theirs = (1e-3 * g / (g.abs() + 1e-8) for g in (ours, theirs))
    expected = (ours - theirs).norm()
    ours, theirs = (of_all(state, "weights", "lora_B.default.weight") for state in states)  # from 0
    found = (ours - theirs).norm()
    assert abs(found - expected) <= 0.1 * expected + 1e-8 * theirs.norm()
    ours, theirs = (
        load_file(tmp_path / run / "export/pytorch_lora_weights.safetensors") for run in ("two", "one")
    )
    assert apart(ours, theirs) < 3e-6
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


# --- how many batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "accumulation", "processes", "batches"),
    [
        ({}, 3, 2, 6),  # a new run
        ({"gradient_accumulation_steps": 3, "run.processes": 2}, 3, 1, 6),  # each has more
        ({"optimiser.gradient_accumulation_steps": 3, "run.batches_a_step": 6, "run.processes": 1}, 3, 6, 6),
        ({"gradient_accumulation_steps": 3, "run.batches_a_step": 6}, 1, 4, 4),  # it asks for others
    ],
)
def test_a_run_keeps_the_batches_of_a_step(before, accumulation, processes, batches):
    assert batches_a_step(before, accumulation, processes) == batches


def test_processes_that_cannot_share_the_batches_are_refused():
    with pytest.raises(UserError, match="of 6 batches, which 4 processes cannot share evenly: take a number"):
        batches_a_step({"gradient_accumulation_steps": 3, "run.processes": 2}, 3, 4)


# --- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["use_muon", "use_8bit_adam", "compile", "optimizer"])
def test_what_wants_whole_weights_is_refused(tmp_path, name):
    options = {"muon": True} if name == "use_muon" else {name: "muon" if name == "optimizer" else True}
    with pytest.raises(UserError, match=f"distributed fsdp does not go with {name}: "):
        train(Line(), tiny_recipe(1, distributed="fsdp", **options), tmp_path)


def test_tasks_that_call_parts_of_their_networks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "shards", False)
    with pytest.raises(UserError, match="distributed fsdp is for fine-tuning in modes full and lora"):
        train(Line(), tiny_recipe(1, distributed="fsdp"), tmp_path)
    with pytest.raises(
        ValueError, match="distributed is not allowed in mode textual_inversion: only lora and full"
    ):
        FinetuneRecipe(
            train_data_dir=tmp_path,
            output_dir=tmp_path,
            mode="textual_inversion",
            placeholder_token="<it>",
            initializer_token="it",
            distributed="fsdp",
        )


def other_weights(rank):
    """What a process begins with that has another file."""
    if rank:
        begin = Line.__init__

        def moved(task, **options):
            begin(task, **options)
            task.layer[0].bias.data += 1e-7

        Line.__init__ = moved


def test_another_weight_in_one_process_is_refused(tmp_path):
    statuses = two_processes(
        lambda rank, port: (
            child,
            (tmp_path,),
            {"rank": rank, "port": port, "sabotage": (other_weights, rank), "steps": 1},
        )
    )
    assert statuses == [2, 2]
    said = (tmp_path / "output-0.txt").read_text()
    assert "error: process 1 on " in said
    assert "has another weights than process 0" in said
    assert not list(tmp_path.glob("state-*"))
