"""Sparse probing against planted labels, brute force, and its own controls."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer

from qwenscope.corpus.conversation import ROLES
from qwenscope.corpus.stream import CorpusStream
from qwenscope.evaluation.probing import Sample, auroc, draws, over_seeds, tasks_of, token_rates
from qwenscope.evaluation.token_labels import FAMILIES, binary, categories, letters, shape
from qwenscope.evaluation.usefulness import Division, of_sae
from qwenscope.lm.sites import Site
from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.recipe import CorpusRecipe, SourceRecipe
from qwenscope.sae.sae import TopKSAE

SITE, D, EACH, CONVERSATIONS = Site.of(0), 16, 40, 60
PLANTED = 5


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Rows without structure but for one direction, present on the tokens of the role `user`."""
    random = np.random.default_rng(3)
    rows = CONVERSATIONS * EACH
    role_R = np.where(random.random(rows) < 0.3, "user", "assistant").astype(object)
    x_RD = torch.from_numpy(random.normal(size=(rows, D)).astype(np.float32))
    x_RD[:, 0] += 8 * torch.from_numpy((role_R == "user").astype(np.float32))
    shapes_R = random.choice(np.array(["word", "sign", "digit", None], dtype=object), rows, p=[0.5, 0.4, 0.005, 0.095])
    constant_R = np.full(rows, "same", dtype=object)
    known = dict.fromkeys(FAMILIES, constant_R) | {"role": role_R, "next token": shapes_R}
    token_R = random.integers(0, 50, rows)
    first_R = np.where(token_R < 20, "a", "b").astype(object)
    conversation_R = np.repeat(np.arange(CONVERSATIONS), EACH)
    return Sample({SITE: x_RD}, conversation_R, token_R, known, {"letter": first_R})


@pytest.fixture(scope="module")
def sae() -> TopKSAE:
    """Latent PLANTED reads the planted direction, the others anything else."""
    sae = TopKSAE(D, 32, 4, seed=1)
    with torch.no_grad():
        sae.encoder.weight[:, 0] = 0
        sae.encoder.weight[PLANTED] = torch.nn.functional.one_hot(torch.tensor(0), D).float()
        sae.encoder.bias[PLANTED] = -4
    return sae


def test_labels_are_told_apart_by_whole_conversations(sample: Sample) -> None:
    tasks = tasks_of(sample, sample.categories, 7)
    assert {task.family for task in tasks} == {"role", "next token"}
    assert [task.family for task in tasks].count("next token") == 2  # too few digits
    for task in tasks:
        assert not set(sample.conversation_R[task.train_R]) & set(sample.conversation_R[task.held_R])
        unknown = [value is None for value in sample.categories[task.family]]
        assert not (task.train_R | task.held_R)[unknown].any()
    assert (tasks_of(sample, sample.categories, 8)[0].held_R != tasks[0].held_R).any()


def test_the_planted_latent_alone_finds_its_label_and_a_frozen_decoder_does_not(sample: Sample, sae: TopKSAE) -> None:
    divisions = [
        Division(seed, tasks_of(sample, sample.categories, seed), tasks_of(sample, sample.letters, seed))
        for seed in range(3)
    ]
    found = of_sae(sae, sample, SITE, divisions, draws(sample, 0))
    roles = {
        name: {k: cell["families"]["role"]["auroc"] for k, cell in of.items()} for name, of in found["probing"].items()
    }
    assert roles["latents"]["1"] > 0.99
    assert roles["rows"]["all"] > 0.999
    assert roles["frozen decoder"]["1"] < roles["latents"]["1"] - 0.02
    chance = found["probing"]["latents"]["16"]["families"]["next token"]["auroc"]
    assert chance == pytest.approx(0.5, abs=0.06)
    gap = found["above_frozen_decoder"]["1"]["auroc"]
    means = [found["probing"][name]["1"]["auroc"] for name in ("latents", "frozen decoder")]
    assert gap == pytest.approx(means[0] - means[1])
    for cell in (found["probing"]["latents"]["4"], found["above_frozen_decoder"]["1"]):
        low, high = cell["interval"]
        assert low <= cell["auroc"] <= high
        assert 0 < high - low < 0.1
    assert set(found["absorption"]) == {"latents", "frozen decoder"}
    for of in found["absorption"].values():
        assert set(of) == {"absorbed", "silent", "random directions"}
        assert all(0 <= cell["share"] <= 1 for cell in of.values())
        assert set(of["absorbed"]["families"]) == {"role", "next token", "letter"}
    density_N = (sae.encode(sample.rows[SITE]).dense() > 0).float().mean(0)
    assert found["dense_latents"] == int((density_N > 0.1).sum())
    assert found["mean_over_std"] == pytest.approx(
        float(sample.rows[SITE].mean(0).norm() / sample.rows[SITE].var(0).sum().sqrt()), rel=1e-5
    )


