"""Where a latent acts, against plain hooks on the model, its gates called by nobody else, and caches filled anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_suite import PLANTED_LATENT
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from qwenscope.analysis.experts import Firing, matched
from qwenscope.analysis.recurrence import state_changes
from qwenscope.analysis.trace import RANDOM, Reading, trace
from qwenscope.cli.main import app
from qwenscope.errors import QwenscopeError
from qwenscope.features.steering import Steering
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, open_target
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import TopKSAE
from qwenscope.seeds import generator

STRENGTH, LAYER = 0.4, 1
ROWS = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
    for asked, answered in (
        ("order that status, search that title", "that query that content and that error"),
        ("a title that system", "release that example"),
        ("status", "order query error title content search system example release that order"),
    )
]


@pytest.fixture(scope="module")
def data(write_rows: Callable[[str, list[dict[str, Any]]], Path]) -> Path:
    return write_rows("traced", ROWS)


@pytest.fixture(scope="module")
def target(release: Path) -> Target:
    return open_target(release)


@pytest.fixture(scope="module")
def result(target: Target, data: Path) -> dict[str, Any]:
    return trace(target, sae="sae_delta", latent=PLANTED_LATENT, strength=STRENGTH, data=data)


@pytest.fixture(scope="module")
def lm(target: Target) -> LanguageModel:
    return target.language_model()


@pytest.fixture(scope="module")
def readings(target: Target, lm: LanguageModel, data: Path) -> list[Reading]:
    read = [Reading.of(each) for split in target.splits(lm.tokenizer, 5000, data).values() for each in split]
    return [one for one in read if one is not None]


@pytest.fixture(scope="module")
def directions(target: Target) -> list[Tensor]:
    """The latent's, then the random ones, as unit vectors."""
    own = target.saes["sae_delta"].decoder.weight.detach()[:, PLANTED_LATENT]
    random = generator(target.recipe.seed, "traced directions")
    found = [own, *(torch.randn(len(own), generator=random) for _ in range(RANDOM))]
    return [each / each.norm() for each in found]


@contextmanager
def pushed(lm: LanguageModel, direction_D: Tensor, begin: int, end: int) -> Iterator[None]:
    """A plain hook that adds to the stream behind LAYER at positions begin .. end - 1 of passes without a past."""

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, begin:end] += STRENGTH * output[:, begin:end].norm(dim=-1, keepdim=True) * direction_D
        return changed

    handle = lm.layers[LAYER].register_forward_hook(hook)
    yield
    handle.remove()


def spans(one: Reading) -> dict[str, tuple[int, int]]:
    whole = len(one.token_ids)
    return {"all": (0, whole), "prefill": (0, one.start), "decode": (one.start, whole)}


@torch.no_grad()
def log_probabilities(lm: LanguageModel, one: Reading) -> Tensor:
    ids = torch.from_numpy(one.token_ids).long()[None]
    return lm.model(input_ids=ids).logits[0, one.start - 1 : -1].double().log_softmax(-1)


def test_divergence_by_position_equals_plain_hooks(lm, readings, directions, result) -> None:
    assert len(readings) == result["conversations"] == len(ROWS)
    for place, cell in result["output"]["positions"].items():
        totals = np.zeros(1 + RANDOM)
        tokens = 0
        for one in readings:
            clean_TV = log_probabilities(lm, one)
            tokens += len(clean_TV)
            for number, direction_D in enumerate(directions):
                with pushed(lm, direction_D, *spans(one)[place]):
                    totals[number] += float((clean_TV.exp() * (clean_TV - log_probabilities(lm, one))).sum())
        assert tokens == result["output"]["tokens"]
        np.testing.assert_allclose([cell["kl"], *cell["random"]], totals / tokens, rtol=1e-5)
        assert cell["beyond_random"] == pytest.approx(cell["kl"] - np.mean(cell["random"]))
        assert cell["interval"][0] <= cell["kl"] <= cell["interval"][1]


def states(lm: LanguageModel, ids: np.ndarray) -> Tensor:
    """DeltaNet's state of layer 2 after a text that is read at once into an empty cache."""
    cache = DynamicCache(config=lm.model.config)
    with torch.no_grad():
        lm.model(input_ids=torch.from_numpy(ids).long()[None], past_key_values=cache, use_cache=True)
    state = cache.layers[2].recurrent_states
    return (state[0] if isinstance(state, dict) else state).double().clone()


