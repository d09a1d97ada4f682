"""What units a CPU has."""

from __future__ import annotations

import torch


def cpu_has(*units: str) -> bool:
    """Whether it has one of them, in torch's names: "amx_tile", "avx512_bf16".

    torch tells by functions that are its own: a version may lack them.
    """
    own = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in units)
    tests = [test for test in own if test is not None]
    if tests:
        return any(test() for test in tests)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name.replace("amx_tile", "amx_bf16"), False) for name in units)