def test_figures_are_shares_of_pairs_in_the_right_order(sample: Sample) -> None:
    task = tasks_of(sample, sample.categories, 2)[0]
    scores, label = token_rates(sample, task), task.positive_R[task.held_R]
    conversation = sample.conversation_R[task.held_R]
    twice = np.ones((2, CONVERSATIONS))
    twice[1] = np.random.default_rng(5).integers(0, 3, CONVERSATIONS)
    for found, weight_C in zip(auroc(scores, label, conversation, twice), twice, strict=True):
        drawn = np.repeat(np.arange(len(label)), weight_C[conversation].astype(int))
        assert found == pytest.approx(roc_auc_score(label[drawn], scores[drawn]))
    seen = sample.token_R[task.train_R] == sample.token_R[task.held_R][0]
    had = task.positive_R[task.train_R][seen].sum()
    assert scores[0] == pytest.approx((had + task.positive_R[task.train_R].mean()) / (seen.sum() + 1))
    assert np.isnan(auroc(scores, label, conversation, np.zeros((1, CONVERSATIONS)))).all()


def test_seeds_are_meaned_and_spread_and_draws_give_the_interval() -> None:
    def drawn(value: float) -> np.ndarray:
        return value + np.array([0, -0.2, *np.linspace(-0.1, 0.1, 39), np.nan])

    seeds = [
        {"role": drawn(0.5), "tool": drawn(0.7)},
        {"role": drawn(0.7), "tool": drawn(0.9)},
        {"role": drawn(0.6)},
    ]
    found = over_seeds(seeds, "auroc")
    low, high = np.quantile(0.6 + np.array([-0.2, *np.linspace(-0.1, 0.1, 39)]), [0.025, 0.975])
    cell = {"auroc": pytest.approx(0.6), "std": pytest.approx(0.1), "interval": pytest.approx([low, high])}
    assert found == {**cell, "families": {"role": cell}}
    assert over_seeds([{"role": drawn(0.5)}, {}], "share") == {
        "share": None,
        "std": None,
        "interval": None,
        "families": {},
    }


@pytest.mark.parametrize(
    ("text", "want"),
    [(" the", "word"), ("ing", "word part"), (" 42", "digit"), ("\n\n", "space"), (" {", "sign"), ("ä", "word part")],
)
def test_shapes_of_tokens(text: str, want: str) -> None:
    assert shape(text) == want


def test_of_two_categories_one_label_is_made_and_unknown_rows_do_not_count() -> None:
    values = np.array(["a", "b", None, "a"], dtype=object)
    ((name, positive, known),) = binary(values)
    assert (name, positive.tolist(), known.tolist()) == ("a", [True, False, False, True], [True, True, False, True])
    assert [name for name, _, _ in binary(np.array(["c", "a", "b"], dtype=object))] == ["a", "b", "c"]
    assert list(binary(np.array(["a", None], dtype=object))) == []


def test_categories_are_what_the_conversation_says() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(STANDIN_FOLDER)
    recipe = CorpusRecipe(sources=(SourceRecipe(name="tool_use", weight=1),))
    for conversation in itertools.islice(CorpusStream(recipe, tokenizer, seed=4), 30):
        found = categories(conversation, tokenizer)
        assert {family: len(values) for family, values in found.items()} == dict.fromkeys(
            FAMILIES, len(conversation.token_ids)
        )
        assert found["role"].tolist() == [ROLES[code] for code in conversation.roles]
        tools = {call["function"]["name"] for m in conversation.messages for call in m.get("tool_calls") or ()}
        named = {name for name in found["tool"].tolist() if name is not None}
        assert named == (tools if len(tools) == 1 else set())
        assert all(role == "tool_call" for role, name in zip(found["role"], found["tool"], strict=True) if name)
        assert found["next token"][-1] is None
        for id, letter in zip(conversation.token_ids, letters(conversation, tokenizer)["letter"], strict=True):
            text = tokenizer.decode([int(id)]).strip()
            special = int(id) in tokenizer.all_special_ids
            assert letter == (text[0].lower() if text[:1].isalpha() and not special else None)
