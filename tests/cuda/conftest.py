"""The suite of a card (`make test-cuda`): what only a real one can say. It crosses rooms, so it lies apart.

Without a card it skips itself. LDM_TEST_DEVICE=cpu rehearses on the processor all but what only cards have.
"""

import os

# cuBLAS adds up in a fixed order only with a workspace of its own, which it asks for when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

NAME = os.environ.get("LDM_TEST_DEVICE", "cuda:0")
HALVES = [torch.float16, torch.bfloat16]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "cuda":
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(scope="session")
def device():
    if NAME.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no card is there: LDM_TEST_DEVICE=cpu rehearses without one")
    return torch.device(NAME)


@pytest.fixture
def card(device):
    """The device, for what only cards have."""
    if device.type != "cuda":
        pytest.skip("only a card has this")
    torch.cuda.empty_cache()
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.fixture(autouse=True)
def _exact_fp32():
    """fp32 as it is: cards make its products with TF32's ten bits else."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    yield
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed


@pytest.fixture
def fixed_order():
    """Sums in a fixed order: without, atomic additions of a backward pass come in any."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=HALVES, ids=["fp16", "bf16"])
def half(request, device):
    from ldm.runtime import has_bf16

    if request.param is torch.bfloat16 and device.type == "cuda" and not has_bf16(device):
        pytest.skip("this card only imitates bf16")
    return request.param
