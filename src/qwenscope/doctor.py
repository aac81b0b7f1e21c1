"""What this machine lacks, how to get it, and what is known not to work on it."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qwenscope.machine import describe_machine

# What each optional package buys, and the command that brings it. `cuda` ones matter only where a GPU is.
_OPTIONAL: dict[str, tuple[str, str, bool]] = {
    "triton": ("fused top-k and gradient kernels", "pip install triton", True),
    "fla": ("fused Gated DeltaNet kernels", "pip install flash-linear-attention", True),
    "causal_conv1d": ("fused DeltaNet convolution", "pip install causal-conv1d", True),
    "accelerate": (
        "loading straight to the GPU or to several of them, and FP8 checkpoints",
        "pip install accelerate",
        True,
    ),
    "vllm": ("lm.backend: vllm", "pip install vllm", False),
    "tensorboard": ("telemetry.sinks: [tensorboard]", "pip install tensorboard", False),
    "wandb": ("telemetry.sinks: [wandb]", "pip install wandb", False),
    "gguf": ("export --to control-vector", "pip install gguf", False),
    "trackio": ("telemetry.sinks: [trackio]", "pip install trackio", False),
}


@dataclass(frozen=True)
class Missing:
    """An optional package that is not installed."""

    package: str
    buys: str
    get: str


def examine() -> dict[str, Any]:
    """`describe_machine`, and what is `missing` and which `problems` there are, as one JSON-able object."""
    cuda = torch.cuda.is_available()
    return describe_machine() | {
        "missing": [
            asdict(Missing(package, buys, get))
            for package, (buys, get, needs_cuda) in _OPTIONAL.items()
            if importlib.util.find_spec(package) is None and (cuda or not needs_cuda)
        ],
        "problems": _problems(cuda),
    }


def _problems(cuda: bool) -> list[str]:
    """Combinations that are known not to work, each with its cure."""
    problems = []
    if not cuda and importlib.util.find_spec("fla") and importlib.util.find_spec("triton"):
        problems.append(
            "flash-linear-attention and triton are installed but no GPU is there: DeltaNet crashes on CPU tensors; "
            "uninstall flash-linear-attention here"
        )
    return problems
