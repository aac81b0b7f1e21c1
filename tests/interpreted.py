"""Triton kernels on CPU tensors: Triton reads TRITON_INTERPRET when it is first imported, and other tests import it
too, so that a file of such tests runs itself in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_interpreter starts")
outside = pytest.mark.skipif(INTERPRETED, reason="this is that process")


def run_interpreted(file: str, passed: int) -> None:
    """Assert that so many tests of the file pass in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"{passed} passed, 1 skipped" in result.stdout
