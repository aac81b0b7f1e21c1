"""`qwenscope doctor --self-test`: train, kill, resume, compare on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenscope.training.self_test import self_test


@pytest.mark.slow
def test_the_self_test_finds_the_same_bits(tmp_path: Path) -> None:
    result = self_test(tmp_path)
    assert result["identical"], result
    assert 5000 <= result["killed_at"] < 8192
    assert result["resumed_from"] in result["detail"]
    assert all(one == other for one, other in result["sha256"].values())
