"""What doctor says of kernels: which one runs each hot part, and what it costs that a faster one is missing."""

from __future__ import annotations

import importlib.util
import io

import pytest
from rich.console import Console

from qwenscope import machine
from qwenscope.cli.tables import doctor_table
from qwenscope.doctor import examine
from qwenscope.machine import kernels

PARTS = {"Gated DeltaNet", "DeltaNet convolution", "attention", "routed experts", "SAE step"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that the machine seems to have; add to it."""
    names: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in names else None)
    return names


def test_a_cpu_lacks_nothing_that_would_run_there() -> None:
    chosen = kernels(None)
    assert set(chosen) == PARTS
    assert all(kernel == {"used": "torch", "costs": ""} for kernel in chosen.values())


def test_a_bare_gpu_names_what_is_slow_and_a_full_one_nothing(installed: set[str]) -> None:
    bare = kernels((9, 0))
    assert set(bare) == PARTS
    assert {part for part, kernel in bare.items() if kernel["costs"]} == {
        "Gated DeltaNet",
        "DeltaNet convolution",
        "SAE step",
    }
    installed |= {"fla", "causal_conv1d", "triton"}
    full = kernels((9, 0))
    assert [kernel["costs"] for kernel in full.values()] == [""] * 5
    assert full["Gated DeltaNet"]["used"] == "flash-linear-attention"
    assert full["routed experts"]["used"] == "grouped product"


def test_an_old_gpu_has_no_grouped_products(installed: set[str]) -> None:
    old = kernels((7, 5))
    assert "one small product per expert" in old["routed experts"]["costs"]
    assert "square" in old["attention"]["costs"]


def test_the_table_shows_each_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "kernels", lambda _: {"routed experts": {"used": "a loop", "costs": "much time"}})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor_table(examine()))
    shown = console.export_text()
    assert "routed experts: a loop" in shown
    assert "routed experts without a fused kernel: much time" in shown


def test_what_is_missing_is_shown_letter_by_letter() -> None:
    report = examine() | {
        "missing": [{"package": "wandb", "buys": "telemetry.sinks: [wandb]", "get": "pip install wandb"}]
    }
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor_table(report))
    assert "wandb: telemetry.sinks: [wandb]; pip install wandb" in console.export_text()
