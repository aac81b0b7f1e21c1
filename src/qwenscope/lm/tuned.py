"""Kernels that tune themselves: what they chose, and the same choice again in another process.

flash-linear-attention's kernels are timed in several configurations when they first meet a shape (Triton's autotuner),
and the fastest one depends on who else used the card. Configurations add in unlike orders, so the choice decides bits:
a run writes it down, and goes on by it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from typing import Any

Choices = Mapping[str, Mapping[str, str]]
"""{kernel: {what the autotuner tells shapes apart by: configuration}}, both as Python writes them."""
_PACKAGE = "fla"


def choices() -> dict[str, dict[str, str]]:
    """What kernels have chosen so far in this process; none where there are no such kernels."""
    return {
        name: {repr(key): str(config) for key, config in tuner.cache.items()}
        for name, tuner in _tuners().items()
        if tuner.cache
    }


def choose(saved: Choices) -> list[str]:
    """Let kernels choose as in `saved` whenever they meet those shapes; names of those for which it cannot be had."""
    tuners, left = _tuners(), []
    for name, chosen in saved.items():
        configs = {str(config): config for config in tuners[name].configs} if name in tuners else {}
        if not set(chosen.values()) <= set(configs):
            left.append(name)
            continue
        tuners[name].cache.update((ast.literal_eval(key), configs[config]) for key, config in chosen.items())
    return left


def _tuners() -> dict[str, Any]:
    """{kernel: its autotuner} of all modules that were imported; a kernel is named by where it was written."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == _PACKAGE]
    if not modules:
        return {}
    from triton.runtime import Autotuner, KernelInterface

    found = {}
    for kernel in (value for module in modules for value in list(vars(module).values())):
        while isinstance(kernel, KernelInterface):  # each decorator holds what it was put upon as its `fn`
            if isinstance(kernel, Autotuner):
                found[f"{kernel.base_fn.__module__}.{kernel.base_fn.__name__}"] = kernel
            kernel = getattr(kernel, "fn", None)
    return found
