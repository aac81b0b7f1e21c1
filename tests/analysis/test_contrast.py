"""`contrast` from files to a result: two piles, labels, pairs; the planted latent, its controls, what steers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_suite import PLANTED_LATENT
from typer.testing import CliRunner
from word_piles import chat, rows

from qwenscope.analysis.contrast import contrast
from qwenscope.analysis.piles import Reader, example_names, example_path
from qwenscope.analysis.pooling import Scope
from qwenscope.analysis.result_forms import FORMS
from qwenscope.cli.main import app
from qwenscope.corpus.conversation import ROLES
from qwenscope.corpus.given import script
from qwenscope.errors import CorpusError, FormatError
from qwenscope.features.pushes import read_pushes
from qwenscope.lm.load import load_tokenizer
from qwenscope.recipe import load_recipe

Write = Any
CONTROLS = {
    "best latent",
    "sparse probe on latents",
    "probe on raw rows",
    "best random direction",
    "best latent, frozen decoder",
}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["contrast", *arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def piles(write_rows: Write) -> tuple[Path, Path]:
    return write_rows("with", rows(0, 14, True, source="a")), write_rows("without", rows(50, 14, False, source="b"))


@pytest.fixture(scope="module")
def result(release: Path, piles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out") / "contrast"
    options = ["--positive", str(piles[0]), "--negative", str(piles[1]), "--roles", "user", "--out", str(out)]
    shown = json.loads(run(str(release), *options, "--json").stdout)
    assert shown == json.loads((out / "contrast.json").read_text())
    FORMS[shown["kind"]].validate_json((out / "contrast.json").read_bytes(), strict=True)
    (push,) = read_pushes(out / "steering.json")
    assert (push.sae_id, push.latent) == (shown["latents"][0]["sae"], shown["latents"][0]["latent"])
    shown["steering"] = str(out / "steering.json")
    return shown


def test_the_planted_latent_is_found_beside_its_controls(result: dict[str, Any]) -> None:
    (planted,) = [each for each in result["latents"] if (each["sae"], each["latent"]) == ("sae_delta", PLANTED_LATENT)]
    assert planted["q"] <= 0.05
    assert planted["p_family"] <= 0.01
    assert planted["effect"] > 0.9
    assert planted["interval"][0] > 0.8
    assert planted["active"]["positive"] == 1.0
    assert planted["auroc"] > 0.95
    assert set(result["controls"]) == {"", "sae_delta", "sae_attn"}
    assert set(result["controls"]["sae_delta"]) == CONTROLS
    assert result["controls"]["sae_delta"]["best latent"]["auroc"] > 0.9
    assert result["controls"][""]["words"]["auroc"] > 0.9
    assert result["confounds"]["source"]["p"] < 0.001
    assert result["confounds"]["source"]["positive"] == {"a": 14}
    assert result["confounds"]["length"]["p"] > 0.01


def test_a_steering_file_steers(result: dict[str, Any], release: Path, tmp_path: Path) -> None:
    steered = CliRunner().invoke(
        app, ["steer", str(release), "order", "--steering", result["steering"], "--max-new-tokens", "2"]
    )
    assert "random direction" in steered.output
    with pytest.raises(FormatError, match="--steering"):
        CliRunner().invoke(app, ["steer", str(release), "order"], catch_exceptions=False)
    for text in ('{"pushes": []}', '{"pushes": [{"sae": "sae_delta", "latent": "7", "strength": 1}]}', "[]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(FormatError, match=r"bad\.json"):
            read_pushes(tmp_path / "bad.json")


def test_labels_give_what_two_piles_give_and_tables_show_it(
    result: dict[str, Any], release: Path, piles: tuple[Path, Path], write_rows: Write
) -> None:
    labelled = [
        json.loads(line) | {"kind": kind} for kind, path in zip("pn", piles, strict=True) for line in path.open()
    ]
    data = write_rows("both", labelled)
    same = contrast(release, data=data, label="kind=p", scope=Scope(("user",)))
    for one, other in zip(result["latents"], same["latents"], strict=True):
        assert (one["sae"], one["latent"], one["p"]) == (other["sae"], other["latent"], other["p"])
    shown = run(str(release), "--data", str(data), "--label", "kind=p", "--sae", "sae_delta").stdout
    for words in ("found at a false discovery rate of 5%", "best random direction", "mean tokens", "frozen decoder"):
        assert words in shown


def test_pairs_are_tested_as_pairs(release: Path, write_rows: Write) -> None:
    path = write_rows(
        "pairs",
        [
            {"messages": chat(n, planted=False)[:1], "positive": chat(n, True), "negative": chat(n, False)}
            for n in range(8)
        ],
    )
    found = contrast(release, pairs=path, saes=["sae_delta"])
    assert found["paired"]
    (planted,) = [each for each in found["latents"] if each["latent"] == PLANTED_LATENT]
    assert planted["effect"] > 0.8
    assert planted["p"] == pytest.approx(2 / 2**8, rel=0.6)  # all signs alike, either way


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "name --positive and --negative"),
        (["--positive", "P"], "name --positive and --negative"),
        (["--positive", "P", "--negative", "N", "--example", "asks-before-acting"], "name --positive"),
        (["--example", "sings"], "there is no example 'sings'; there are admits-ignorance"),
        (["--data", "P", "--label", "mood=good"], r"with\.jsonl:1 has no key mood"),
        (["--data", "P", "--label", "source=a"], "the negative pile has 0 conversations"),
        (["--pairs", "P"], "a pair needs messages under positive and negative"),
        (["--positive", "P", "--negative", "N", "--sae", "sae_nope"], "--sae sae_nope is not in"),
        (["--positive", "P", "--negative", "N", "--roles", "cook"], "there is no role 'cook'"),
        (["--positive", "P", "--negative", "N", "--positions", "7"], "no range"),
        (["--positive", "nowhere.jsonl", "--negative", "N"], "no such file or folder"),
    ],
)
def test_what_does_not_fit_is_named(release: Path, piles: tuple[Path, Path], options: list[str], named: str) -> None:
    places = dict(zip("PN", map(str, piles), strict=True))
    with pytest.raises((FormatError, CorpusError), match=named):
        run(str(release), *(places.get(option, option) for option in options))


def test_scopes_choose_tokens() -> None:
    user, assistant, template = (ROLES.index(name) for name in ("user", "assistant", "template"))
    roles_T = np.array([template, user, user, template, assistant, assistant, assistant], dtype=np.uint8)
    places = {
        Scope(): [1, 2, 3, 4, 5, 6],
        Scope(("assistant",)): [4, 5, 6],
        Scope.of("assistant,user", "1:"): [2, 4, 5, 6],
        Scope.of(None, "-2:"): [5, 6],
    }
    for scope, wanted in places.items():
        assert np.flatnonzero(scope.mask(roles_T)).tolist() == wanted
    assert np.flatnonzero(Scope().mask(roles_T, ("template",))).tolist() == [1, 2, 4, 5, 6]


def test_scripts_are_told_apart() -> None:
    texts = {"latin": "Guten Tag", "cyrillic": "Добрый день", "cjk": "你好吗", "greek": "καλημέρα", "none": "1 + 1"}
    assert {script(text): text for text in texts.values()} == texts


@pytest.mark.parametrize("name", example_names())
def test_packaged_pairs_are_many_and_no_two_alike(name: str) -> None:
    reader = Reader(load_tokenizer(load_recipe("standin").lm), 2048)
    lines = [json.loads(line) for line in example_path(name).open(encoding="utf-8")]
    assert len(lines) >= 40
    assert sum(line.get("held_out", False) for line in lines) >= 10
    for key in ("messages", "positive", "negative"):
        assert len({json.dumps(line[key]) for line in lines}) == len(lines)
    for held_out in (False, True):
        piles = reader.pairs(example_path(name), held_out=held_out)
        assert len(piles.given) == 2 * sum(bool(line.get("held_out")) == held_out for line in lines)
        assert piles.positive_C.tolist() == [True, False] * (len(piles.given) // 2)
        assert (piles.groups_C[0::2] == piles.groups_C[1::2]).all()
        assert not any(conversation.truncated for conversation in piles.conversations)
