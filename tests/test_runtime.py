"""Device, dtype, batch size."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.errors import UserError
from ldm.runtime import (
    Finite,
    Runtime,
    apart,
    choose,
    finite,
    has_bf16,
    is_out_of_memory,
    local_cores,
    memory_format,
    peak_memory,
    set_threads,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "bf16", "dtype"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_bf16_is_the_default_of_processors_that_have_it(monkeypatch, amx, bf16, dtype):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: bf16)
    assert choose("cpu") == Runtime(CPU, dtype)
    assert choose("cpu", "fp16") == Runtime(CPU, torch.float16)
    assert choose(CPU, torch.float32) == Runtime(CPU, torch.float32)


# --- cards, of which torch tells what a fake says ---------------------------------------------------------


@pytest.fixture
def cards(monkeypatch):
    """Two cards: what `torch.cuda` says of them; the first one is the current one."""
    told = SimpleNamespace(
        capability=[(7, 5), (8, 6)], arch=["gfx1030", "gfx90a:sramecc+:xnack-"], free=16, reserved=0, used=0
    )

    def number(device):
        return torch.device(device).index or 0

    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda including_emulation=True: including_emulation,
        "get_device_capability": lambda device=None: told.capability[number(device)],
        "get_device_properties": lambda device=None: SimpleNamespace(
            gcnArchName=told.arch[number(device)], major=told.capability[number(device)][0]
        ),
        "mem_get_info": lambda device=None: (int(told.free * 2**30), 48 * 2**30),
        "memory_reserved": lambda device=None: int(told.reserved * 2**30),
        "memory_allocated": lambda device=None: int(told.used * 2**30),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return told


def test_bf16_is_for_cards_that_have_it_and_not_for_the_current_one(cards):
    assert choose().dtype is torch.float16
    assert choose("cuda") == choose() == Runtime(torch.device("cuda", 0), torch.float16)
    assert choose("cuda:1") == Runtime(torch.device("cuda:1"), torch.bfloat16)
    cards.capability = [(8, 0), (7, 0)]
    assert [choose(name).dtype for name in ("cuda", "cuda:1")] == [torch.bfloat16, torch.float16]
    cards.capability = [(12, 0), (6, 1)]
    assert [choose(name).dtype for name in ("cuda:0", "cuda:1")] == [torch.bfloat16, torch.float16]


def test_a_vae_that_overflows_in_fp16_runs_in_what_its_card_has(cards):
    on = [Runtime(torch.device("cuda", i), torch.float16) for i in (0, 1)]
    assert [each.vae_dtype(True) for each in on] == [torch.float32, torch.bfloat16]
    assert [each.vae_dtype(False) for each in on] == [torch.float16] * 2


def test_cards_of_amd_are_told_by_their_architecture(cards, monkeypatch):
    """torch says of all of them that they have bf16, and their capability is another count."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    cards.capability = [(10, 3), (9, 0)]
    assert [choose(name).dtype for name in ("cuda", "cuda:1")] == [torch.float16, torch.bfloat16]
    cards.arch = ["gfx1100", "gfx906"]
    assert [has_bf16(torch.device("cuda", i)) for i in (0, 1)] == [True, False]


@pytest.mark.parametrize(("amx", "bf16"), [(True, False), (False, True), (False, False)])
def test_a_torch_that_lacks_its_own_functions_tells_in_another_way(monkeypatch, amx, bf16):
    monkeypatch.delattr("torch.cpu._is_amx_tile_supported")
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported")
    told = {"amx_bf16": amx, "avx512_bf16": bf16}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: told, raising=False)
    assert choose("cpu").dtype is (torch.bfloat16 if amx or bf16 else torch.float32)
    monkeypatch.delattr("torch.cpu.get_capabilities")
    assert choose("cpu").dtype is torch.float32


def test_images_at_once_on_a_card(cards):
    """16 copies of the VAE's widest features at full size: 8192 bytes a pixel for SD 1.5 in fp16."""
    runtime = Runtime(torch.device("cuda"), torch.float16)
    assert runtime.images_at_once(512, 512) == 8
    assert runtime.images_at_once(512, 512, 128 * 2) == 16
    assert runtime.images_at_once(512, 512, 256 * 4) == 4
    assert runtime.images_at_once(4096, 4096) == 1
    # What a first drawing has left in torch's cache is free for the second.
    cards.free, cards.reserved, cards.used = 3, 14, 1
    assert runtime.images_at_once(512, 512) == 8


def test_layouts():
    kinds = {name: memory_format(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert kinds == {
        "cpu": torch.channels_last,
        "cuda": torch.channels_last,
        "mps": torch.contiguous_format,
    }


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("required rank 4 tensor to use channels_last memory format"), False),
        (
            RuntimeError("cannot pin 'torch.FloatTensor': only dense CPU tensors can be in pinned memory"),
            False,
        ),
        (ValueError("not enough memory: you tried to allocate"), False),
    ],
)
def test_what_means_that_memory_is_out(error, is_memory):
    assert is_out_of_memory(error) == is_memory


