"""AdamW and Muon against torch's, a stand-in for bitsandbytes; learning rates against transformers.

Optimisers of other libraries are in test_optimisers.py.
"""

import math
import sys
import types

import pytest
import torch
from processes import two_processes
from pydantic import ValidationError
from transformers import get_scheduler

from ldm.train.optimiser import _shared, lr_factor, make_optimiser, orthogonal
from ldm.train.recipe import OptimiserSection


def theirs(name, warmup, total, **specific):
    """transformers' factor in each step."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimiser, warmup, total, specific)
    factors = []
    for _ in range(total + 1):
        factors.append(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("name", "ours", "specific"),
    [
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {"lr_num_cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {"lr_power": 2.0}, {"power": 2.0, "lr_end": 0.0}),
    ],
)
def test_learning_rates_are_those_of_transformers(name, ours, specific, warmup):
    options = OptimiserSection(lr_scheduler=name, lr_warmup_steps=warmup, **ours)
    factors = [lr_factor(options, step, 30) for step in range(31)]
    assert factors == pytest.approx(theirs(name, warmup, 30, **specific), abs=1e-12)


def test_constant_warms_up():
    options = OptimiserSection(lr_scheduler="constant", lr_warmup_steps=7)
    factors = [lr_factor(options, step, 30) for step in range(31)]
    assert factors == pytest.approx(theirs("constant_with_warmup", 7, 30), abs=1e-12)
    assert lr_factor(OptimiserSection(), 0, 30) == 1


def test_warmup_stable_decay_is_flat_and_then_a_cosine_to_2_percent():
    options = OptimiserSection(lr_scheduler="warmup_stable_decay", lr_warmup_steps=5, lr_decay_from=0.6)
    factors = [lr_factor(options, step, 100) for step in (0, 4, 5, 60, 70, 80, 100)]
    middle = 0.02 + 0.49 * (1 + math.cos(math.pi * 0.25))
    assert factors == pytest.approx([0, 0.8, 1, 1, middle, 0.51, 0.02])


def test_a_warm_up_longer_than_the_run_only_warms_up():
    options = OptimiserSection(lr_scheduler="cosine", lr_warmup_steps=100)
    assert [lr_factor(options, step, 10) for step in (0, 5, 10)] == [0, 0.05, 0.1]


def test_adamw_steps_by_its_formula():
    """Loshchilov and Hutter 2019, algorithm 2, in float64 by hand, for two steps of two groups."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, generator=generator).requires_grad_() for _ in range(2))
    options = OptimiserSection(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_weight_decay=0.3)
    optimiser = make_optimiser([{"params": [first]}, {"params": [second], "lr": 0.01}], options)
    expected = [p.detach().double().clone() for p in (first, second)]
    m, v = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    for step in (1, 2):
        grads = torch.randn(2, 5, generator=generator)
        first.grad, second.grad = grads[0].clone(), grads[1].clone()
        optimiser.step()
        m, v = 0.8 * m + 0.2 * grads, 0.9 * v + 0.1 * grads.double() ** 2
        for i, lr in enumerate((0.1, 0.01)):
            update = (m[i] / (1 - 0.8**step)) / ((v[i] / (1 - 0.9**step)).sqrt() + 1e-8)
            expected[i] = expected[i] * (1 - lr * 0.3) - lr * update
    torch.testing.assert_close(first.detach().double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second.detach().double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.fixture
def bitsandbytes(monkeypatch):
    """A stand-in whose AdamW8bit is torch's AdamW and keeps what it was given."""

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, params, **settings):
            self.given = settings
            super().__init__(params, **settings)

    module = types.ModuleType("bitsandbytes")
    module.optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    return AdamW8bit


