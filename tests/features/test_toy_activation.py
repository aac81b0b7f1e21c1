"""A new activation is one class and one registry line: it trains, saves, loads, evaluates and indexes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qwenscope import SAE, SAETrainer, evaluate
from qwenscope.features.index import build_index
from qwenscope.features.store import Index
from qwenscope.opening import open_target
from qwenscope.sae.activation import ACTIVATIONS, Activation, Largest, positive


class Sharp(Activation):
    """Toy: what is above each latent's threshold, less the threshold; in training at most k of a row."""

    name = "sharp"
    has_threshold = True
    trainable = True

    def select(self, pre_BN: Tensor, threshold_N: Tensor | None) -> tuple[Tensor, Tensor]:
        assert threshold_N is not None
        return positive(pre_BN - threshold_N)

    def keep(self, values_BC: Tensor, largest: Largest) -> Tensor:
        return values_BC * largest(values_BC, self.k)


def test_a_toy_activation_goes_all_the_way(
    release: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ACTIVATIONS, Sharp.name, Sharp)
    suite = tmp_path / "suite"
    shutil.copytree(release, suite)
    known = open_target(release)
    for sae_id, point in known.recipe.hook_points.items():
        hidden_dim = known.saes[sae_id].hidden_dim
        trainer = SAETrainer(SAE(hidden_dim, point.dict_size, point.k, Sharp.name, seed=1), 1e-3)
        draw = torch.Generator().manual_seed(2)
        rows = torch.randn(256, hidden_dim, generator=draw)
        trainer.calibrate(rows)
        for _ in range(5):
            trainer.step(rows)
        trained = trainer.sae()
        trained.save(suite / sae_id)
        loaded = SAE.from_pretrained(suite, sae_id=sae_id)
        assert type(loaded.activation) is Sharp
        assert loaded.threshold is not None
        assert float(loaded.threshold.min()) > 0
        pre_BN = (rows - loaded.pre_bias) @ loaded.encoder.weight.T + loaded.encoder.bias
        torch.testing.assert_close(loaded.encode(rows).dense(), (pre_BN - loaded.threshold).relu(), rtol=0, atol=1e-5)
    measured = evaluate(suite, data=corpus, tokens=600, out=tmp_path / "evaluated")
    build_index(suite, tmp_path / "index", data=corpus, tokens=1500)
    index = Index(tmp_path / "index")
    assert set(index.saes) == set(measured["saes"]) == set(known.saes)
    for sae_id, splits in measured["saes"].items():
        assert all(np.isfinite(figures["fvu"]) for figures in splits.values())
        assert index.saes[sae_id]["l0"] > 0
