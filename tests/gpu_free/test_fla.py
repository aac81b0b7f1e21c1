"""flash-linear-attention on the path and the language model on a CPU: its kernels must not be asked.

Two packages stand in for the real ones, with kernels that raise what Triton raises without a GPU. transformers picks
kernels when a modeling file is first imported, so each case runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_RAISES = 'raise RuntimeError("0 active drivers ([]). There should only be one.")'
_KERNELS = {
    "fla/__init__.py": "",
    "fla/ops/__init__.py": "",
    "fla/ops/gated_delta_rule.py": "chunk_gated_delta_rule fused_recurrent_gated_delta_rule",
    "causal_conv1d/__init__.py": "causal_conv1d_fn causal_conv1d_update",
}
_ROWS = """
import json, torch
from qwenscope.lm.load import load_language_model
from qwenscope.lm.sites import Site
from qwenscope.recipe import LMRecipe

lm = load_language_model(LMRecipe(model="standin", device="cpu"), last_layer=2)
rows = lm.streams(torch.arange(1, 101).view(2, 50), [50, 50], [Site("layers.2")])
print(json.dumps({"norms": rows[Site("layers.2")].double().norm(dim=-1).flatten().tolist()}))
"""
_DOCTOR = """
import json, torch
from qwenscope.doctor import examine, kernel_problems
print(json.dumps([examine()["problems"], kernel_problems(torch.device("cpu"))]))
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with kernels that need a GPU."""
    for name, functions in _KERNELS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"def {function}(*args, **kwargs):\n    {_RAISES}\n" for function in functions.split()))
    return tmp_path


def printed(code: str, packages: Path | None = None) -> Any:
    """The JSON on the last line that `code` prints, with `packages` on the path."""
    path = os.pathsep.join(str(part) for part in (packages, *sys.path) if part)
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_cpu_runs_plain_torch_whatever_is_installed(packages: Path) -> None:
    assert printed(_ROWS, packages) == printed(_ROWS)


def test_doctor_imports_what_is_installed_and_runs_it(packages: Path) -> None:
    problems, here = printed(_DOCTOR, packages)
    assert problems == []  # without a GPU no kernel is used
    assert [problem.split()[0] for problem in here] == ["triton", "fla", "causal_conv1d"]
    assert "fla is installed but does not run on cpu: 0 active drivers" in here[1]
    (packages / "fla" / "ops" / "__init__.py").write_text("import a_library_of_another_version")
    (problem,), here = printed(_DOCTOR, packages)
    assert "fla is installed but cannot be imported" in problem
    assert "a_library_of_another_version" in problem
    assert len(here) == 2
