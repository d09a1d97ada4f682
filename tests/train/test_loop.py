"""The training loop: exact resume, accumulation, learning-rate schedule, EMA, and a loss that is NaN."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_training import Line, exported
from tiny_training import tiny_recipe as recipe

from ldm.errors import UserError
from ldm.images.provenance import COMPOSITE, SOURCE, TRAINED, VOCABULARY, marks_in
from ldm.pretrain.recipe import load_recipe
from ldm.train.loop import train
from ldm.train.optimiser import Muon
from ldm.train.state import newest_state


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> list[dict]:
    """The log without what a clock or the system gives."""
    outside = ("minutes", "samples_per_s", "memory_gb")
    return [{k: v for k, v in row.items() if k not in outside} for row in rows(run_dir)]


def hashes(run_dir: Path) -> dict[str, str]:
    """Weights, EMA and optimiser of the newest state, bit for bit."""
    files = json.loads((newest_state(run_dir) / "manifest.json").read_text())["files"]
    return {name: files[name]["sha256"] for name in files if name.endswith(".safetensors")}


def test_learns(tmp_path):
    train(Line(dropout=0), recipe(300), tmp_path)
    assert [row["held_out"] for row in rows(tmp_path) if "held_out" in row][-1] < 0.02


@pytest.mark.parametrize(
    ("originals", "provenance", "source"),
    [(False, True, TRAINED), (True, True, COMPOSITE), (False, False, None)],
)
def test_grids_say_that_a_model_drew_them(tmp_path, monkeypatch, originals, provenance, source):
    monkeypatch.setattr(Line, "shows_originals", originals)
    monkeypatch.setattr(Line, "picture", lambda self, folder: Image.new("RGB", (8, 8), "red"))
    train(Line(), recipe(2, validation_steps=2, provenance=provenance), tmp_path)
    (path,) = (tmp_path / "grids").iterdir()
    assert marks_in(path.read_bytes()).get(SOURCE) == (source and VOCABULARY + source)


# --- stopping and going on -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 8 steps of 3 parts."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(Line(), recipe(8, parts=3, checkpointing_steps=5, validation_steps=4, logging_steps=3), run_dir)
    return run_dir


@pytest.mark.parametrize("call", range(1, 25))
def test_stopped_in_any_part_of_any_step_it_goes_on_bit_for_bit(whole, tmp_path, call, capsys):
    settings = recipe(8, parts=3, checkpointing_steps=5, validation_steps=4, logging_steps=3)
    train(Line(interrupt=call), settings, tmp_path)
    steps = (call - 1) // 3 + (call % 3 == 0)  # a signal in the last part lets the step be made
    assert newest_state(tmp_path).name == f"state-{steps:08d}"
    if steps < 8:
        assert f"stopped at step {steps}, saved" in capsys.readouterr().out
    train(Line(), settings, tmp_path)
    assert hashes(tmp_path) == hashes(whole)
    assert curve(tmp_path) == curve(whole)
    assert all(torch.equal(value, exported(whole)[name]) for name, value in exported(tmp_path).items())


def test_muon_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(Muon, "THINNEST", 1)
    settings = recipe(8, muon=True)
    train(Line(), settings, tmp_path / "whole")
    train(Line(interrupt=5), settings, tmp_path / "parts")
    train(Line(), settings, tmp_path / "parts")
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")
    train(Line(), recipe(8), tmp_path / "adamw")
    assert hashes(tmp_path / "adamw") != hashes(tmp_path / "whole")


def test_what_came_after_the_last_state_is_made_again(tmp_path):
    train(Line(), recipe(40), tmp_path / "whole")
    with pytest.raises(UserError, match="step 23: the loss is nan"):
        train(Line(poison={24}), recipe(40), tmp_path / "parts")  # after the state of step 20 was written
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 25, "samples": 400, "samples_per_s": 1, "loss": 9}\n{"step": 2')
    train(Line(), recipe(40), tmp_path / "parts")
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_finished_run_does_not_train_on(tmp_path):
    train(Line(), recipe(20), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = Line()
    train(again, recipe(20), tmp_path)
    assert again.calls == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_look_that_was_missed_is_taken_after_the_run_goes_on(tmp_path):
    class Blind(Line):
        def evaluate(self):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        train(Blind(), recipe(40, checkpointing_steps=20), tmp_path)
    assert newest_state(tmp_path).name == "state-00000020"  # saved before the look
    train(Line(), recipe(40, checkpointing_steps=20), tmp_path)
    assert [row["step"] for row in rows(tmp_path) if "held_out" in row] == [20, 40]


def test_a_second_signal_soon_after_is_the_same_one_and_a_later_one_kills(monkeypatch):
    from ldm.train import processes

    clock = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: clock[0])
    with processes.stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        while not stopped:  # two that are pending together come in the order of their numbers
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped == [signal.SIGTERM]
        clock[0] += 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_minutes_end_a_run(tmp_path):
    quick = recipe(
        10**9, max_minutes=0.005, logging_steps=1000, validation_steps=10**6, checkpointing_steps=10**6
    )
    train(Line(), quick, tmp_path)
    ended = json.loads((newest_state(tmp_path) / "run.json").read_text())["position"]["seconds"]
    assert 0.005 <= ended / 60 < 0.02


# --- accumulation ----------------------------------------------------------------------------------------


def gradients(task, settings, tmp_path) -> tuple[list[torch.Tensor], list[dict]]:
    """The gradients of the first step, and the batches that they are of."""
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([p.grad.clone() for p in task.parameters()])
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", spy)
        train(task, settings, tmp_path)
    return seen[0], task.batches


def test_parts_have_the_gradients_of_one_large_batch(tmp_path):
    settings = recipe(1, parts=4, batch_size=8, max_minutes=None)
    settings = settings.model_copy(
        update={"optimiser": settings.optimiser.model_copy(update={"max_grad_norm": 1e9})}
    )
    task = Line(dropout=0)
    added, batches = gradients(task, settings, tmp_path)
    assert len(batches) == 4
    assert not torch.equal(batches[0]["x"], batches[1]["x"])

    alone = Line(dropout=0)
    alone({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})[0].backward()
    for ours, p in zip(added, alone.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-6, atol=1e-6)
    assert rows(tmp_path)[-1]["samples"] == 32


def test_every_seed_step_part_and_rank_has_a_batch_of_its_own(tmp_path):
    first = []
    for seed in (0, 1, 2**40):
        task = Line()
        train(task, recipe(3, parts=2, seed=seed), tmp_path / str(seed))
        first += [float(batch["x"][0]) for batch in task.batches]
    assert len(set(first)) == 18


def test_dropout_and_the_batch_have_seeds_of_their_own(tmp_path):
    """And no two of them in a run are alike: what is dropped would follow from what is seen."""
    seeds = []

    class Told(Line):
        def batch(self, rng, size, number):
            seeds.append(rng.initial_seed())
            return super().batch(rng, size, number)

        def forward(self, batch):
            seeds.append(torch.initial_seed())
            return super().forward(batch)

    train(Told(), recipe(3, parts=2), tmp_path)
    assert len(seeds) == 2 * 3 * 2
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("CUDA error: out of memory")],
)
def test_memory_that_is_out_says_what_to_lower(tmp_path, error):
    class Large(Line):
        def forward(self, batch):
            if self.calls == 12:
                raise error
            return super().forward(batch)

    with pytest.raises(UserError, match=r"not enough memory: lower train_batch_size.*state-00000010"):
        train(Large(), recipe(40), tmp_path)


def test_a_card_that_fails_is_not_short_of_memory(tmp_path):
    class Broken(Line):
        def forward(self, batch):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(Broken(), recipe(40), tmp_path)


# --- NaN -------------------------------------------------------------------------------------------------


class Named(Line):
    def batch(self, rng, size, number):
        return super().batch(rng, size, number) | {"index": torch.randint(1000, (size,), generator=rng)}

    def names(self, batch):
        return [f"{int(i)}.png" for i in batch["index"]]


def test_nan_stops_and_says_which_files_and_how_to_go_on(tmp_path):
    task = Named(poison={24})
    with pytest.raises(UserError) as stopped:
        train(task, recipe(40, batch_size=2), tmp_path)
    files = ", ".join(task.names(task.batches[23]))
    assert str(stopped.value) == (
        f"step 23: the loss is nan, of {files}: lower learning_rate and run the same command again, or set "
        f"on_nan=skip; the last good state is {tmp_path / 'state-00000020'}"
    )


def test_a_nan_that_is_skipped_leaves_everything_as_it_was(tmp_path):
    seen = []

    class Watched(Line):
        def forward(self, batch):
            result = super().forward(batch)
            seen.append([p.detach().clone() for p in self.parameters()])
            return result

    train(
        Watched(poison={3, 6}),
        recipe(3, parts=2, on_nan="skip", checkpointing_steps=1, logging_steps=1),
        tmp_path,
    )
    # Parts 3 and 4 are step 1, which is skipped; step 2 is the last.
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[4], strict=True))
    state = newest_state(tmp_path)
    position = json.loads((state / "run.json").read_text())["position"]
    assert (position["step"], position["skipped"], position["skipped_in_a_row"]) == (3, 2, 2)
    (tmp_path / "one").mkdir()
    train(Line(), recipe(1, parts=2), tmp_path / "one")  # the first step alone
    assert hashes(tmp_path) == hashes(tmp_path / "one")
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1]


def test_ten_skipped_in_a_row_stop(tmp_path, capsys):
    with pytest.raises(UserError, match=r"step 14: the loss is nan: the 10th in a row: lower learning_rate"):
        train(Line(poison={3, *range(6, 20)}), recipe(40, on_nan="skip"), tmp_path)
    assert "step 2: the loss is nan: skipped, 1 so far" in capsys.readouterr().out


def test_the_count_in_a_row_outlives_a_stop(tmp_path):
    train(Line(poison=range(3, 9), interrupt=8), recipe(40, on_nan="skip"), tmp_path)
    with pytest.raises(UserError, match=r"step 11: .* the 10th in a row"):
        train(Line(poison=range(20)), recipe(40, on_nan="skip"), tmp_path)


def test_weights_that_are_nan_are_not_saved(tmp_path):
    class Breaks(Line):
        def forward(self, batch):
            if self.calls == 3:
                with torch.no_grad():
                    self.layer[3].bias.fill_(float("inf"))
            return super().forward(batch)

    train(Line(), recipe(10), tmp_path)
    with pytest.raises(UserError, match=r"weights layer.3.bias is NaN or Inf.*state-00000010"):
        train(Breaks(), recipe(20, on_nan="skip", checkpointing_steps=15), tmp_path)
    assert [path.name for path in tmp_path.glob("*state-*")] == ["state-00000010"]


def test_the_scale_of_fp16_gradients_goes_down_and_is_kept(tmp_path, monkeypatch):
    """With torch's scaler on the CPU, since fp16 training needs a GPU."""
    import accelerate

    original = accelerate.Accelerator.__init__

    def scaled(self, **options):
        original(self, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3)

    def unscale(self):
        self.scaler.unscale_(self._optimizers[0].optimizer)

    monkeypatch.setattr(accelerate.Accelerator, "__init__", scaled)
    monkeypatch.setattr(accelerate.Accelerator, "unscale_gradients", unscale)
    settings = recipe(30, checkpointing_steps=1)
    train(Line(), settings, tmp_path / "whole")
    state = json.loads((newest_state(tmp_path / "whole") / "run.json").read_text())
    assert state["position"]["skipped"] == 6
    train(Line(interrupt=22), settings, tmp_path / "parts")  # where the scale has been raised twice
    train(Line(), settings, tmp_path / "parts")
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")


# --- averages and rates ----------------------------------------------------------------------------------


def test_ema_follows_its_recurrence(tmp_path):
    task = Line()
    values = []
    first = next(task.parameters())
    original = task.forward

    def spy(batch):
        values.append(first.detach().clone())
        return original(batch)

    task.forward = spy
    train(task, recipe(12), tmp_path)
    values.append(first.detach().clone())
    expected = values[0].double()
    for step, after in enumerate(values[1:]):
        decay = min(0.999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * after.double()
    assert torch.allclose(exported(tmp_path)["layer.0.weight"].double(), expected, rtol=1e-5, atol=1e-6)


# --- what the recipe says of it --------------------------------------------------------------------------


def test_yaml_reads_no_as_false_and_it_means_no():
    config = Path(__file__).parents[2] / "configs" / "postcard_vae.yaml"
    assert load_recipe(config, ["run.resume_from_checkpoint=no"]).run.resume_from_checkpoint == "no"


def test_tensorboard_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    with pytest.raises(UserError, match="tensorboard, which is not installed: pip install tensorboard"):
        train(Line(), recipe(2, report_to="tensorboard"), tmp_path)
