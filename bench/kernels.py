"""The Triton kernels on the card at hand: right, against plain torch, and how long each takes.

    python bench/kernels.py --json kernels.json                        on a GPU, at the recipes' shapes
    TRITON_INTERPRET=1 python bench/kernels.py --json kernels.json     small shapes, by Triton's interpreter

One JSON object: for each shape and kernel the largest relative error (of top-k: 0 or 1) and, on a GPU, the median
milliseconds. Exits with 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import SHAPES, milliseconds
from torch import Tensor

from qwenscope.sae import triton_ops
from qwenscope.sae.ops import Pairs
from qwenscope.training import triton_step

WRONG = 1e-3
"""Relative error above which a sum in float32 is not the same sum."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    rows, hidden = (4096, 2048) if on_gpu else (4, 64)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if on_gpu else "Triton's interpreter"}
    for latents, k in SHAPES if on_gpu else ((256, 8),):
        found = {}
        for name, (call, error) in cases(rows, hidden, latents, k, device).items():
            found[name] = {"error": error, "milliseconds": milliseconds(call) if on_gpu else None}
        result[f"{latents}/{k}"] = found
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    shapes = [value for value in result.values() if isinstance(value, dict)]
    raise SystemExit(any(kernel["error"] > WRONG for shape in shapes for kernel in shape.values()))


def cases(
    rows: int, hidden: int, latents: int, k: int, device: torch.device
) -> dict[str, tuple[Callable[[], Any], float]]:
    """{kernel: (a call of it, its error)} on random values."""
    torch.manual_seed(0)
    scores = torch.randn(rows, latents, device=device).bfloat16()
    values, indices = triton_ops.top_k(scores, k)
    same = torch.equal(values.sort(dim=1).values, scores.topk(k, dim=1).values.sort(dim=1).values)
    same &= torch.equal(scores.gather(1, indices), values)
    pairs, x = Pairs.of(indices, latents), torch.randn(rows, hidden, device=device).bfloat16()
    table = torch.nn.functional.normalize(torch.randn(latents, hidden, device=device), dim=1)
    weights, shadow = pairs.sort(values.float()), table.bfloat16()
    offset, one = torch.zeros(hidden, device=device), torch.ones((), device=device)
    dense = (shadow.float() @ x.float().T)[pairs.latents.long(), pairs.rows]
    codes = torch.zeros(rows, latents, device=device).scatter_(1, indices, values.float())
    gradient = codes.T @ x.float()
    unmade = triton_step.GradientRows(x, pairs, weights, None)
    squares, bound = torch.empty(latents, device=device), torch.full_like(one, torch.inf)
    corrections = torch.ones(2, dtype=torch.float64, device=device)
    numbers = triton_step.Numbers(1e-4 * one, corrections, one, one > 0, one, (0.9, 0.999), 1e-8, True)
    master, moments = table.clone(), (torch.zeros_like(table), torch.zeros_like(table))

    def totals() -> Tensor:
        return triton_step.pair_totals(pairs, pairs, weights, dense, weights, weights)[0][0]

    def norm() -> Tensor:
        unmade.squares(table, squares, bound, 1.0, True)
        return squares

    def step() -> Tensor:
        triton_step.GradientRows(x, pairs, weights, None).step(master, moments, shadow, squares, numbers, True)
        return master

    calls: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "products": (lambda: triton_ops.products(shadow, x, pairs.latents, pairs.rows), dense),
        "centre": (lambda: triton_step.centre(x, offset, one, torch.bfloat16)[0].float(), x.float()),
        "errors": (
            lambda: triton_step.errors(x, offset, one, shadow, indices, values.float())[1],
            (codes @ shadow.float() - x.float()).square().sum(1),
        ),
        "totals": (totals, pairs.totals(dense * (weights > 0))),
        "norm": (norm, along(gradient, table)),
        "step": (step, stepped(table, gradient)),
    }
    found: dict[str, tuple[Callable[[], Any], float]] = {
        "top_k": ((lambda: triton_ops.top_k(scores, k)), float(not same))
    }
    for name, (call, expected) in calls.items():
        got = call().clone()
        found[name] = call, float((got - expected).norm() / expected.norm())
    return found


def along(gradient: Tensor, table: Tensor) -> Tensor:
    """Squares of the rows without their part along the table's."""
    return (gradient - (gradient * table).sum(1, keepdim=True) * table).square().sum(1)


def stepped(table: Tensor, gradient: Tensor) -> Tensor:
    """Unit rows after the first step of Adam with rate 1e-4 where nothing corrects its bias."""
    gradient = gradient - (gradient * table).sum(1, keepdim=True) * table
    step = 1e-4 * 0.1 * gradient / ((0.001 * gradient.square()).sqrt() + 1e-8)
    return torch.nn.functional.normalize(table - step, dim=1)


if __name__ == "__main__":
    main()