def test_torch_s_own_words_for_memory_that_is_out():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_cores() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert local_cores() == 1


# --- the rest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name"), [("Half", "float16"), ("bfloat16", "bfloat16"), ("full", "float32")]
)
def test_spellings_of_dtypes(dtype, name):
    assert str(choose("cpu", dtype).dtype) == f"torch.{name}"


def test_images_at_once():
    runtime = Runtime(CPU, torch.float32)
    assert [runtime.images_at_once(side, side) for side in (128, 256, 512, 2048)] == [32, 8, 2, 1]


def test_vae_that_overflows_is_not_run_in_fp16():
    half = Runtime(CPU, torch.float16)
    assert (half.vae_dtype(True), half.vae_dtype(False)) == (torch.float32, torch.float16)
    assert Runtime(CPU, torch.bfloat16).vae_dtype(True) is torch.bfloat16


def test_peak_memory_grows_with_what_is_used():
    before = peak_memory(CPU)
    assert 2**20 < before < 2**40
    block = torch.empty(before // 4 + 2**26)  # four bytes each
    block[::1024] = 1  # a page is there when any of it is written to
    assert peak_memory(CPU) >= before + 2**26
    assert block[0] == 1


def test_free_memory_is_what_the_system_and_a_container_leave(monkeypatch, tmp_path):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr("ldm.runtime.CGROUP", tmp_path)
    assert Runtime(CPU, torch.float32).free_memory == 1000
    told = {"max": "max", "current": "500", "stat": "anon 300\ninactive_file 100\nactive_file 7\n"}
    for limit, free in (("max", 1000), ("700", 300), ("5000", 1000), ("450", 50), ("200", 0)):
        for name, text in (told | {"max": limit}).items():
            (tmp_path / f"memory.{name}").write_text(text + "\n", encoding="utf-8")
        assert Runtime(CPU, torch.float32).free_memory == free


def test_threads():
    before = torch.get_num_threads()
    set_threads(1)
    assert torch.get_num_threads() == 1
    set_threads(before)
    with pytest.raises(UserError, match="threads = 0"):
        set_threads(0)


def test_finite_passes_good_output_through_and_leaves_the_module_alone():
    layer = torch.nn.Linear(4, 4).bfloat16()
    x = torch.randn(2, 4)
    (out,) = finite(layer, lambda module: (module(x.to(module.weight.dtype)),), "the layer")
    assert out.dtype is torch.float32
    assert torch.equal(out, layer(x.bfloat16()).float())
    with pytest.warns(UserWarning, match="the layer gave NaN or Inf in bfloat16"):
        (out,) = finite(
            layer, lambda m: (m(x.to(m.weight.dtype)) / (m.weight.dtype != torch.bfloat16),), "the layer"
        )
    assert out.isfinite().all()
    assert layer.weight.dtype is torch.bfloat16
    with pytest.raises(FloatingPointError, match="the layer gives NaN or Inf, in float32 too"):
        finite(layer.float(), lambda module: (module(x) / 0,), "the layer")


def test_an_overflow_is_answered_in_fp32_from_then_on_by_one_copy():
    layer, made = torch.nn.Linear(4, 4).half(), []

    def call(module):
        made.append(module)
        return (module(torch.full((1, 4), 3e4, dtype=module.weight.dtype)) * (5 if len(made) == 1 else 1),)

    torch.nn.init.ones_(layer.weight)
    network = Finite(layer, "the layer")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        first, *others = [network(call)[0] for _ in range(4)]
    assert [str(each.message) for each in told] == [
        "the layer gave NaN or Inf in float16: done again in float32"
    ]
    assert made[0] is layer
    assert len({id(module) for module in made[1:]}) == 1
    assert made[1].weight.dtype is torch.float32
    assert len(made) == 5, "the first step twice, the others once"
    assert all(torch.equal(first, each) for each in others)
    assert layer.weight.dtype is torch.float16


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux tells them")
def test_what_computes_apart_leaves_no_workers_behind():
    """A process of its own: here others have computed already."""
    program = """
import os, threading, torch
from ldm.runtime import apart
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
def work():
    torch.ones(2**20).exp()
    return count(), threading.current_thread() is threading.main_thread()
before = count()
during, in_main = apart(work)
for _ in range(100):
    if count() == before: break
    threading.Event().wait(0.05)
print(before, during, count(), in_main)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, during, after, in_main = told.split()
    assert int(during) >= int(before) + 2
    assert (after, in_main) == (before, "False")


def test_what_goes_wrong_apart_is_raised():
    with pytest.raises(UserError, match="at least 1"):
        apart(lambda: set_threads(0))
