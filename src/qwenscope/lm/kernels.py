"""Plain torch on a CPU, whatever kernels are installed.

transformers picks an implementation of each of its kernel functions (Gated DeltaNet, causal convolutions, scans) once,
when a modeling file is imported: a package's, such as flash-linear-attention's, wherever that can be imported. Those
run on a GPU alone, and where a machine has none, or a model stands on its CPU, they raise. Here the choice is made at
each call, by the device of the tensors.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType
from typing import Any

from torch import Tensor, nn


def follow_device(model: nn.Module) -> None:
    """Make the kernel functions of the files that `model`'s classes stand in choose by device (once; idempotent)."""
    for name in {type(module).__module__ for module in model.modules()}:
        modeling = sys.modules[name]
        for key, function in list(vars(modeling).items()):
            if _chosen_at_import(function):
                setattr(modeling, key, _by_device(function))


def _chosen_at_import(function: Any) -> bool:
    """Whether this is what transformers' `use_kernel_func_from_hub_with_fallback` makes of a function."""
    return isinstance(function, FunctionType) and {"torch_function", "implementation"} <= {
        *function.__code__.co_freevars
    }


def _by_device(function: Any) -> Any:
    """The function beneath for tensors on a CPU, with the arguments that it knows; else what transformers chose."""
    plain = inspect.unwrap(function)
    known = inspect.signature(plain).parameters

    @functools.wraps(function)
    def by_device(*args: Any, **kwargs: Any) -> Any:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if first.device.type != "cpu":
            return function(*args, **kwargs)
        return plain(*args, **{key: value for key, value in kwargs.items() if key in known})

    return by_device
