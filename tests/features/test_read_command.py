"""`qwenscope read`: what it says of a text and of a conversation, against `read`; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planted_suite import CALL, PLANTED, PLANTED_LATENT, TOOL
from typer.testing import CliRunner

from qwenscope.cli.main import app
from qwenscope.errors import CorpusError, FormatError
from qwenscope.features.read import read
from qwenscope.features.store import Index
from qwenscope.opening import open_target

CHAT = {
    "messages": [
        {"role": "system", "content": "You find orders."},
        {"role": "user", "content": f"order{PLANTED} status"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": f"title{PLANTED}"},
    ],
    "tools": [TOOL],
}


def test_a_conversation_is_read_with_its_roles_and_ranked_by_lift(release: Path, index: Index, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(CHAT))
    asked = ["read", str(release), "--chat", str(file), "--index", str(index.folder)]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False).stdout)
    target = open_target(release)
    lm = target.language_model(truncated=True)
    reading = read(lm, lm.tokenizer, CHAT["messages"], target.saes, sites=target.sites, tools=CHAT["tools"])
    assert [each["token"] for each in found["tokens"]] == reading.tokens
    assert [each["role"] for each in found["tokens"]] == reading.roles
    assert {"system", "user", "tool_call", "tool_result", "template"} == set(reading.roles or ())
    fired = reading.codes["sae_delta"].dense()[1:] > 0
    hits = {(hit["sae"], hit["latent"]): hit for hit in found["latents"]}
    density = index.table("sae_delta")["density"]
    for (sae_id, latent), hit in hits.items():
        if sae_id == "sae_delta" and density[latent]:
            assert hit["tokens"] == int(fired[:, latent].sum())
            assert hit["lift"] == pytest.approx(hit["tokens"] / len(fired) / density[latent])
    lifts = [hit["lift"] for hit in found["latents"]]
    assert lifts == sorted(lifts, reverse=True)
    shown = CliRunner().invoke(app, asked, catch_exceptions=False).stdout
    assert "tool_result" in shown
    assert "Beyond their density" in shown


def test_a_text_is_read_by_the_named_sae_alone(release: Path) -> None:
    command = ["read", str(release), f"order{PLANTED} status", "--sae", "sae_delta", "--top", "1", "--json"]
    found = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    (planted,) = [each for each in found["tokens"] if each["token"] == PLANTED]
    assert planted["role"] is None
    assert [latent for latent, _ in planted["latents"]["sae_delta"]] == [PLANTED_LATENT]
    assert found["latents"] is None


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "cannot be read as JSON"), ('{"messages": []}', "holds no conversation"), ("[1]", "holds no conversation")],
)
def test_a_file_that_is_no_conversation_is_named(release: Path, tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "chat.json"
    file.write_text(content)
    with pytest.raises(CorpusError, match=said):
        CliRunner().invoke(app, ["read", str(release), "--chat", str(file)], catch_exceptions=False)
    with pytest.raises(FormatError, match="one of them"):
        CliRunner().invoke(app, ["read", str(release)], catch_exceptions=False)
