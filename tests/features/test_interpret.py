"""Labels and scores: the offline rule end to end, hand-made clients for the arithmetic, an endpoint on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from planted_suite import PLANTED, PLANTED_LATENT

from qwenscope.errors import FormatError, HubError
from qwenscope.features.clients import EndpointClient, OfflineClient
from qwenscope.features.interpret import balanced_accuracy, explain, export_delphi
from qwenscope.features.store import Index


def test_the_planted_latent_is_named_found_and_scored(index: Index) -> None:
    (record,) = explain(index, OfflineClient(), "sae_delta", [PLANTED_LATENT])
    assert record["label"] == f'tokens "{PLANTED.strip()}"'
    assert record["fuzzing"] == 1.0
    assert record["detection"] >= 0.75  # the word also stands where the latent is not among the k strongest
    shown = index.latent("sae_delta", PLANTED_LATENT)["explanation"]
    assert shown == {key: record[key] for key in ("label", "client", "detection", "fuzzing")}
    assert index.labels("sae_delta") == {PLANTED_LATENT: record["label"]}
    hit = index.search("tokens")[0]
    assert (hit["latent"], hit["label"]) == (PLANTED_LATENT, record["label"])
    again = explain(index, OfflineClient(), "sae_delta", [PLANTED_LATENT])
    assert again == [record]


def test_samples_are_what_the_index_shows(index: Index) -> None:
    (record,) = explain(index, OfflineClient(), "sae_attn", [41])
    examples = {tuple(e["tokens"]): e for e in index.latent("sae_attn", 41)["examples"]}
    assert {s["activating"] for s in record["samples"]["detection"]} == {True, False}
    for sample in record["samples"]["detection"]:
        example = examples[tuple(sample["str_tokens"])]
        assert sample["activations"] == example["activations"]
        assert sample["activating"] == (max(example["activations"]) > 0)
        assert sample["correct"] == (sample["prediction"] == sample["activating"])


class Answers:
    """A client that gives the same answer to everything."""

    name = "answers"

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def complete(self, system: str, user: str, max_tokens: int) -> str:
        if user.startswith("Feature: "):
            count = user.count("\n\nText ") or 1
            return self.answer.replace("ONES", json.dumps([1] * count))
        return '  "a  label"\n'


@pytest.mark.parametrize(("answer", "score"), [("I think ONES.", 0.5), ("no idea", 0.0), ("[1, 0, 2]", 0.0), ("", 0.0)])
def test_always_yes_is_chance_and_nonsense_is_wrong(index: Index, answer: str, score: float) -> None:
    (record,) = explain(index, Answers(answer), "sae_delta", [PLANTED_LATENT])
    assert (record["label"], record["detection"], record["fuzzing"]) == ("a label", score, score)


def test_balanced_accuracy_by_hand() -> None:
    samples = [{"activating": a, "correct": c} for a, c in [(True, True), (True, False), (False, True), (False, True)]]
    assert balanced_accuracy(samples) == 0.75
    assert balanced_accuracy(samples[:2]) is None
    assert balanced_accuracy([]) is None


def test_dead_latents_are_passed_over_and_wrong_ones_named(index: Index) -> None:
    dead = index.table("sae_delta")["density"].index(0)
    assert explain(index, OfflineClient(), "sae_delta", [dead]) == []
    with pytest.raises(FormatError, match="no latent 256"):
        explain(index, OfflineClient(), "sae_delta", [256])
    with pytest.raises(FormatError, match="sae_nope"):
        explain(index, OfflineClient(), "sae_nope", [0])


def test_export_for_delphi(index: Index, tmp_path: Path) -> None:
    explain(index, OfflineClient(), "sae_delta", [PLANTED_LATENT])
    assert export_delphi(index, tmp_path / "delphi") >= 1
    file = f"sae_delta_latent{PLANTED_LATENT}.txt"
    assert json.loads((tmp_path / "delphi/explanations" / file).read_text()) == f'tokens "{PLANTED.strip()}"'
    for name in ("detection", "fuzz"):
        samples = json.loads((tmp_path / "delphi/scores" / name / file).read_text())
        keys = {"str_tokens", "activations", "distance", "activating", "prediction", "probability", "correct"}
        assert all(set(sample) == keys for sample in samples)


class Endpoint(BaseHTTPRequestHandler):
    """A chat endpoint that repeats what it was sent."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/moved/chat/completions":
            self.send_response(307)
            self.send_header("Location", "/v1/chat/completions")
            self.end_headers()
            return
        self.send_response(200 if self.path == "/v1/chat/completions" else 503)
        self.end_headers()
        if self.path == "/odd/chat/completions":
            self.wfile.write(b"{}")
            return
        text = f"{self.headers.get('Authorization')} {body['model']} {body['messages'][1]['content']}"
        self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_endpoint_is_asked_with_the_key_of_the_environment(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-key")
    client = EndpointClient(f"{endpoint}/v1/", "judge", "SOME_KEY")
    assert client.complete("s", "u", 5) == "Bearer secret-key judge u"
    assert "secret-key" not in repr(vars(client))
    assert EndpointClient(f"{endpoint}/v1", "judge").complete("s", "u", 5) == "None judge u"


@pytest.mark.parametrize("path", ["moved", "missing"])
def test_an_endpoint_that_refuses_or_redirects(endpoint: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-key")
    with pytest.raises(HubError) as caught:
        EndpointClient(f"{endpoint}/{path}", "judge", "SOME_KEY").complete("s", "u", 5)
    assert "secret-key" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://example.com/v1", "ftp://127.0.0.1", "https://user:key@example.com", "example.com"]
)
def test_addresses_that_would_leak_a_key(url: str) -> None:
    with pytest.raises(FormatError):
        EndpointClient(url, "judge")


def test_a_missing_key_and_a_dead_endpoint_are_named() -> None:
    with pytest.raises(FormatError, match="NO_SUCH_KEY"):
        EndpointClient("https://example.com/v1", "judge", "NO_SUCH_KEY")
    with pytest.raises(HubError, match="out of reach"):
        EndpointClient("http://127.0.0.1:9/v1", "judge").complete("s", "u", 5)
