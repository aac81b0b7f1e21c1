"""A training step on a GPU that computes nothing: devices, dtypes, hidden synchronisations, operators and bytes."""

from __future__ import annotations

import pytest
import torch
from gpu_free.fake_card import fake_card, on_card
from transformers import Qwen3_5MoeTextConfig

from qwenscope.parallel.owners import owners
from qwenscope.planning.memory import memory_needs
from qwenscope.recipe import load_recipe
from qwenscope.sae.ops import Pairs
from qwenscope.sae.sae import TopKSAE
from qwenscope.training.trainer import SAETrainer

HIDDEN, BATCH = 2048, 4096
BUDGETS = {(16384, 64): (2.6e9, 60), (16384, 96): (2.6e9, 60), (8192, 128): (1.75e9, 61)}
"""{(latents, k): (bytes, operators outside Triton)} of a step without dead latents whose gradient's bound is below the
clipping norm. The last one decodes by a product, whose codes and sums stand for 2.1 GB of gathers in the cache."""


def on_a_card(latents: int, k: int, hidden: int, dtype: torch.dtype = torch.float32) -> SAETrainer:
    return SAETrainer(on_card(TopKSAE(hidden, latents, k, seed=0), dtype), 1e-4)


@pytest.mark.parametrize(("latents", "k"), list(BUDGETS))
def test_a_step_stays_within_its_budget_and_never_asks_the_device(
    latents: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_card(monkeypatch) as card:
        trainer = on_a_card(latents, k, HIDDEN)
        x = torch.empty(BATCH, HIDDEN, dtype=torch.bfloat16, device="cuda")
        card.forget()
        trainer.device_step(x)  # a value wanted on the host would raise
    streamed, operators = BUDGETS[latents, k]
    assert card.operators.total() <= operators, card.operators
    assert card.bytes - card.kernel_bytes["latents, norm alone"] < streamed
    assert card.to_host == 0
    assert trainer.precision == "bf16"
    assert dict(card.kernels) == {
        "top_k": 1, "centre": 1, "errors": 1, "products": 1, "totals": 1, "pieces": 2, "latents": 2,
        "latents, norm alone": 2, **({"codes": 1} if k == 128 else {}),
    }  # fmt: skip


def test_float64_goes_through_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def products(pairs: Pairs, table_ND: torch.Tensor, _: object) -> torch.Tensor:
        return table_ND.new_empty(len(pairs.rows))

    monkeypatch.setattr(Pairs, "products", products)  # torch has no fake sparse matrices
    with fake_card(monkeypatch) as card:
        trainer = on_a_card(64, 4, 32, torch.float64)
        metrics, _, _ = trainer.device_step(torch.empty(16, 32, device="cuda"))
    assert (trainer.precision, metrics["loss"].dtype, metrics["loss"].is_cuda) == ("fp32", torch.float64, True)
    assert not card.kernels


def test_saes_of_one_run_share_the_memory_of_their_pre_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_card(monkeypatch):
        trainers = [on_a_card(latents, 4, 32) for latents in (128, 64, 128)]
        for trainer in trainers:
            trainer.device_step(torch.empty(16, 32, device="cuda"))
        held = {trainer.active.selector._held.untyped_storage()._cdata for trainer in trainers}
    assert len(held) == 1


def test_the_suite_holds_what_a_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine SAEs of the published recipe after a step each; a plan counts the shared pre-activations with the step."""
    recipe = load_recipe("qwen3.5-35b-a3b")
    config = Qwen3_5MoeTextConfig(dtype="bfloat16")
    planned = memory_needs(recipe, config, 0, owners(recipe, 1))
    with fake_card(monkeypatch) as card:
        trainers = [on_a_card(point.dict_size, point.k, HIDDEN) for point in recipe.hook_points.values()]
        for trainer in trainers:
            trainer.device_step(torch.empty(BATCH, HIDDEN, dtype=torch.bfloat16, device="cuda"))
        storages = {}
        for trainer in trainers:
            held = [*trainer.state_dict().values(), *trainer.weights.shadows.values(), trainer.active.selector._held]
            storages |= {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
    assert sum(storages.values()) == pytest.approx(planned["saes"], rel=0.1)
    assert card.peak == pytest.approx(planned["saes"] + planned["step"], rel=0.1)
