"""Shared fixtures. Tests run on CPU with one thread: they neither fight for cores nor depend on their number."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["QWENSCOPE_CACHE"] = ""  # what one test measured is no other test's

import pytest
import torch

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real conversations, tokenizers and fixtures that stand beside the checkout where the developers work."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data stand only beside a developer's checkout")
    return folder
