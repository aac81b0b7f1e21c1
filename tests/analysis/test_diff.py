"""Two halves of one corpus do not differ; a topic planted in one is found, with its conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planted_suite import PLANTED, PLANTED_LATENT
from typer.testing import CliRunner
from word_piles import rows

from qwenscope.analysis.diff import diff
from qwenscope.analysis.result_forms import FORMS
from qwenscope.cli.main import app
from qwenscope.errors import CorpusError

Write = Any


@pytest.fixture(scope="module")
def corpora(write_rows: Write) -> dict[str, Path]:
    return {
        "first half": write_rows("half-1", rows(100, 24, False)),
        "second half": write_rows("half-2", rows(200, 24, False)),
        "topic": write_rows("topic", [*rows(300, 12, False), *rows(400, 12, True)]),
    }


def test_two_halves_of_a_corpus_do_not_differ(release: Path, corpora: dict[str, Path]) -> None:
    found = diff(release, a=corpora["first half"], b=corpora["second half"])
    assert (found["found"], found["latents"]) == (0, [])
    assert found["conversations"] == {"a": 24, "b": 24}
    assert found["tested"] > 100


def test_a_planted_topic_is_found_with_its_conversations(
    release: Path, corpora: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["diff", str(release), "--a", str(corpora["topic"]), "--b", str(corpora["first half"])]
    shown = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "d.json")], catch_exceptions=False).stdout
    found = json.loads((tmp_path / "d.json").read_text())
    (planted,) = [each for each in found["latents"] if (each["sae"], each["latent"]) == ("sae_delta", PLANTED_LATENT)]
    FORMS[found["kind"]].validate_json((tmp_path / "d.json").read_bytes(), strict=True)
    assert planted["q"] <= 0.05
    assert planted["active"] == pytest.approx({"a": 0.5, "b": 0.0}, abs=0.1)
    assert planted["rate"]["a"] > 0 == planted["rate"]["b"]
    assert all(each["side"] == "a" for each in planted["conversations"])
    assert planted["group"] in range(found["found"])
    words = [json.loads(line)["messages"][0]["content"] for line in corpora["topic"].open()]
    assert sum(PLANTED.strip() in text for text in words) == 12
    assert f"{PLANTED_LATENT}" in shown
    assert "found at a false discovery rate of 5%" in shown


def test_a_corpus_that_is_not_there_is_named(release: Path, corpora: dict[str, Path]) -> None:
    with pytest.raises(CorpusError, match="no such file or folder"):
        diff(release, a=corpora["topic"], b=Path("nowhere.jsonl"))
