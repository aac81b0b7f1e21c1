"""What doctor says of kernels: which one runs each hot part, and what it costs that a faster one is missing."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
from rich.console import Console

from qwenscope import machine
from qwenscope.cli.tables import doctor_table
from qwenscope.doctor import examine
from qwenscope.machine import KERNELS, kernels

PARTS = {"Gated DeltaNet", "DeltaNet convolution", "attention", "routed experts", "SAE step"}


Install = Callable[[str], None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A machine without kernels, and what puts one there."""
    for module in KERNELS.values():
        monkeypatch.setitem(sys.modules, module.split(".")[0], None)
        monkeypatch.setitem(sys.modules, module, None)
    return lambda package: monkeypatch.setitem(sys.modules, KERNELS[package], ModuleType(package))


def test_a_cpu_lacks_nothing_that_would_run_there() -> None:
    chosen = kernels(None)
    assert set(chosen) == PARTS
    assert all(kernel == {"used": "torch", "costs": ""} for kernel in chosen.values())


def test_a_bare_gpu_names_what_is_slow_and_a_full_one_nothing(install: Install) -> None:
    bare = kernels((9, 0))
    assert set(bare) == PARTS
    assert {part for part, kernel in bare.items() if kernel["costs"]} == {
        "Gated DeltaNet",
        "DeltaNet convolution",
        "SAE step",
    }
    for package in KERNELS:
        install(package)
    full = kernels((9, 0))
    assert [kernel["costs"] for kernel in full.values()] == [""] * 5
    assert full["Gated DeltaNet"]["used"] == "flash-linear-attention"
    assert full["routed experts"]["used"] == "grouped product"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0)])
def test_few_gpus_have_grouped_products(capability: tuple[int, int]) -> None:
    costs = {part: kernel["costs"] for part, kernel in kernels(capability).items()}
    assert "two small products per expert" in costs["routed experts"]
    assert ("square" in costs["attention"]) == (capability < (8, 0))
    assert kernels((10, 0))["routed experts"]["used"] == "grouped product"


def test_a_checkout_that_is_not_installed_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "no-such-package"))
    versions = machine.describe_machine()["versions"]
    assert versions["no-such-package"] == "not installed"
    assert versions["torch"]


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
