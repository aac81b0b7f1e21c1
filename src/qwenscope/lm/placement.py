"""On which devices a language model stands: one, or several that share its layers (`lm.device: cuda:0,cuda:1`).

The first device holds whatever is no decoder layer (embedding, final norm, LM head), takes the token ids, and is where
residual streams are collected and SAEs live. accelerate moves what passes from a layer to one on another device.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from qwenscope.errors import ModelError


def pick_devices(device: str) -> list[torch.device]:
    """The torch devices for a recipe's `lm.device`; auto is the process's current CUDA device where there is one.

    Raises:
        ModelError: not a torch device, no such device here, the same one twice, or several without accelerate.
    """
    if device == "auto":
        return [torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")]
    picked = [_picked(name.strip()) for name in device.split(",")]
    if len(set(picked)) < len(picked):
        raise ModelError(f"lm.device {device} names a device twice")
    if len(picked) > 1 and find_spec("accelerate") is None:
        raise ModelError(
            f"lm.device {device} spreads the layers over {len(picked)} devices, which needs accelerate: "
            "pip install accelerate"
        )
    return picked


def _picked(name: str) -> torch.device:
    try:
        picked = torch.device(name)
    except RuntimeError:
        raise ModelError(
            f"lm.device {name!r} is not a torch device; use auto, cpu, cuda, cuda:1, or several as cuda:0,cuda:1"
        ) from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"lm.device is {name}; this machine has {torch.cuda.device_count()} CUDA devices")
    return picked


def device_map(model: nn.Module, layers: list[nn.Module], devices: list[torch.device]) -> dict[str, torch.device]:
    """{module: device} that covers every parameter and buffer: consecutive layers, about the same bytes on each device.

    Args:
        model: the whole model (on the meta device it will do).
        layers: its decoder layers, in order.
        devices: the first holds all other modules.
    """
    number = {id(layer): position for position, layer in enumerate(layers)}
    sizes = [_bytes(layer) for layer in layers]
    rest = _bytes(model) - sum(sizes)
    share = (rest + sum(sizes)) / len(devices)
    placed: dict[str, torch.device] = {}

    def place(module: nn.Module, name: str) -> None:
        if id(module) in number:
            position = number[id(module)]
            before = rest + sum(sizes[:position]) + sizes[position] / 2  # a layer goes where its middle lies
            placed[name] = devices[min(int(before / share), len(devices) - 1)]
        elif any(id(part) in number for part in module.modules()):
            for child_name, child in module.named_children():
                place(child, f"{name}.{child_name}" if name else child_name)
        else:
            placed[name] = devices[0]

    place(model, "")
    return placed


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.itemsize for weight in module.parameters())
