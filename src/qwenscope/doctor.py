"""What this machine lacks, how to get it, and what is installed here but does not work."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qwenscope.errors import reason
from qwenscope.machine import KERNELS, describe_machine, import_error

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
    """`describe_machine`, and what is `missing` and which `problems` there are, as one JSON-able object.

    Every optional package is imported, and on a GPU every installed kernel is run once.
    """
    cuda = torch.cuda.is_available()
    errors = {package: import_error(KERNELS.get(package, package)) for package in _OPTIONAL}
    problems = [f"{package} is installed but cannot be imported: {error}" for package, error in errors.items() if error]
    if cuda:
        problems += kernel_problems(torch.device("cuda"))
    return describe_machine() | {
        "missing": [
            asdict(Missing(package, buys, get))
            for package, (buys, get, needs_cuda) in _OPTIONAL.items()
            if errors[package] == "" and (cuda or not needs_cuda)
        ],
        "problems": problems,
    }


def kernel_problems(device: torch.device) -> list[str]:
    """What the kernels that can be imported raise when they are run on `device`, or get wrong there."""
    problems = []
    for package, run in _RUNS.items():
        if import_error(KERNELS[package]) is not None:
            continue
        try:
            close = run(device)
        except Exception as error:  # a compiler's, a driver's: the kernel's own affair
            problems.append(f"{package} is installed but does not run on {device}: {reason(error)}")
        else:
            if not close:
                problems.append(f"{package} is installed but computes something else on {device}; uninstall it")
    return problems


def _top_k(device: torch.device) -> bool:
    from qwenscope.sae import triton_ops

    scores_RN = torch.randn(4, 4096, device=device).bfloat16()
    found_RK, expected_RK = triton_ops.top_k(scores_RN, 64)[0], scores_RN.topk(64, dim=1).values
    return torch.equal(found_RK.sort(dim=1, descending=True).values, expected_RK)


def _gated_delta_rule(device: torch.device) -> bool:
    """One position, without decay: o = (k . q) v beta / sqrt(width)."""
    kernels: Any = importlib.import_module(KERNELS["fla"])
    q, k, v = (torch.randn(1, 1, 2, 64, device=device).bfloat16() for _ in range(3))
    gate, beta = torch.zeros(1, 1, 2, device=device), torch.full((1, 1, 2), 0.5, device=device)
    found: Tensor = kernels.chunk_gated_delta_rule(q, k, v, gate, beta.bfloat16())[0]
    expected = (q.float() * k.float()).sum(-1, keepdim=True) * v.float() * 0.5 / 8
    return torch.allclose(found.float(), expected, atol=0.1, rtol=0.05)


def _causal_convolution(device: torch.device) -> bool:
    kernels: Any = importlib.import_module(KERNELS["causal_conv1d"])
    x, weight = torch.randn(1, 16, 32, device=device).bfloat16(), torch.randn(16, 4, device=device).bfloat16()
    padded = torch.nn.functional.pad(x.float(), (3, 0))
    expected = torch.nn.functional.conv1d(padded, weight.float().unsqueeze(1), groups=16)
    return torch.allclose(kernels.causal_conv1d_fn(x, weight).float(), expected, atol=0.1, rtol=0.05)


_RUNS: dict[str, Callable[[torch.device], bool]] = {
    "triton": _top_k,
    "fla": _gated_delta_rule,
    "causal_conv1d": _causal_convolution,
}