def test_8_bits_by_bitsandbytes_where_it_is(bitsandbytes, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = make_optimiser([torch.zeros(2, requires_grad=True)], OptimiserSection(use_8bit_adam=True))
    assert type(made) is bitsandbytes
    assert made.given == {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
    assert not recwarn.list
    params = [torch.zeros(2, requires_grad=True)]
    assert type(make_optimiser(params, OptimiserSection())) is torch.optim.AdamW  # only if asked for


def test_8_bits_are_missed_with_a_warning(bitsandbytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    params, options = [torch.zeros(2, requires_grad=True)], OptimiserSection(use_8bit_adam=True)
    with pytest.warns(UserWarning, match="no CUDA device, so AdamW keeps its moments in 32 bits"):
        assert type(make_optimiser(params, options)) is torch.optim.AdamW
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.warns(UserWarning, match="bitsandbytes is not installed"):
        assert type(make_optimiser(params, options)) is torch.optim.AdamW


def test_a_bitsandbytes_that_does_not_load_is_missed_too(monkeypatch, tmp_path):
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('libcudart.so.13: not found')")
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    params, options = [torch.zeros(2, requires_grad=True)], OptimiserSection(use_8bit_adam=True)
    with pytest.warns(UserWarning, match=r"does not load \(libcudart.*\), so AdamW keeps its moments"):
        assert type(make_optimiser(params, options)) is torch.optim.AdamW


@pytest.mark.parametrize(
    "options", [{"lr_scheduler": "cosin"}, {"learning_rate": 0}, {"adam_beta2": 1}, {"lr_warmup_steps": -1}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        OptimiserSection(**options)


# --- Muon ------------------------------------------------------------------------------------------------


def some_parameters(*shapes):
    rng = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]


def some_steps(optimiser, params, count=3):
    rng = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=rng)
        optimiser.step()


def test_muon_is_torch_s_for_matrices_and_for_convolutions_as_matrices():
    options = OptimiserSection(use_muon=True, learning_rate=1e-2, adam_weight_decay=0.1)
    ours = some_parameters((48, 96), (96, 40), (48, 96))
    theirs = some_parameters((48, 96), (96, 40), (48, 96))
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in ours]
    some_steps(make_optimiser(ours, options), ours)
    some_steps(reference, theirs)
    for start, a, b in zip(before, ours, theirs, strict=True):
        assert ((a - b).norm() / (b - start).norm()).item() < 0.04  # both in bf16

    (flat,) = some_parameters((48, 36 * 9))
    for order in (torch.contiguous_format, torch.channels_last):
        (conv,) = some_parameters((48, 36, 3, 3))
        conv = torch.nn.Parameter(conv.detach().contiguous(memory_format=order))
        (start,) = some_parameters((48, 36 * 9))
        matrix = torch.nn.Parameter(start.detach().clone())
        some_steps(make_optimiser([conv], options), [conv])
        some_steps(
            torch.optim.Muon([matrix], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), [matrix]
        )
        assert ((conv.detach().flatten(1) - matrix).norm() / (matrix - flat).norm()).item() < 0.04


def test_muon_s_updates_are_orthogonal_and_as_large_as_adamw_s():
    (p,) = some_parameters((64, 256))
    before = p.detach().clone()
    some_steps(
        make_optimiser([p], OptimiserSection(use_muon=True, learning_rate=0.1, adam_weight_decay=0)), [p], 1
    )
    update = (before - p.detach()) / 0.1
    singular = torch.linalg.svdvals(update) / (0.2 * math.sqrt(256))
    assert 0.5 < singular.min() <= singular.max() < 1.3
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def _share(file, rank, port):
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    made = [_shared(p.detach()) for p in some_parameters((3, 40, 50), (3, 50, 40))]
    torch.save(made, f"{file}-{rank}")
    torch.distributed.destroy_process_group()


def test_processes_share_the_work_and_have_the_same_updates(tmp_path):
    assert two_processes(lambda rank, port: (_share, (tmp_path / "made", rank, port), {})) == [0, 0]
    expected = [orthogonal(p.detach()) for p in some_parameters((3, 40, 50), (3, 50, 40))]
    for rank in range(2):
        made = torch.load(tmp_path / f"made-{rank}")
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_muon_leaves_vectors_thin_matrices_and_marked_groups_to_adamw():
    shapes = [(64,), (3, 64, 3, 3), (64, 3, 3, 3)]
    ours, theirs = some_parameters(*shapes, (50, 64)), some_parameters(*shapes, (50, 64))
    groups = [{"params": ours[:3], "lr": 0.01}, {"params": ours[3:], "lr": 0.002, "muon": False}]
    optimiser = make_optimiser(groups, OptimiserSection(use_muon=True))
    some_steps(optimiser, ours)
    plain = [{"params": theirs[:3], "lr": 0.01}, {"params": theirs[3:], "lr": 0.002}]
    some_steps(make_optimiser(plain, OptimiserSection()), theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [group["lr"] for group in optimiser.param_groups] == [0.01, 0.002]
