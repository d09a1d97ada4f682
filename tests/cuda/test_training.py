"""Fine-tuning on a card: it learns what a processor learns, and stopped it goes on bit for bit."""

import json
import os

import pytest
from tiny_finetune import interrupted, result, run, write_pictures

from ldm.finetune.task import FinetuneTask

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
STEPS = {"max_train_steps": 10, "train_batch_size": 2, "held_out": 0.2, "validation_steps": 5}
MODES = {
    "lora": {"caption_dropout": 0.3, "snr_gamma": 5},
    "full": {"mode": "full", "train_text_encoder": True, "text_encoder_lr": 1e-4, "ema_decay": 0.99},
}
# What a device draws itself, so that it is the same as itself alone.
ITS_OWN = {"lora": {"lora_dropout": 0.1}, "full": {}}
# Of losses: fp32's sums in another order, and the roundings of bf16, both as weights have gone on with them.
BOUNDS = {"no": 1e-3, "bf16": 0.05}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 8)


def accelerate_on(device, monkeypatch):
    """accelerate takes a card where there is one, and keeps the first training's settings."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def on_processor(families, data, tmp_path_factory):
    """The losses of ten steps in fp32 on the processor, by mode."""
    made = {}

    def get(mode):
        if mode not in made:
            with pytest.MonkeyPatch.context() as patch:
                accelerate_on("cpu", patch)
                folder = tmp_path_factory.mktemp(mode) / "run"
                assert run(families("sd1")[0], data, folder, **STEPS | MODES[mode]) == 0
                made[mode] = losses(folder)
        return made[mode]

    return get


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("mode", MODES)
def test_ten_steps_are_those_of_a_processor(
    families, data, on_processor, device, monkeypatch, tmp_path, mode, precision
):
    expected = on_processor(mode)
    accelerate_on(device.type, monkeypatch)
    options = STEPS | MODES[mode] | {"mixed_precision": precision}
    assert run(families("sd1")[0], data, tmp_path / "run", **options) == 0
    found = losses(tmp_path / "run")
    assert len(found) == len(expected) == 10
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) < BOUNDS[precision]


def test_ten_steps_beside_4_bits_are_those_of_a_processor(families, data, device, monkeypatch, tmp_path):
    """Which rounds the same weights, but for scales whose 8 bits fall to the other side."""
    pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install 'ldm[bitsandbytes]'")
    found = {}
    for kind in ("cpu", device.type):
        accelerate_on(kind, monkeypatch)
        options = STEPS | {"base_model_precision": "nf4-bnb"}
        assert run(families("sd1")[0], data, tmp_path / kind, **options) == 0
        found[kind] = losses(tmp_path / kind)
    assert found[device.type] == pytest.approx(found["cpu"], rel=1e-2)


@posix
@pytest.mark.parametrize(("mode", "precision"), [("lora", "bf16"), ("full", "no"), ("full", "bf16")])
def test_stopped_it_goes_on_bit_for_bit(
    families, data, device, fixed_order, monkeypatch, tmp_path, mode, precision
):
    """With sums in a fixed order, which torch does not promise otherwise."""
    options = STEPS | MODES[mode] | ITS_OWN[mode]
    options |= {"mixed_precision": precision, "checkpointing_steps": 3}
    forward = FinetuneTask.forward
    for folder, calls in (("whole", [0]), ("parts", [4, 2, 0])):
        for call in calls:
            accelerate_on(device.type, monkeypatch)
            monkeypatch.setattr(FinetuneTask, "forward", interrupted(forward, call))
            assert run(families("sd1")[0], data, tmp_path / folder / "run", **options) == 0
    assert result(tmp_path / "parts" / "run") == result(tmp_path / "whole" / "run")
