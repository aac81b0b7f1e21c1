"""Harvest: every kept token's residual stream in canonical order, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from activations.conftest import BROKEN, LAYERS, LOUD, conversation

from qwenscope.activations.harvest import LEFT_OUT, harvest
from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.errors import CorpusError, ResourceError, TrainingError
from qwenscope.lm.forward import site_rows
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.recipe import ActivationsRecipe

PLAIN = [conversation(i, length) for i, length in enumerate([5, 64, 1, 33, 2, 64, 17, 40])]
KEEP_ALL = ActivationsRecipe(outlier_factor=None)


def alone(lm: LanguageModel, conversations: list[Conversation], layer: Site) -> torch.Tensor:
    """The rows by brute force: each conversation by itself."""
    rows = [site_rows(lm, torch.tensor(c.token_ids[None]).long(), [layer])[layer][0] for c in conversations]
    return torch.cat(rows)


@pytest.mark.parametrize("batch_tokens", [64, 100, 1000])
def test_rows_are_each_conversations_own_in_canonical_order(lm: LanguageModel, batch_tokens: int) -> None:
    got = harvest(lm, PLAIN, LAYERS, KEEP_ALL, batch_tokens)
    for layer in LAYERS:
        torch.testing.assert_close(got.rows[layer], alone(lm, PLAIN, layer), rtol=1e-5, atol=1e-5)
    lengths = [len(c.token_ids) for c in PLAIN]
    assert got.conversation_R.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert got.position_R.tolist() == [t for length in lengths for t in range(length)]
    assert got.left_out == dict.fromkeys(LEFT_OUT, 0)
    assert got.rows[LAYERS[0]].dtype == lm.dtype


def test_padding_share_counts_the_batches(lm: LanguageModel) -> None:
    one_length = [conversation(i, 16) for i in range(8)]
    assert harvest(lm, one_length, LAYERS, KEEP_ALL, 64).padding_share == 0
    # a budget of 64 makes batches of 64, 40 and 2 x 17 positions for conversations of 64, 40, 17 and 5 tokens
    unlike = [conversation(i, length) for i, length in enumerate([5, 40, 17, 64])]
    assert harvest(lm, unlike, LAYERS, KEEP_ALL, 64).padding_share == pytest.approx(1 - 126 / (64 + 40 + 34))


def test_outliers_and_broken_rows_go_at_all_hook_points(lm: LanguageModel) -> None:
    """Against the rule in plain arithmetic: a row leaves if it is broken or loud at any hook point."""
    many = [conversation(i, 40) for i in range(20)]
    many += [conversation(30, 40, BROKEN), conversation(31, 20, LOUD), conversation(32, 9, LOUD, 3)]
    got = harvest(lm, many, LAYERS, ActivationsRecipe(outlier_factor=3.0), 400)
    norms = {layer: alone(lm, many, layer).norm(dim=1) for layer in LAYERS}
    finite = [all(bool(norms[layer][r].isfinite()) for layer in LAYERS) for r in range(len(norms[LAYERS[0]]))]
    medians = {layer: norms[layer][torch.tensor(finite)].median() for layer in LAYERS}
    loud = [f and any(bool(norms[layer][r] > 3 * medians[layer]) for layer in LAYERS) for r, f in enumerate(finite)]
    keep = torch.tensor([f and not o for f, o in zip(finite, loud, strict=True)])
    assert got.left_out == dict.fromkeys(LEFT_OUT, 0) | {"non_finite": 1, "outlier": sum(loud)}
    assert 2 <= sum(loud) < 20
    for layer in LAYERS:
        assert got.rows[layer].isfinite().all()
        torch.testing.assert_close(got.rows[layer], alone(lm, many, layer)[keep], rtol=1e-5, atol=1e-5)
    places = [(c, t) for c, one in enumerate(many) for t in range(len(one.token_ids))]
    kept = [place for place, k in zip(places, keep.tolist(), strict=True) if k]
    assert list(zip(got.conversation_R.tolist(), got.position_R.tolist(), strict=True)) == kept


def test_outliers_are_measured_by_the_median_and_not_by_a_mean_that_they_lift(lm: LanguageModel) -> None:
    """Two rows in five are loud: a multiple of the mean norm would let all of them pass."""
    crowd = [conversation(i, 50, *[LOUD] * 20) for i in range(20)]
    loud = torch.zeros(1000, dtype=torch.bool)
    for layer in LAYERS:
        norm_R = alone(lm, crowd, layer).norm(dim=1)
        ordered = sorted(norm_R.tolist())
        loud |= norm_R > 3 * (ordered[499] + ordered[500]) / 2
        assert not bool((norm_R > 3 * norm_R.mean()).any())
    got = harvest(lm, crowd, LAYERS, ActivationsRecipe(outlier_factor=3.0), 400)
    assert got.left_out["outlier"] == int(loud.sum()) >= 400


def test_first_positions_are_left_out_on_request(lm: LanguageModel) -> None:
    got = harvest(lm, PLAIN, LAYERS, ActivationsRecipe(outlier_factor=None, skip_first_position=True), 256)
    assert got.left_out["first_position"] == len(PLAIN)
    assert len(got.position_R) == sum(len(c.token_ids) - 1 for c in PLAIN)
    assert int(got.position_R.min()) == 1


def test_roles_and_repeated_beginnings_are_left_out_on_request(lm: LanguageModel) -> None:
    """Against the rule by brute force: every prefix of every earlier conversation in a set."""
    opening = conversation(99, 12).token_ids
    many = []
    for i in range(12):
        own = conversation(i, 30)
        shared = (0, 5, 12)[i % 3]
        own.token_ids[:shared] = opening[:shared]
        own.roles[:] = np.random.default_rng(i).integers(0, len(ROLES), 30)
        many.append(own)
    many += [many[4], conversation(50, 1)]  # one of them twice
    only = KEEP_ALL.model_copy(update={"skip_roles": ("template", "user"), "skip_repeated": True})
    got = harvest(lm, many, LAYERS, only.model_copy(update={"skip_first_position": True}), 400)
    seen: set[tuple[int, ...]] = set()
    kept, left_out = [], dict.fromkeys(LEFT_OUT, 0)
    for c, one in enumerate(many):
        beginnings = [tuple(one.token_ids[: t + 1].tolist()) for t in range(len(one.token_ids))]
        for t, beginning in enumerate(beginnings):
            skipped = {
                "first_position": t == 0,
                "role": ROLES[one.roles[t]] in ("template", "user"),
                "repeated": beginning in seen,
            }
            reason = next((name for name, holds in skipped.items() if holds), None)
            if reason is None:
                kept.append((c, t))
            else:
                left_out[reason] += 1
        seen.update(beginnings)
    assert list(zip(got.conversation_R.tolist(), got.position_R.tolist(), strict=True)) == kept
    assert got.left_out == left_out
    assert left_out["repeated"] > 30


def test_outlier_factor_null_keeps_loud_rows(lm: LanguageModel) -> None:
    got = harvest(lm, [conversation(0, 50, LOUD)], LAYERS, KEEP_ALL, 256)
    assert len(got.position_R) == 50


def test_too_many_broken_rows_name_the_hook_point(lm: LanguageModel) -> None:
    many = [conversation(0, 60), conversation(1, 40, BROKEN, BROKEN)]
    with pytest.raises(TrainingError, match=r"2 of 100 rows at hook point layers\.5 are not finite"):
        harvest(lm, many, LAYERS, KEEP_ALL, 256)
    with pytest.raises(TrainingError, match="at hook point sae_late are not finite"):
        harvest(lm, many, LAYERS, KEEP_ALL, 256, {LAYERS[0]: "sae_early", LAYERS[-1]: "sae_late"})


def test_a_window_without_room_is_said_in_one_line(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr(lm, "streams", full)
    with pytest.raises(
        ResourceError, match=r"a window of [\d,]+ tokens: lower corpus\.batch_tokens.*out of memory"
    ) as error:
        harvest(lm, PLAIN, LAYERS, KEEP_ALL, 256)
    assert "\n" not in str(error.value)


def test_conversation_above_the_budget(lm: LanguageModel) -> None:
    with pytest.raises(CorpusError, match=r"corpus\.batch_tokens"):
        harvest(lm, PLAIN, LAYERS, KEEP_ALL, 63)
