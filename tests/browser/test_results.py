"""Results beside an index: what is refused when the server starts, and what a monitor's score answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_results import CONTRAST, LATENT, TEST, of_suite
from planted_suite import PLANTED
from starlette.testclient import TestClient
from starlette.types import ASGIApp
from typer.testing import CliRunner

from qwenscope.analysis.results import LARGEST, read_results
from qwenscope.cli.main import app as command
from qwenscope.errors import FormatError
from qwenscope.features.browser.server import make_app
from qwenscope.features.store import Index
from qwenscope.files import write_json

SCORE = "/api/monitor/score"


@pytest.fixture(scope="module")
def client(app: ASGIApp) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1:8321") as opened:
        yield opened


@pytest.fixture(scope="module")
def opened(index: Path) -> Index:
    return Index(index)


def test_results_are_served_with_what_latents_are_known_by(client: TestClient) -> None:
    listed = client.get("/api/results").json()
    assert [each["kind"] for each in listed] == [
        "contrast",
        "diff",
        "checkpoints",
        "monitor test",
        "scenarios",
        "monitor",
    ]
    assert listed[0] == {"name": "contrast", "kind": "contrast", "summary": "1 of 400 latents found"}
    found = client.get("/api/results/contrast").json()
    assert [each["latent"] for each in found["latents"]] == [each["latent"] for each in CONTRAST["latents"]]
    assert PLANTED in found["names"][f"sae_delta/{LATENT['latent']}"]["peaks"]
    for name in ("nothing", "%00", "..%2f..%2fetc%2fpasswd"):
        assert client.get(f"/api/results/{name}").status_code == 404


def _latent(**change: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda value: value["latents"][0].update(change)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no kind": (lambda value: value.pop("kind"), r"kind: Field required.*make it again"),
    "another kind": (lambda value: value.update(kind="melody"), "a kind that is not known here: 'melody'"),
    "no latents": (lambda value: value.pop("latents"), "latents: Field required"),
    "latents of another kind": (lambda value: value.update(latents={"a": 1}), "latents: Input should be a valid"),
    "too many latents": (lambda value: value.update(latents=value["latents"] * 501), "latents: List should have"),
    "an SAE that is not there": (lambda value: value["saes"].update(sae_nope="0"), "which has no SAE sae_nope"),
    "other weights": (lambda value: value["saes"].update(sae_delta="0" * 16), "whose sae_delta has other weights"),
    "a latent that is not there": (_latent(latent=256), "another suite than .*: sae_delta has no latent 256"),
    "a latent of no SAE": (_latent(sae="sae_nope"), "another suite than .*: the index has no SAE sae_nope"),
    "a latent below 0": (_latent(latent=-1), r"latents\.0\.latent: Input should be greater"),
    "a latent that is true": (_latent(latent=True), r"latents\.0\.latent: Input should be a valid integer"),
    "a text for a number": (_latent(effect="0.5"), r"latents\.0\.effect: Input should be a valid number"),
    "half an interval": (_latent(interval=[0.5]), r"latents\.0\.interval"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_no_result_of_this_suite_is_refused_in_one_line(opened: Index, tmp_path: Path, wrong: str) -> None:
    change, said = REFUSED[wrong]
    value = of_suite(CONTRAST, opened)
    change(value)
    write_json(tmp_path / "c.json", value)
    with pytest.raises(FormatError, match=said) as refused:
        read_results([tmp_path / "c.json"], opened)
    assert "\n" not in str(refused.value)
    assert str(tmp_path / "c.json") in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"kind": "diff"' * 2, b'{"kind": NaN}', b'{"kind": "\\ud800"}'],
)
def test_files_that_are_no_json_are_refused(opened: Index, tmp_path: Path, text: bytes) -> None:
    (tmp_path / "c.json").write_bytes(text)
    with pytest.raises(FormatError, match=r"c\.json is no result that can be shown") as refused:
        read_results([tmp_path / "c.json"], opened)
    assert "\n" not in str(refused.value)


def test_numbers_that_are_none_and_files_without_end(opened: Index, tmp_path: Path) -> None:
    text = json.dumps(of_suite(CONTRAST, opened))
    for wrong in ("NaN", "1e999", "9" * 5000):
        (tmp_path / "c.json").write_text(text.replace(": 0.97", f": {wrong}", 1))
        with pytest.raises(FormatError, match=r"auroc|out of range"):
            read_results([tmp_path / "c.json"], opened)
    with (tmp_path / "c.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(FormatError, match="more than 16,777,216 bytes"):
        read_results([tmp_path / "c.json"], opened)


def test_places_that_hold_no_result_or_two(opened: Index, results: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none of contrast\.json, experiment\.json and monitor\.json"):
        read_results([tmp_path], opened)
    with pytest.raises(FormatError, match=r"nowhere cannot be read"):
        read_results([tmp_path / "nowhere"], opened)
    with pytest.raises(FormatError, match="two results are called contrast"):
        read_results([results[0], results[0]], opened)
    damaged = shutil.copytree(results[-1], tmp_path / "monitor")
    (damaged / "monitor.json").write_text("{}")
    with pytest.raises(FormatError, match="damaged"):
        read_results([damaged], opened)


def test_browse_refuses_before_it_listens(opened: Index, results: list[Path], tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", of_suite(TEST, opened) | {"saes": {"sae_delta": "0" * 16}})
    run = CliRunner().invoke
    with pytest.raises(FormatError, match="is about another suite than"):
        run(command, ["browse", str(opened.folder), "--results", str(tmp_path / "c.json")], catch_exceptions=False)
    asked = ["browse", str(opened.folder), "--results", str(results[0]), "--export", str(tmp_path / "site")]
    with pytest.raises(FormatError, match="are not exported"):
        run(command, asked, catch_exceptions=False)


def test_scores_are_those_of_the_command(client: TestClient, index: Path, results: list[Path], tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"order{PLANTED} status"}, {"role": "assistant", "content": "done"}]},
        {"messages": [{"role": "user", "content": "order status"}], "tools": [tool]},
        {"text": f"title {PLANTED}"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["monitor", "score", str(index.parent / "release"), str(results[-1]), str(tmp_path / "rows.jsonl")]
    for tokens in (True, False):
        answer = client.post(SCORE, json={"conversations": rows, "tokens": tokens})
        said = CliRunner().invoke(command, [*asked, *(["--tokens"] if tokens else [])], catch_exceptions=False)
        assert answer.json()["scores"] == [json.loads(line) for line in said.stdout.splitlines()]
    assert [each["alarm"] for each in answer.json()["scores"]] == [True, False, True]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"monitor": "nothing"}, "monitor is one of monitor"),
        ({"monitor": ["x"]}, "monitor is one of"),
        ({"conversations": []}, "conversations is a list of 1 to 100"),
        ({"conversations": [{"text": "a"}] * 101}, "conversations is a list of 1 to 100"),
        ({"conversations": {"text": "a"}}, "conversations is a list"),
        ({"conversations": ["a"]}, "a conversation is an object"),
        ({"conversations": [{"text": "a"}, {}]}, r"conversations[1]: neither messages nor text"),
        ({"conversations": [{"text": ""}]}, "there is no text to read"),
        ({"conversations": [{"messages": [1]}]}, "malformed_messages"),
        ({"conversations": [{"messages": [{"role": "pope", "content": "a"}]}]}, "unknown_role"),
        ({"conversations": [{"messages": [{"role": "user", "content": "a"}], "tools": [1]}]}, "malformed_tools"),
        ({"tokens": 1}, "tokens is true or false"),
    ],
)
def test_what_cannot_be_scored_is_named(client: TestClient, change: dict[str, Any], named: str) -> None:
    response = client.post(SCORE, json={"conversations": [{"text": "order"}]} | change)
    assert response.status_code == 400
    assert named in response.json()["error"]


def test_without_a_monitor_nothing_is_scored(index: Path) -> None:
    with TestClient(make_app(index), base_url="http://127.0.0.1:8321") as bare:
        response = bare.post(SCORE, json={"conversations": [{"text": "order"}]})
        assert bare.get("/api/results").json() == []
    assert response.status_code == 400
    assert "--results" in response.json()["error"]
