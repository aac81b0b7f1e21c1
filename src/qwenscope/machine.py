"""What this machine is: versions, devices, memory, disk, kernels. Every run writes it down."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from qwenscope.errors import ResourceError, reason

KERNELS = {"triton": "triton", "fla": "fla.ops.gated_delta_rule", "causal_conv1d": "causal_conv1d"}
"""{package: the module of it that kernels are taken from}: a package whose module cannot be imported is passed over."""
GROUPED_PRODUCTS = (9, 10)
"""Major compute capabilities for which torch has a grouped product; on others its call of that name is a loop."""
_PACKAGES = (
    "qwenscope",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "huggingface_hub",
    "pydantic",
)


def describe_machine(folder: Path = Path()) -> dict[str, Any]:
    """Versions, devices, CPU abilities, memory, disk of `folder` and kernels, as one JSON-able object."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cpu": {
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "bf16_products": _bf16_products(),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "disk_free_bytes": shutil.disk_usage(folder.resolve()).free,
        "kernels": kernels(torch.cuda.get_device_capability() if cuda else None),
    }


def kernels(capability: tuple[int, int] | None) -> dict[str, dict[str, str]]:
    """What runs each hot part here, and what it costs that nothing faster does: {part: {"used", "costs"}}.

    Args:
        capability: The GPU's compute capability; None means a CPU, where plain torch is all there is.
    """
    if capability is None:
        parts = ("Gated DeltaNet", "DeltaNet convolution", "attention", "routed experts", "SAE step")
        return {part: {"used": "torch", "costs": ""} for part in parts}

    def choose(package: str, name: str, costs: str) -> dict[str, str]:
        found = import_error(KERNELS[package]) is None
        return {"used": name, "costs": ""} if found else {"used": "torch", "costs": costs}

    return {
        "Gated DeltaNet": choose(
            "fla",
            "flash-linear-attention",
            "float32 copies (53 times a residual row per position at once) and a loop over chunks of 64 positions: "
            "the slowest part of a forward pass",
        ),
        "DeltaNet convolution": choose(
            "causal_conv1d",
            "causal-conv1d",
            "a depthwise convolution and an activation apart: a few passes over memory",
        ),
        "attention": {"used": "torch's fused kernel (sdpa)", "costs": ""}
        if capability >= (8, 0)
        else {"used": "torch's unfused attention", "costs": "memory grows with the square of a conversation's length"},
        "routed experts": {"used": "grouped product", "costs": ""}
        if capability[0] in GROUPED_PRODUCTS
        else {
            "used": "a loop over experts",
            "costs": "two small products per expert and layer instead of two grouped ones, and two waits for the GPU",
        },
        "SAE step": choose(
            "triton", "triton", "torch's top-k: 0.7 instead of 0.1 ms per SAE and batch on an H200, by a roofline"
        ),
    }


def _version(package: str) -> str:
    """Of an installed package; a checkout on the path alone has none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def memory_errors_named(what: str, cure: str) -> Iterator[None]:
    """Turn an allocator's refusal while doing `what` into one line with a `cure`.

    Raises:
        ResourceError: memory ran out, a GPU's or the machine's.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"not enough memory for {what}: {cure} (`qwenscope plan` says what fits); {reason(error)}"
        ) from error


def import_error(module: str) -> str | None:
    """None where `module` can be imported, "" where its package is not installed, else what importing it raised."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "" if error.name and f"{module}.".startswith(f"{error.name}.") else str(error)
    except Exception as error:  # another version's library, a driver that is not there: whatever a package leads to
        return reason(error)
    return None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _bf16_products() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware, read from what the kernel reports."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text("utf-8", "replace") if cpuinfo.exists() else ""
    return "avx512_bf16" in text or "amx_bf16" in text
