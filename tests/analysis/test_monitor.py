"""Monitors: fitted, saved, refused elsewhere, tested on like and unlike piles, scored at once and as tokens come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_suite import PLANTED, PLANTED_LATENT
from typer.testing import CliRunner
from word_piles import rows

from qwenscope.analysis.detector import BLOCK, Detector, Running
from qwenscope.analysis.piles import Reader
from qwenscope.analysis.pooling import Scope
from qwenscope.analysis.result_forms import FORMS
from qwenscope.analysis.watching import prompt, watch
from qwenscope.cli.main import app
from qwenscope.corpus.conversation import ROLES
from qwenscope.errors import CorpusError, FormatError
from qwenscope.lm.hooks import intervene
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target, open_target
from qwenscope.sae.sae import SAE

Write = Any


def run(*arguments: Any, given: str | None = None) -> Any:
    return CliRunner().invoke(app, ["monitor", *map(str, arguments)], input=given, catch_exceptions=False)


@pytest.fixture(scope="module")
def piles(write_rows: Write) -> dict[str, Path]:
    return {
        "positive": write_rows("p", rows(1000, 24, True)),
        "negative": write_rows("n", rows(2000, 24, False)),
        "calibration": write_rows("c", rows(3000, 60, False)),
        "test positive": write_rows("tp", rows(4000, 30, True)),
        "test negative": write_rows("tn", [*rows(5000, 60, False), *rows(6000, 20, False, source="elsewhere")]),
    }


@pytest.fixture(scope="module")
def monitor(release: Path, piles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("monitor") / "monitor"
    named = [option for name in ("positive", "negative", "calibration") for option in (f"--{name}", piles[name])]
    result = run("fit", release, "--out", out, *named, "--fpr", "0.1", "--sae", "sae_delta", "--json")
    assert PLANTED_LATENT in json.loads(result.stdout)["latents"]
    return out


@pytest.fixture(scope="module")
def opened(release: Path, monitor: Path) -> tuple[Target, Detector, SAE, LanguageModel]:
    target, detector = open_target(release), Detector.load(monitor)
    sae, lm = detector.sae(target), target.language_model()
    detector.check_model(lm)
    return target, detector, sae, lm


def test_a_test_says_what_holds_and_what_the_controls_do(
    release: Path, monitor: Path, piles: dict[str, Path], tmp_path: Path
) -> None:
    named = ["--positive", piles["test positive"], "--negative", piles["test negative"], "--out", tmp_path / "t.json"]
    shown = run("test", release, monitor, *named).stdout
    found = json.loads((tmp_path / "t.json").read_text())
    FORMS[found["kind"]].validate_json((tmp_path / "t.json").read_bytes(), strict=True)
    whole = found["slices"]["all"]
    assert set(whole["by"]) == {"monitor", "raw rows", "words", "random direction"}
    assert whole["by"]["monitor"]["auroc"] > 0.95
    assert whole["conversations"] == {"positive": 30, "negative": 80}
    assert "cannot be stated" in whole["by"]["monitor"]["at"]["0.01"]["refused"]
    assert whole["stated"]["holds"]
    assert found["slices"]["like the calibration pile"]["conversations"]["negative"] <= 60
    shifted = found["slices"]["source elsewhere"]  # it has no positive conversation
    assert shifted["conversations"] == {"positive": 0, "negative": 20}
    assert shifted["stated"]["recall"] is None
    assert not shifted["by"]
    for words in ("raw rows", "words", "random direction", "like the calibration pile"):
        assert words in shown


def test_scores_are_what_the_formula_says(opened: tuple[Any, ...], piles: dict[str, Path]) -> None:
    target, detector, sae, lm = opened
    given = Reader(lm.tokenizer, 128).pile(piles["test positive"])[:4]
    conversations = [each.conversation for each in given]
    for pool in ("max", "mean"):
        of_pool = replace(detector, pool=pool)
        for conversation, found in zip(
            conversations, of_pool.score(lm, sae, conversations, target.recipe), strict=True
        ):
            rows_TD = one_pass(lm, detector, conversation.token_ids)[found.position_T]
            with torch.no_grad():
                active_TF = sae.encode(rows_TD).dense()[:, torch.from_numpy(detector.latents_F)].double().numpy()
            assert found.position_T.tolist() == list(range(1, len(conversation.token_ids)))
            pooled = active_TF.max(0) if pool == "max" else active_TF.mean(0)
            assert found.score == pytest.approx(float(pooled @ detector.weight_F) + detector.bias, abs=1e-3)
            assert np.allclose(found.token_T, active_TF @ detector.weight_F + detector.bias, atol=1e-3)
            assert found.so_far_T[-1] == found.score
            roles = [turn.role for turn in found.turns]
            assert [role for role in roles if role != "template"] == ["user", "assistant"]
    silent = replace(detector, scope=Scope(("tool_result",)))  # no token of these conversations
    for found in silent.score(lm, sae, conversations, target.recipe):
        assert (found.score, found.turns, len(found.token_T)) == (detector.bias, [], 0)


def one_pass(lm: LanguageModel, detector: Detector, token_ids: np.ndarray) -> torch.Tensor:
    site = detector.about["site"]
    rows: list[torch.Tensor] = []

    def keep(x_CTD: torch.Tensor) -> torch.Tensor:
        rows.append(x_CTD[0])
        return x_CTD

    with torch.no_grad(), intervene(lm, {site: keep}):
        lm.model(input_ids=torch.from_numpy(token_ids).long()[None])
    return torch.cat(rows)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_streamed_scores_are_the_batch_scores_bit_for_bit(opened: tuple[Any, ...], pool: str) -> None:
    """The rows that the model computed while it generated, scored at once, give every bit of the streamed scores."""
    _, detector, sae, lm = opened
    detector = replace(detector, pool=pool)
    prompt = f"order status{PLANTED} query error"
    ids = torch.tensor([lm.tokenizer(prompt).input_ids])
    rows: list[torch.Tensor] = []

    def keep(x_CTD: torch.Tensor) -> torch.Tensor:
        rows.append(x_CTD[0])
        return x_CTD

    with watch(detector, sae, lm) as watching, intervene(lm, {detector.about["site"]: keep}):
        written = lm.model.generate(ids, max_new_tokens=3 * BLOCK, do_sample=False, eos_token_id=None)
    x_TD = torch.cat(rows)
    assert len(x_TD) == watching.read == written.shape[1] - 1
    position_T = torch.arange(1, len(x_TD))
    active_TF = detector.active(sae, x_TD[1:], position_T)
    _, token_T, so_far_T = detector.go_on(Running.start(len(detector.weight_F)), active_TF)
    assert watching.position == position_T.tolist()
    assert watching.token == token_T.tolist()
    assert watching.so_far == so_far_T.tolist()
    assert len(set(watching.token)) > 1


def test_streaming_without_a_cache_and_by_role(opened: tuple[Any, ...]) -> None:
    _, detector, sae, lm = opened
    ids, user = prompt(lm.tokenizer, [{"role": "user", "content": f"status{PLANTED} error"}])
    assert [ROLES[role] for role in user[-2:]] == ["template", "template"]
    assert ROLES.index("user") in user
    assert ROLES.index("assistant") not in user
    written = []
    for use_cache in (True, False):
        with watch(replace(detector, scope=Scope(("assistant",), 1, 6)), sae, lm, user) as watching:
            lm.model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, use_cache=use_cache)
        assert watching.position == list(range(ids.shape[1] + 1, ids.shape[1] + 6))
        written.append(watching.so_far)
    assert np.allclose(*written, atol=1e-3)
    with (
        pytest.raises(FormatError, match="one at a time"),
        watch(detector, sae, lm),
    ):
        lm.model(input_ids=ids.repeat(2, 1))


def test_lines_of_scores_from_a_file_and_from_stdin(release: Path, monitor: Path, piles: dict[str, Path]) -> None:
    of_file = run("score", release, monitor, piles["test positive"], "--tokens").stdout
    of_stdin = run("score", release, monitor, "--tokens", given=piles["test positive"].read_text()).stdout
    assert of_file == of_stdin
    lines = [json.loads(line) for line in of_file.splitlines()]
    assert len(lines) == 30
    assert np.mean([line["alarm"] for line in lines]) > 0.8
    for line in lines:
        assert line["so_far"][-1] == line["score"]
        assert len(line["tokens"]) == len(line["token"]) == len(line["so_far"])
    with pytest.raises(CorpusError, match="stdin:1 is not JSON"):
        run("score", release, monitor, given="{\n")


def test_a_monitor_refuses_other_saes_models_and_damage(
    opened: tuple[Any, ...], monitor: Path, release: Path, tmp_path: Path
) -> None:
    target, detector, sae, lm = opened
    other = {"sae_delta": target.saes["sae_attn"]}
    with pytest.raises(FormatError, match="other weights than the SAE"):
        detector.sae(replace(target, saes=other))
    with pytest.raises(FormatError, match="has no SAE sae_delta at layers"):
        detector.sae(replace(target, saes={"sae_attn": sae}))
    with pytest.raises(FormatError, match="other weights than"):
        replace(detector, about=detector.about | {"model_digest": "0" * 16}).check_model(lm)
    copy = tmp_path / "copy"
    detector.save(copy)
    again = Detector.load(copy)
    assert again.weight_F.tolist() == detector.weight_F.tolist()
    assert (again.threshold, again.bias, again.scope, again.about) == (
        detector.threshold,
        detector.bias,
        detector.scope,
        detector.about,
    )
    (copy / "monitor.json").write_text((copy / "monitor.json").read_text().replace("0.1", "0.2", 1))
    with pytest.raises(FormatError, match="damaged"):
        Detector.load(copy)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--fpr", "0.001"], "the calibration pile has 60 conversations.*fewer than 5,000"),
        (["--fpr", "1.5"], "a false-positive rate of 1.5 is none"),
        (["--latent", "3"], "--latent needs --sae"),
        (["--sae", "sae_delta", "--latent", "999"], "sae_delta has no latent 999"),
        (["--sae", "sae_nope"], "--sae sae_nope is not in"),
        (["--positions", "-20:"], "positions from the end cannot be watched"),
    ],
)
def test_what_cannot_be_fitted_is_named(
    release: Path, piles: dict[str, Path], tmp_path: Path, options: list[str], named: str
) -> None:
    places = [option for name in ("positive", "negative", "calibration") for option in (f"--{name}", piles[name])]
    with pytest.raises((FormatError, CorpusError), match=named):
        run("fit", release, "--out", tmp_path / "m", *places, *options)
    assert not (tmp_path / "m").exists()


def test_half_of_the_negatives_calibrate_where_no_pile_is_named(
    release: Path, piles: dict[str, Path], tmp_path: Path
) -> None:
    places = ["--positive", piles["positive"], "--negative", piles["calibration"], "--sae", "sae_delta"]
    shown = run("fit", release, "--out", tmp_path / "m", *places, "--latent", PLANTED_LATENT, "--fpr", "0.2").stdout
    about = json.loads((tmp_path / "m" / "monitor.json").read_text())
    assert about["calibration"]["conversations"] == 30
    assert about["fitted_on"] == {"positive": 24, "negative": 30}
    assert Detector.load(tmp_path / "m").latents_F.tolist() == [PLANTED_LATENT]
    assert "20" in shown
