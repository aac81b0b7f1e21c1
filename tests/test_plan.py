"""Plans: parameters are counted exactly, ranges are ordered, and a recipe that does not fit says what would."""

from __future__ import annotations

import pytest
from transformers import AutoModel, Qwen3_5MoeTextConfig

from qwenscope.errors import RecipeError
from qwenscope.plan import GIB, model_size, plan
from qwenscope.recipe import load_recipe


def test_parameters_and_active_share_match_a_built_model() -> None:
    config = Qwen3_5MoeTextConfig(
        hidden_size=32, num_hidden_layers=4, vocab_size=64, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1,
        linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    model = AutoModel.from_config(config)
    size = model_size(config, 4)
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    experts = sum(w.numel() for name, w in model.named_parameters() if ".experts." in name)
    matrices = sum(w.numel() for name, w in model.named_parameters() if w.ndim >= 2 and "embed" not in name)
    assert size.active_parameters == matrices - experts * 3 // 4
    assert model_size(config, 3).parameters < size.parameters


def test_the_published_recipe_fits_one_h200_and_says_what_an_h100_needs() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    large = plan(recipe, "h200")
    assert large["fits"]
    assert large["advice"] == []
    assert large["model"]["parameters"] == pytest.approx(30.8e9, rel=0.01)
    small = plan(recipe, "H100")
    assert not small["fits"]
    window = next(int(line.split(": ")[1].split()[0]) for line in small["advice"] if "window_tokens" in line)
    assert plan(load_recipe("qwen3.5-35b-a3b", [f"activations.window_tokens={window}"]), "h100")["fits"]


def test_ranges_are_ordered_and_more_cards_are_faster() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    one, eight = plan(recipe, "h200", 1), plan(recipe, "h200", 8)
    for report in (one, eight):
        assert report["hours"][0] < report["hours"][1]
        assert report["cost_usd"][0] < report["cost_usd"][1]
        assert report["memory_total_bytes"] == sum(report["memory_bytes"].values())
    assert eight["tokens_per_second"][0] > 4 * one["tokens_per_second"][0]
    assert eight["memory_bytes"]["sae_weights"] < one["memory_bytes"]["sae_weights"]
    assert one["memory_bytes"]["language_model"] > 57 * GIB


def test_an_unknown_card_is_named_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"abacus.*h200"):
        plan(load_recipe("standin"), "abacus")
