"""One graph for all SAEs' steps: the same bits as step by step, also where a graph cannot be had.

A CPU has no graphs. `Recorded` keeps the promise of one: what is recorded is not done, a replay does it with the memory
that it was recorded with, and results come out where they lay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwenscope.sae.sae import TopKSAE
from qwenscope.training import graph
from qwenscope.training.graph import GraphedSteps, Results
from qwenscope.training.trainer import SAETrainer

STEPS, BATCH, HIDDEN = 12, 20, 16


class Recorded:
    """In a CUDA graph's place."""

    def __init__(self, work: Callable[[], Results], results: Results) -> None:
        self.work, self.results, self.replays = work, results, 0

    def replay(self) -> None:
        self.replays += 1
        for sae_id, (metrics, g, loss_B) in self.work().items():
            own_metrics, own_g, own_loss_B = self.results[sae_id]
            for name, value in metrics.items():
                own_metrics[name].copy_(value)
            own_loss_B.copy_(loss_B)
            if g is not None and own_g is not None:
                for own, part in zip(own_g.parts, g.parts, strict=True):
                    own.copy_(part)


def trainers() -> dict[str, SAETrainer]:
    made = {
        f"sae_{k}": SAETrainer(
            TopKSAE(HIDDEN, 48, k, seed=k), 1e-2, precision="bf16", dead_after_tokens=60, resample_every_steps=5 * k
        )
        for k in (1, 2)
    }
    for trainer in made.values():
        trainer._refresh_every = 4
    return made


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(BATCH if step else 7, HIDDEN, generator=generator) for step in reversed(range(STEPS))]


def states(of: dict[str, SAETrainer]) -> dict[str, torch.Tensor]:
    return {f"{sae_id}.{name}": value for sae_id, one in of.items() for name, value in one.state_dict().items()}


def stepped(made: dict[str, SAETrainer], record: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Losses of all steps, as the suite takes them."""
    monkeypatch.setattr(SAETrainer, "capturable", True)
    monkeypatch.setattr(graph, "record", record)
    graphed, losses = GraphedSteps(made), []
    for x_BD in rows():
        batch = dict.fromkeys(made, x_BD)
        found = graphed(batch) or {sae_id: trainer.step(batch[sae_id]) for sae_id, trainer in made.items()}
        losses += [metrics.loss for metrics in found.values()]  # looked at when later steps are done
    return [float(loss) for loss in losses]


@pytest.fixture
def expected() -> tuple[dict[str, torch.Tensor], list[float]]:
    made = trainers()
    losses = [float(trainer.step(x_BD).loss) for x_BD in rows() for trainer in made.values()]
    assert any(trainer.ages.dead().any() for trainer in made.values())
    return states(made), losses


def test_replayed_steps_are_the_steps(expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, recorded = trainers(), list[Recorded]()

    def record(work: Callable[[], Results], last: Recorded | None) -> tuple[Recorded, Results]:
        assert last is (recorded[-1] if recorded else None)
        results = {
            sae_id: ({name: torch.zeros_like(value) for name, value in metrics.items()}, g, torch.zeros_like(loss_B))
            for sae_id, (metrics, g, loss_B) in without_effect(made, work).items()
        }
        recorded.append(Recorded(work, results))
        return recorded[-1], results

    assert stepped(made, record, monkeypatch) == expected[1]
    assert len(recorded) > 1  # dead latents changed
    assert sum(one.replays for one in recorded) > STEPS // 2
    assert all(torch.equal(value, expected[0][name]) for name, value in states(made).items())


def without_effect(trained: dict[str, SAETrainer], work: Callable[[], Results]) -> Results:
    """What `work` returns, its effects on the trainers taken back."""
    before = {name: value.clone() for name, value in states(trained).items()}
    results = work()
    for name, value in states(trained).items():
        if value.dtype.is_floating_point or name.endswith((".ages", ".candidates")):
            value.copy_(before[name])
    for trainer in trained.values():
        trainer.weights.shadow("bf16", eight_bits=False)
    return results


def test_steps_go_on_where_no_graph_can_be_had(
    expected: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainers()
    with caplog.at_level(logging.WARNING):
        losses = stepped(made, graph.record, monkeypatch)  # torch's own: there is no CUDA here
    assert [entry.message.split(":")[0] for entry in caplog.records] == ["SAE steps run without a CUDA graph"]
    assert losses == expected[1]
    assert all(torch.equal(value, expected[0][name]) for name, value in states(made).items())


def test_on_a_cpu_no_graph_is_tried() -> None:
    made = trainers()
    assert GraphedSteps(made)(dict.fromkeys(made, rows()[0])) is None
    assert all(trainer.steps == 0 for trainer in made.values())
