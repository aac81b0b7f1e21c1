"""Every kernel of the step, compiled ahead of time for each generation of cards as the recipes' shapes launch it.

A launch on meta tensors is recorded in place of being run; what was to be launched is compiled with the same arguments,
sizes and warps, and asked for registers, stack and shared memory. No GPU is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qwenscope.lm.fused import convolution, experts, norms  # noqa: E402
from qwenscope.sae import triton_ops  # noqa: E402
from qwenscope.sae.ops import Pairs  # noqa: E402
from qwenscope.training import triton_step  # noqa: E402

MODULES = (triton_ops, triton_step, norms, experts, convolution)
CARDS = {80: 163, 90: 227, 100: 227}
"""{compute capability x 10: KiB of shared memory that a program may have}."""
REGISTERS, WARPS = 65_536, 64
"""Of one multiprocessor."""
HIDDEN, BATCH = 2048, 4096
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.float64: "*fp64",
}
SHAPES = [(16384, 64), (16384, 96), (8192, 128), (16384, 384), (65536, 64)]
"""The recipes', four candidates for each of 96 under batch top-k, and the widest."""


class Recorder:
    """In a kernel's place: what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def launches(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict]]:
    """(kernel, arguments, options) of all that `call` launches."""
    recorders = []
    with monkeypatch.context() as patch:
        for module in MODULES:
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel"):
                    recorders.append(Recorder(kernel))
                    patch.setattr(module, name, recorders[-1])
        call()
    return [(recorder.kernel, *launch) for recorder in recorders for launch in recorder.launches]


def resources(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], card: int, folder: Path) -> dict[str, int]:
    """Registers per thread, bytes of stack per thread and of shared memory, and warps, as compiled for the card."""
    sizes = {name: options[name] for name in kernel.arg_names if name in options}
    signature, attributes = {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        plain = "fp32" if isinstance(value, float) else "i32"
        if value is None:
            sizes[name] = None
            continue
        signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else plain
        if isinstance(value, torch.Tensor) or value % 16 == 0:  # what a launch finds out, too
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(sizes, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    compiled = triton.compile(source, GPUTarget("cuda", card, 32), {"num_warps": options["num_warps"]})
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    warps = compiled.metadata.num_warps
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": compiled.metadata.shared, "warps": warps}


def occupancy(used: dict[str, int]) -> float:
    """Share of a multiprocessor's warps that its registers let run at once (they are dealt in eights per thread)."""
    per_warp = 32 * (-(-used["registers"] // 8) * 8)
    return REGISTERS // (per_warp * used["warps"]) * used["warps"] / WARPS


@pytest.mark.parametrize("card", CARDS)
def test_kernels_need_no_stack_and_leave_room_for_each_other(
    card: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    table = meta(16384, HIDDEN, dtype=torch.bfloat16)
    master = meta(16384, HIDDEN, dtype=torch.float32)
    x, vector, number = meta(BATCH, HIDDEN, dtype=torch.bfloat16), meta(HIDDEN, dtype=torch.float32), master[0, 0]
    places, floats = meta(BATCH * 64, dtype=torch.int64), meta(BATCH * 64, dtype=torch.float32)
    pairs = Pairs(places, places.to(torch.int16), places, meta(16385, dtype=torch.int64), (BATCH, 64))
    dead = meta(300, HIDDEN, dtype=torch.float32), meta(16384, dtype=torch.int32)

    numbers = triton_step.Numbers(
        number, meta(2, dtype=torch.float64), number, number.bool(), number, (0.9, 0.999), 1e-8, True
    )

    def gradient(extra: tuple[torch.Tensor, torch.Tensor] | None) -> triton_step.GradientRows:
        return triton_step.GradientRows(x, pairs, floats, extra)

    calls: list[Callable[[], Any]] = [
        *(lambda n=n, k=k: triton_ops.top_k(meta(BATCH, n, dtype=torch.bfloat16), k) for n, k in SHAPES),
        lambda: triton_ops.products(table, x, pairs.latents, pairs.rows),
        lambda: triton_ops.weighted_sums(x, pairs.rows, floats, pairs.offsets),
        *(
            lambda width=width, gate=gate: norms.rms_norm(
                meta(BATCH, width, dtype=torch.bfloat16),
                meta(width, dtype=torch.bfloat16),
                1e-6,
                meta(BATCH, width, dtype=torch.bfloat16) if gate else None,
            )
            for width, gate in ((HIDDEN, False), (256, False), (128, True))
        ),
        lambda: experts.gated(meta(BATCH, 1024, dtype=torch.bfloat16)),
        *(
            lambda shared=shared: experts.combined(
                x, places, meta(BATCH // 8, 8, dtype=torch.bfloat16), meta(256, dtype=torch.int32), shared
            )
            for shared in (None, (x, x[:, :1].contiguous()))
        ),
        lambda: convolution.convolution(
            meta(2, BATCH, 8192, dtype=torch.bfloat16).transpose(1, 2),
            meta(8192, 4, dtype=torch.bfloat16),
            activation="silu",
        ),
        lambda: triton_step.centre(x, vector, number, torch.bfloat16),
        *(
            lambda k=k, made=made: triton_step.errors(
                x, vector, number, table, places[: BATCH * k].view(BATCH, k), floats, made
            )
            for k, made in ((16, None), (64, None), (64, master[:BATCH]))
        ),
        *(lambda k=k: triton_step.codes(places[: 512 * k].view(512, k), floats, 8192) for k in (128, 512)),
        lambda: triton_step.pair_totals(pairs, pairs, floats, floats, vector, vector),
        *(
            lambda unit=unit, extra=extra: gradient(extra).squares(master, vector, number, 1.0, unit)
            for unit in (False, True)
            for extra in (None, dead)
        ),
        *(
            lambda moments=moments, unit=unit, extra=extra: gradient(extra).step(
                master, (moments, moments), table, vector, numbers, unit
            )
            for moments in (master, table)
            for unit in (False, True)
            for extra in (None, dead)
        ),
    ]
    seen = {}
    for call in calls:
        for kernel, args, options in launches(call, monkeypatch):
            seen[kernel.fn.__name__, *sorted(options.items())] = kernel, args, options
    everything = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert {name for name, *_ in seen} == everything
    for key, launch in seen.items():
        used = resources(*launch, card, tmp_path)
        assert used["stack"] == 0, (key, used)
        assert used["registers"] * 32 * used["warps"] <= REGISTERS // 2, (key, used)
        assert used["shared"] <= CARDS[card] << 10, (key, used)
        assert occupancy(used) >= 0.5, (key, used)
