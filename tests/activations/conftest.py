"""A tiny hybrid language model, conversations of random tokens, and a stream over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm.tiny_models import save

from qwenscope.corpus.conversation import Conversation
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.recipe import LMRecipe, Recipe

LAYERS = tuple(map(Site.of, (2, 3, 5)))
BROKEN, LOUD = 94, 95  # tokens whose rows are not finite after the last layer, or a thousand times as long as others


def conversation(index: int, length: int, *ends: int) -> Conversation:
    """Random tokens below 90, seeded by `index`, with `ends` as the last ones."""
    ids = np.random.default_rng(index).integers(0, 90, length).astype(np.int32)
    if ends:
        ids[-len(ends) :] = ends
    roles = np.zeros(length, np.uint8)
    return Conversation(f"{index:016x}", "files", "chat", ids, roles, False, [], None, "")


class ListStream:
    """The interface of CorpusStream over a list."""

    def __init__(self, conversations: list[Conversation]) -> None:
        self._conversations = conversations
        self._next = 0

    def __next__(self) -> Conversation:
        if self._next == len(self._conversations):
            raise StopIteration
        self._next += 1
        return self._conversations[self._next - 1]

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"]

    def report(self) -> dict[str, Any]:
        return {"conversations": self._next}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save("text", folder)
    return folder


@pytest.fixture(scope="session")
def lm(tiny_folder: Path) -> LanguageModel:
    loaded = load_language_model(LMRecipe(model=str(tiny_folder)), last_layer=max(LAYERS).layer)
    embedding = loaded.model.get_input_embeddings().weight
    embedding[BROKEN] *= 1e6
    embedding[LOUD] *= 1000

    def overflow(_module: torch.nn.Module, _inputs: Any, x_CTD: torch.Tensor) -> torch.Tensor:
        return x_CTD.masked_fill(x_CTD.norm(dim=-1, keepdim=True) > 1e4, torch.nan)

    loaded.layers[-1].register_forward_hook(overflow)  # here, because inside the model NaN spreads over a conversation
    return loaded


@pytest.fixture
def recipe(tiny_folder: Path) -> Callable[..., Recipe]:
    """recipe(window_tokens=..., ...) -> hook points at LAYERS; other keys go to `activations`."""

    def make(
        *, seed: int = 42, tokens: int = 1000, batch_size: int = 128, calibration_tokens: int = 64, **activations: Any
    ) -> Recipe:
        points = {f"sae_{site.layer}": {"site": site.name, "dict_size": 64, "k": 4, "lr": 1e-3} for site in LAYERS}
        tree = {
            "seed": seed,
            "lm": {"model": str(tiny_folder)},
            "hook_points": points,
            "corpus": {"sources": [{"name": "tool_use", "weight": 1}], "max_length": 64, "batch_tokens": 256},
            "activations": {"window_tokens": 300} | activations,
            "training": {
                "tokens": tokens,
                "batch_size": batch_size,
                "warmup_steps": 0,
                "calibration_tokens": calibration_tokens,
            },
        }
        return Recipe.model_validate(tree)

    return make