def test_states_equal_those_of_texts_read_anew_after_each_token(lm, readings, directions, result) -> None:
    one = max(readings, key=lambda each: len(each.token_ids) - each.start)
    pushes = [Steering(site=LAYER, along=direction_D, strength=STRENGTH) for direction_D in directions[:2]]
    found = state_changes(lm, [(one.token_ids.tolist(), one.start)], pushes, list(spans(one)))
    assert found is not None
    assert found["layers"] == [2]
    steps = range(0, len(found["all"]["latent"][0]), 5)
    for step in steps:
        end = one.start + found["first"] + step + 1
        clean = states(lm, one.token_ids[:end])
        for place, span in spans(one).items():
            for name, direction_D in zip(("latent", "random"), directions, strict=False):
                with pushed(lm, direction_D, *span):
                    change = states(lm, one.token_ids[:end]) - clean
                assert found[place][name][0][step] == pytest.approx(float(change.norm() / clean.norm()), abs=1e-5)
    assert result["state"]["conversations"] == len(readings)
    assert result["state"]["decode"]["latent"][0][0] == pytest.approx(0, abs=1e-5), "the prompt is as it was"


@torch.no_grad()
def gates(lm: LanguageModel, one: Reading) -> dict[int, Tensor]:
    """{layer: bool [T, E]} as the gates themselves choose."""
    seen = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            seen[layer] = torch.zeros(output[0].shape, dtype=torch.bool).scatter(1, output[-1], True)

        return hook

    handles = [block.mlp.gate.register_forward_hook(keep(layer)) for layer, block in enumerate(lm.layers)]
    lm.model(input_ids=torch.from_numpy(one.token_ids).long()[None])
    for handle in handles:
        handle.remove()
    return seen


def test_experts_where_it_is_added_equal_the_gates(lm, readings, directions, result) -> None:
    found = result["routing"]["added"]
    assert found["layers"] == [2, 3], "the residual stream after layer 1 is behind that layer's router"
    clean = [gates(lm, one) for one in readings]
    shares = []
    for direction_D in directions:
        after = []
        for one in readings:
            with pushed(lm, direction_D, 0, len(one.token_ids)):
                after.append(gates(lm, one))
        shares.append(after)
    counted = sum(len(one.token_ids) - 1 for one in readings)
    assert found["tokens"] == counted

    def rate(seen: list[dict[int, Tensor]], layer: int) -> Tensor:
        return torch.cat([each[layer][1:] for each in seen]).double().mean(0)

    for cell in found["experts"]:
        layer, expert = cell["layer"], cell["expert"]
        changes = [float((rate(seen, layer) - rate(clean, layer))[expert]) for seen in shares]
        assert cell["before"] == pytest.approx(float(rate(clean, layer)[expert]))
        assert cell["change"] == pytest.approx(changes[0])
        assert cell["random"] == pytest.approx([min(changes[1:]), max(changes[1:])])
        assert abs(changes[0]) > max(map(abs, changes[1:]))
    k = int(clean[0][2][0].sum())
    same = [torch.cat([(a[2] & b[2])[1:] for a, b in zip(clean, seen, strict=True)]).sum() for seen in shares]
    assert found["overlap"]["latent"][0] == pytest.approx(float(same[0]) / k / counted)
    assert found["overlap"]["random"][0] == pytest.approx(float(sum(same[1:])) / k / counted / RANDOM)


def test_experts_where_it_fires_are_those_of_the_planted_word(lm, target, readings, result) -> None:
    found = result["routing"]["fires"]
    on, chosen = [], []
    for one in readings:
        with torch.no_grad():
            rows = lm.model(input_ids=torch.from_numpy(one.token_ids).long()[None], output_hidden_states=True)
        codes = target.saes["sae_delta"].encode(rows.hidden_states[LAYER + 1][0, 1:]).dense()
        on.append(codes[:, PLANTED_LATENT] > 0)
        chosen.append(gates(lm, one)[2][1:])
    fires_R, chosen_RE = torch.cat(on), torch.cat(chosen).double()
    assert found["tokens"] == int(fires_R.sum()) > 3
    apart = (chosen_RE[fires_R].mean(0) - chosen_RE[~fires_R].mean(0)).abs().sum() / 2 / chosen_RE[0].sum()
    assert found["shift"][0] == pytest.approx(float(apart))


