"""What processes do together: they wait for the main one as long as it takes."""

from datetime import timedelta

import accelerate
import pytest
from tiny_training import child, slow_look, two_processes

from ldm.finetune.finetune import finetune
from ldm.finetune.recipe import FinetuneRecipe

RECIPE = {"steps": 2, "validation_steps": 1, "checkpointing_steps": 10}


def test_a_look_that_takes_longer_than_torch_waits_does_not_end_the_others(tmp_path):
    """In two processes over gloo, where torch's own patience is a second and a look takes more."""

    def call(rank, port):
        return child, (tmp_path,), {"rank": rank, "port": port, "sabotage": (slow_look, 1.0, 1.7)} | RECIPE

    assert two_processes(call) == [0, 0], (tmp_path / "output-1.txt").read_text()


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
