"""Tiny checkpoints, written once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lm import tiny_models
from transformers import PreTrainedModel

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """checkpoint(family) -> (folder of a sharded checkpoint, the full model that was saved there)."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def make(family: str) -> tuple[Path, PreTrainedModel]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, tiny_models.save(family, folder, max_shard_size="40KB")
        return made[family]

    return make