def strata(seed: int, tokens: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    stratum_R = random.integers(0, 40, tokens)
    return random.random(tokens) < 0.1 + 0.6 * (stratum_R % 2), stratum_R


def test_matched_weights_are_means_within_strata() -> None:
    fires_R, stratum_R = strata(0)
    stratum_R[:5], stratum_R[5:9] = 100, 101  # of one kind alone
    fires_R[:5], fires_R[5:9] = True, False
    members_M, weights_BM, count = matched(fires_R, stratum_R, 0)
    x_R = np.random.default_rng(1).standard_normal(len(fires_R))
    wanted, total = 0.0, 0
    for s in np.unique(stratum_R):
        here = stratum_R == s
        if 0 < (on := int(fires_R[here].sum())) < here.sum():
            wanted += x_R[here & fires_R].sum() - on * x_R[here & ~fires_R].mean()
            total += on
    assert count == total
    assert float(weights_BM[0].double() @ torch.from_numpy(x_R)[members_M]) == pytest.approx(wanted / total, rel=1e-5)
    for s in np.unique(stratum_R[members_M]):
        here = torch.from_numpy(stratum_R[members_M] == s)
        ordered = weights_BM[:, here].sort(1).values
        assert torch.equal(ordered, ordered[:1].expand_as(ordered)), "a stratum's weights change places within it"


def test_what_the_token_decides_is_not_the_latent_s_doing() -> None:
    fires_R, stratum_R = strata(2)
    random = np.random.default_rng(3)
    by_token_R = torch.from_numpy(stratum_R % 2)
    by_latent_R = torch.from_numpy(np.where(random.random(len(fires_R)) < 0.8, fires_R, ~fires_R).astype(int))
    firing = Firing({0: 4, 1: 4})
    chosen = {0: torch.stack([by_token_R, 2 + by_token_R], 1), 1: torch.stack([by_latent_R, 2 + by_latent_R], 1)}
    firing.add(chosen, torch.from_numpy(fires_R), torch.from_numpy(stratum_R))
    found = firing.figures(0)
    assert found is not None
    assert found["shift"][0] > 0.3
    assert found["matched"][0] == pytest.approx(0, abs=1e-6)
    assert found["matched"][1] > 3 * found["permuted"][1]
    assert found["p"][1] < 0.01
    assert {cell["layer"] for cell in found["experts"][:4]} == {1}
    assert found["experts"][0]["p_family"] < 0.01


def test_a_direction_acts_as_its_latent_and_fires_nowhere(target, data, directions, result) -> None:
    found = trace(target, sae="sae_delta", along=3 * directions[0], strength=STRENGTH, data=data)
    for place, cell in found["output"]["positions"].items():
        assert cell["kl"] == pytest.approx(result["output"]["positions"][place]["kl"], rel=1e-5)
    assert found["routing"]["added"]["experts"] == result["routing"]["added"]["experts"]
    assert found["routing"]["fires"] is None
    assert found["latent"] is None


def test_a_dense_model_without_recurrence_has_its_output_alone(release, lm, data, tmp_path) -> None:
    config = LlamaConfig(
        vocab_size=len(lm.tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    lm.tokenizer.save_pretrained(tmp_path / "lm")
    recipe = open_target(release).recipe.model_dump(mode="json")
    recipe["lm"]["model"] = str(tmp_path / "lm")
    recipe["hook_points"] = {"one": {"layer": 0, "dict_size": 32, "k": 2, "lr": 1e-3}}
    (tmp_path / "recipe.yaml").write_text(Recipe.model_validate(recipe).to_yaml())
    TopKSAE(16, 32, 2, seed=0).save(tmp_path / "one")
    found = trace(tmp_path, sae="one", latent=3, data=data)
    assert found["routing"] is None
    assert found["state"] is None
    assert found["output"]["positions"]["all"]["kl"] > 0
    shown = CliRunner().invoke(app, ["trace", str(tmp_path), "--sae", "one", "--latent", "3", "--data", str(data)])
    assert shown.exit_code == 0
    assert "No router" in shown.stdout
    assert "No DeltaNet layer" in shown.stdout


def test_the_command_prints_and_writes_what_python_gives(release, data, result, tmp_path) -> None:
    asked = ["trace", str(release), "--sae", "sae_delta", "--latent", str(PLANTED_LATENT)]
    asked += ["--strength", str(STRENGTH), "--data", str(data), "--out", str(tmp_path / "trace.json")]
    shown = CliRunner().invoke(app, [*asked, "--json"])
    assert json.loads(shown.stdout)["output"] == result["output"]
    assert json.loads((tmp_path / "trace.json").read_text()) == json.loads(shown.stdout)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sae": "none", "latent": 0}, "--sae none is not in"),
        ({"sae": "sae_delta", "latent": 9999}, "there is no latent 9999"),
        ({"sae": "sae_delta", "latent": 0, "strength": 0.0}, "strength 0"),
        ({"sae": "sae_delta", "along": torch.ones(3)}, "a direction of 3"),
    ],
)
def test_what_cannot_be_traced_is_said_in_one_line(target, data, asked, said) -> None:
    with pytest.raises(QwenscopeError, match=said) as caught:
        trace(target, data=data, **asked)
    assert "\n" not in str(caught.value)


def test_where_nothing_is_answered_there_is_nothing_to_trace(target, write_rows) -> None:
    rows = [{"messages": [{"role": "user", "content": "order that"}]}] * 2
    with pytest.raises(QwenscopeError, match="no conversation has an answer"):
        trace(target, sae="sae_delta", latent=0, data=write_rows("asked", rows))
