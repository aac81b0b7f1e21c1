"""What a second evaluation finds of the first, and evaluations that end when their intervals are narrow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import LAYER_OF, SITE_OF, with_rows_left_out

from qwenscope.evaluation import measure
from qwenscope.evaluation.kept import VARIABLE, Kept
from qwenscope.evaluation.measure import SplitMeasurement, SplitMeter
from qwenscope.evaluation.meters import Meters
from qwenscope.evaluation.pairs import compare_split
from qwenscope.opening import Target
from qwenscope.sae.sae import TopKSAE


def saes(seed: int) -> dict[str, TopKSAE]:
    return {sae_id: TopKSAE(16, 32, 5, seed=seed + layer) for sae_id, layer in LAYER_OF.items()}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every pass of a variant."""
    ran: list[object] = []
    real = measure.variant_pass
    monkeypatch.setattr(
        measure, "variant_pass", lambda lm, clean, site, x: ran.append(site) or real(lm, clean, site, x)
    )
    return ran


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


def same(first: SplitMeasurement, second: SplitMeasurement) -> bool:
    sums = all(
        np.array_equal(value, second.sums[sae_id][name])
        for sae_id, named in first.sums.items()
        for name, value in named.items()
    )
    return sums and first.figures == second.figures


def test_a_second_evaluation_runs_the_splices_alone_and_ends_alike(lm, recipe, conversations, folder, passes) -> None:
    recipe = with_rows_left_out(recipe)
    plain = SplitMeter(lm, saes(1), SITE_OF, conversations, recipe).run()
    per_sae = len(passes) // (3 * len(SITE_OF))
    assert same(SplitMeter(lm, saes(0), SITE_OF, conversations, recipe, Kept(lm, recipe)).run(), plain) is False
    passes.clear()
    again = SplitMeter(lm, saes(1), SITE_OF, conversations, recipe, Kept(lm, recipe))
    assert again.ablated == ()
    assert same(again.run(), plain), "other SAEs, the very same figures as measured afresh"
    assert len(passes) == per_sae * len(SITE_OF)


def test_other_conversations_rows_or_sites_share_nothing_wrong(lm, recipe, conversations, folder, passes) -> None:
    SplitMeter(lm, saes(0), SITE_OF, conversations, recipe, Kept(lm, recipe)).run()
    others = with_rows_left_out(recipe)
    assert SplitMeter(lm, saes(0), SITE_OF, conversations[1:], recipe, Kept(lm, recipe)).ablated
    assert SplitMeter(lm, saes(0), SITE_OF, conversations, others, Kept(lm, others)).ablated
    changed = [replace(conversations[0], token_ids=conversations[0].token_ids[::-1].copy()), *conversations[1:]]
    assert SplitMeter(lm, saes(0), SITE_OF, changed, recipe, Kept(lm, recipe)).first is None
    # one site of the three: its rows are looked for by the others' rule, its ablation is found all the same
    one = {"sae_attn": SITE_OF["sae_attn"]}
    few = {"sae_attn": saes(0)["sae_attn"]}
    passes.clear()
    found = SplitMeter(lm, few, one, conversations, recipe, Kept(lm, recipe)).run()
    assert same(found, SplitMeter(lm, few, one, conversations, recipe).run())


def test_a_model_of_which_one_weight_was_edited_is_another(lm, recipe, conversations, folder) -> None:
    first = SplitMeter(lm, saes(0), SITE_OF, conversations, recipe, Kept(lm, recipe)).run()
    weight = lm.model.lm_head.weight.data
    weight[5, 3] += 20
    try:
        edited = SplitMeter(lm, saes(0), SITE_OF, conversations, recipe, Kept(lm, recipe))
        assert edited.first is None
        assert not same(edited.run(), first)
    finally:
        weight[5, 3] -= 20


def test_a_damaged_file_is_computed_again(lm, recipe, conversations, folder, caplog) -> None:
    first = SplitMeter(lm, saes(0), SITE_OF, conversations, recipe, Kept(lm, recipe)).run()
    for path in folder.iterdir():
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    again = SplitMeter(lm, saes(0), SITE_OF, conversations, recipe, Kept(lm, recipe))
    assert again.first is None
    assert same(again.run(), first)
    assert "is damaged and computed again" in caplog.text
    assert SplitMeter(lm, saes(0), SITE_OF, conversations, recipe, Kept(lm, recipe)).ablated == (), "and kept"


def test_nothing_is_kept_where_no_folder_is_named_or_can_be_written(
    lm, recipe, conversations, tmp_path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    for named in ("", str(tmp_path / "file" / "below")):
        monkeypatch.setenv(VARIABLE, named)
        SplitMeter(lm, saes(0), SITE_OF, conversations, recipe, Kept(lm, recipe)).run()
        assert SplitMeter(lm, saes(0), SITE_OF, conversations, recipe, Kept(lm, recipe)).first is None


def test_what_is_reported_adds_up_to_what_was_said(lm, recipe, conversations) -> None:
    """A conversation's last token predicts nothing, which the forecast does not subtract."""
    meter = SplitMeter(lm, saes(0), SITE_OF, conversations, recipe)
    reported: list[int] = []
    meter.run(reported.append)
    assert meter.units * (1 - len(conversations) / meter.tokens) <= sum(reported) <= meter.units
    assert len(reported) > 10


@pytest.mark.parametrize(("width", "count"), [(1e9, 2), (1e-9, 10)])
def test_tokens_are_read_until_intervals_are_narrow(lm, recipe, conversations, tmp_path, width, count) -> None:
    target = Target("suite", tmp_path, recipe, dict(saes(0)), {})
    said: list[tuple[str, int, int]] = []
    meters = Meters(target, lm, lambda *report: said.append(report))
    used, measured = meters.measure_until({"chat": conversations}, width)
    assert used == {"chat": conversations[:count]}
    assert same(measured["chat"], SplitMeter(lm, saes(0), SITE_OF, conversations[:count], recipe).run())
    assert said[0][0].startswith("measuring 3 SAEs on chat, about ")
    assert said[0][1] == 0
    assert said[-1][1] <= said[-1][2] == sum(len(one.token_ids) for one in conversations[:count])


def test_an_interval_between_takes_a_part(lm, recipe, conversations, tmp_path) -> None:
    many = conversations * 6
    target = Target("suite", tmp_path, recipe, dict(saes(0)), {})
    pilot = SplitMeter(lm, saes(0), SITE_OF, many[:7], recipe).run()
    intervals = compare_split([], pilot.sums, recipe.seed)["intervals"]
    names = ("fvu", "ce_recovered_zero", "ce_recovered_mean")
    widest = max(found[name][1] - found[name][0] for found in intervals.values() for name in names)
    used, measured = Meters(target, lm, lambda *_: None).measure_until({"chat": many}, widest / 1.5)
    assert 7 < len(used["chat"]) <= len(many)
    intervals = compare_split([], measured["chat"].sums, recipe.seed)["intervals"]
    reached = max(found[name][1] - found[name][0] for found in intervals.values() for name in names)
    assert reached <= widest / 1.5 or len(used["chat"]) == len(many)
