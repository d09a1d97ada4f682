"""What processes do together: they wait for the main one as long as it takes."""

from contextlib import nullcontext
from datetime import timedelta

import accelerate
import pytest
import torch
from processes import two_processes
from tiny_training import Line, child, slow_look, tiny_recipe

from ldm.errors import UserError
from ldm.finetune.finetune import finetune
from ldm.finetune.recipe import FinetuneRecipe
from ldm.runtime import half_dtype
from ldm.train.loop import check_precision, train

RECIPE = {"steps": 2, "validation_steps": 1, "checkpointing_steps": 10}


def test_a_look_that_takes_longer_than_torch_waits_does_not_end_the_others(tmp_path):
    """In two processes over gloo, where torch's own patience is a second and a look takes more."""

    def call(rank, port):
        return child, (tmp_path,), {"rank": rank, "port": port, "sabotage": (slow_look, 1.0, 1.7)} | RECIPE

    assert two_processes(call) == [0, 0], (tmp_path / "output-1.txt").read_text()


@pytest.mark.parametrize(
    ("capability", "precision", "message"),
    [
        ((7, 5), "bf16", "mixed_precision bf16 needs a GPU that has it.*give fp16 or no"),
        ((7, 0), "bf16", "mixed_precision bf16"),
        ((7, 5), "fp16", None),
        ((7, 5), "no", None),
        ((8, 0), "bf16", None),
    ],
)
def test_a_card_is_not_trained_on_in_what_it_only_imitates(monkeypatch, capability, precision, message):
    """Trainings from nothing are in bf16 where their recipe does not say otherwise."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card = torch.device("cuda:1")
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_precision(precision, card)
    assert half_dtype(card) is (torch.bfloat16 if capability >= (8, 0) else torch.float16)


def test_fp16_on_a_processor_is_refused_in_our_words(tmp_path):
    with pytest.raises(UserError, match="mixed_precision fp16 needs a GPU: give bf16 or no"):
        train(Line(), tiny_recipe(1, mixed_precision="fp16"), tmp_path)
    assert half_dtype(torch.device("cpu")) is torch.bfloat16


def test_fine_tuning_is_as_patient_from_its_first_line_on(tmp_path, monkeypatch):
    """It makes the processes known to each other before the loop does, to fill caches together."""

    class Stop(Exception):
        pass

    def state(cpu, timeout=timedelta(minutes=10)):
        assert timeout >= timedelta(days=1)
        raise Stop

    monkeypatch.setattr(accelerate, "PartialState", state)
    with pytest.raises(Stop):
        finetune(FinetuneRecipe(train_data_dir=tmp_path, output_dir=tmp_path / "out"))
