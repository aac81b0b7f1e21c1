"""Layers on several devices: a balanced map of the whole model; streams are collected, and edited, on the first.

The meta device stands in for a second one: what is moved there arrives, and cannot come back unnoticed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from by_layer import residual_streams
from lm.conftest import Checkpoint
from lm.tiny_models import FAMILIES, LAYERS
from torch import Tensor, nn
from transformers import PretrainedConfig

from qwenscope.errors import ModelError
from qwenscope.lm import load, placement
from qwenscope.lm.hooks import intervene
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel, decoder_layers
from qwenscope.lm.placement import device_map, pick_devices
from qwenscope.recipe import LMRecipe

ELSEWHERE = torch.device("meta")
CARDS = [torch.device("cuda", index) for index in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cards", [1, 2, 3])
def test_the_map_places_every_tensor_and_keeps_layers_in_order(family: str, cards: int) -> None:
    model = FAMILIES[family]()
    if family == "multimodal":
        model = model.get_decoder()
    layers = decoder_layers(model, LAYERS if "Qwen" in type(model).__name__ else 4)
    places = device_map(model, layers, CARDS[:cards])
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert all(sum(name.startswith(f"{place}.") for place in places) == 1 for name in names)
    numbers = {id(layer): position for position, layer in enumerate(layers)}
    of_layers = {numbers[id(part)]: places[name] for name, part in model.named_modules() if id(part) in numbers}
    order = [of_layers[position].index for position in range(len(layers))]
    assert order == sorted(order)
    assert set(order) == set(range(cards))
    others = [device for name, device in places.items() if id(model.get_submodule(name)) not in numbers]
    assert set(others) == {CARDS[0]}
    held = [0] * cards
    for name, device in places.items():
        held[device.index] += sum(weight.nbytes for weight in model.get_submodule(name).parameters())
    largest = max(sum(weight.nbytes for weight in layer.parameters()) for layer in layers)
    assert max(held) <= sum(held) / cards + largest


class Decoder(nn.Module):
    """Takes token ids on one device and has its layers on another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.config = PretrainedConfig()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert input_ids.device == ELSEWHERE
        x_CTD = torch.zeros(*input_ids.shape, 4)
        for layer in self.layers:
            x_CTD = layer(x_CTD)
        return SimpleNamespace(last_hidden_state=x_CTD)

    def get_decoder(self) -> Decoder:
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return nn.Embedding(1, 4)


def test_streams_and_edits_are_on_the_models_own_device() -> None:
    model: Any = Decoder()
    tokenizer: Any = None
    lm = LanguageModel(model, tokenizer, list(model.layers), (None,) * 3, 4, ELSEWHERE, torch.float32, "split", None)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    streams = residual_streams(lm, ids, [0, 2])
    assert [(x_CTD.device, x_CTD.shape) for x_CTD in streams.values()] == [(ELSEWHERE, (2, 5, 4))] * 2
    seen = []

    def edit(x_CTD: Tensor) -> Tensor:
        seen.append(x_CTD.device)
        return torch.ones(x_CTD.shape)

    with intervene(lm, {1: edit}):
        edited = model(ids.to(ELSEWHERE), use_cache=False).last_hidden_state
    assert seen == [ELSEWHERE]
    assert torch.equal(edited, torch.ones(2, 5, 4))  # where layer 2 is


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu,cpu", "names a device twice"),
        ("cpu,gpu", "'gpu' is not a torch device; use auto, cpu, cuda, cuda:1, or several as cuda:0,cuda:1"),
        ("cuda:0,cuda:64", "this machine has"),
    ],
)
def test_impossible_devices_are_named(device: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        pick_devices(device)


def test_several_devices_need_accelerate(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"over 2 devices, which needs accelerate: pip install accelerate"):
        load_language_model(LMRecipe(model=str(checkpoint("text")[0]), device="cpu:0,cpu:1"))


def test_a_mapped_model_gives_the_same_streams(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both places are the CPU here: the map must suit the checkpoint, whole, truncated and with its LM head."""
    pytest.importorskip("accelerate")
    recipe = LMRecipe(model=str(checkpoint("multimodal")[0]))
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    want = residual_streams(load_language_model(recipe), ids, [2, 5])
    monkeypatch.setattr(load, "pick_devices", lambda _: [torch.device("cpu")] * 2)
    for last_layer, lm_head in ((None, True), (5, False)):
        got = residual_streams(load_language_model(recipe, last_layer=last_layer, lm_head=lm_head), ids, [2, 5])
        assert all(torch.equal(got[layer], want[layer]) for layer in want)
