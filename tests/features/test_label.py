"""Labels and scores: the offline rule end to end, hand-made clients for the arithmetic, an endpoint on loopback."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_suite import PLANTED, PLANTED_LATENT
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenscope import hub
from qwenscope.corpus.chat import with_template
from qwenscope.errors import FormatError, HubError, ModelError
from qwenscope.features.clients import Client, EndpointClient, LocalClient, OfflineClient
from qwenscope.features.continuation import generate
from qwenscope.features.delphi import export_delphi
from qwenscope.features.label import chosen, explain
from qwenscope.features.questions import balanced_accuracy
from qwenscope.features.store import Index
from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.opening import open_target
from qwenscope.recipe import load_recipe

DELPHI_SAMPLE = {"str_tokens", "activations", "distance", "activating", "prediction", "probability", "correct"}


@pytest.fixture
def index(index: Index, tmp_path: Path) -> Index:
    """A copy: what a client has labelled, it does not label again."""
    return Index(shutil.copytree(index.folder, tmp_path / "index"))


def label(index: Index, client: Client, sae_id: str, *latents: int) -> list[dict[str, Any]]:
    return list(explain(index, client, [(sae_id, latent) for latent in latents]))


def test_the_planted_latent_is_named_found_and_scored(index: Index) -> None:
    (record,) = label(index, OfflineClient(), "sae_delta", PLANTED_LATENT)
    assert record["label"] == f'tokens "{PLANTED.strip()}"'
    assert record["fuzzing"] == 1.0
    assert record["detection"] >= 0.75  # the word also stands where the latent is not among the k strongest
    shown = index.latent("sae_delta", PLANTED_LATENT)["explanation"]
    assert shown == {key: record[key] for key in ("label", "client", "detection", "fuzzing", "unparsed")}
    by_rule = {latent: text for latent, text in index.labels("sae_delta").items() if text.startswith("by rule: ")}
    assert index.labels("sae_delta") == by_rule | {PLANTED_LATENT: record["label"]}  # it replaces the rule's
    assert PLANTED_LATENT not in by_rule
    hit = index.search("tokens")[0]
    assert (hit["latent"], hit["label"]) == (PLANTED_LATENT, record["label"])
    assert label(index, OfflineClient(), "sae_delta", PLANTED_LATENT) == []  # is done


def test_samples_are_what_the_index_shows(index: Index) -> None:
    (record,) = label(index, OfflineClient(), "sae_attn", 41)
    examples = {tuple(e["tokens"]): e for e in index.latent("sae_attn", 41)["examples"]}
    assert {s["activating"] for s in record["samples"]["detection"]} == {True, False}
    for sample in record["samples"]["detection"]:
        example = examples[tuple(sample["str_tokens"])]
        assert sample["activations"] == example["activations"]
        assert sample["activating"] == (max(example["activations"]) > 0)
        assert sample["correct"] == (sample["prediction"] == sample["activating"])


def test_no_text_is_both_shown_and_tested(index: Index) -> None:
    client = Asked()
    label(index, client, "sae_attn", 41)
    (shown, detection, fuzzing) = client.asked
    shown_texts = shown.replace("<<", "").replace(">>", "").split("\n\nText ")
    texts = [text.partition(":\n")[2] for text in shown_texts]
    assert len(texts) == len(set(texts)) > 1
    for asked in (detection, fuzzing.replace("<<", "").replace(">>", "")):
        tested = asked.partition("\n\n")[2]
        assert "Text 1:\n" in tested
        assert not any(text and text in tested for text in texts)


class Asked:
    """A client that keeps what it is asked."""

    name = "asked"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def complete(self, system: str, user: str, max_tokens: int) -> str:
        self.asked.append(user)
        return "<think>\nwell\n</think>\n\nlabel"


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


@pytest.mark.parametrize(
    ("answer", "score", "unparsed"),
    [("I think ONES.", 0.5, []), *((text, None, ["detection", "fuzzing"]) for text in ("no idea", "[1, 0, 2]", ""))],
)
def test_always_yes_is_chance_and_nonsense_is_no_score(
    index: Index, answer: str, score: float | None, unparsed: list[str]
) -> None:
    (record,) = label(index, Answers(answer), "sae_delta", PLANTED_LATENT)
    assert (record["label"], record["detection"], record["fuzzing"]) == ("a label", score, score)
    assert record["unparsed"] == unparsed


def test_without_a_label_nothing_is_stored(index: Index) -> None:
    class Silent(Answers):
        def complete(self, system: str, user: str, max_tokens: int) -> str:
            return '" "'

    before = index.latent("sae_delta", PLANTED_LATENT)["explanation"]
    (record,) = label(index, Silent(""), "sae_delta", PLANTED_LATENT)
    assert (record["label"], record["unparsed"], record["samples"]) == ("", ["label"], {})
    assert index.latent("sae_delta", PLANTED_LATENT)["explanation"] == before


def test_balanced_accuracy_by_hand() -> None:
    samples = [{"activating": a, "correct": c} for a, c in [(True, True), (True, False), (False, True), (False, True)]]
    assert balanced_accuracy(samples) == 0.75
    assert balanced_accuracy(samples[:2]) is None
    assert balanced_accuracy([]) is None


def test_dead_latents_are_passed_over_and_wrong_ones_named(index: Index) -> None:
    dead = index.table("sae_delta")["density"].index(0)
    assert chosen(index, str(dead), ["sae_delta"]) == []
    with pytest.raises(FormatError, match="no latent 256"):
        chosen(index, "0-256", ["sae_delta"])
    with pytest.raises(FormatError, match="sae_nope"):
        chosen(index, "all", ["sae_nope"])
    with pytest.raises(FormatError, match="no latent 256"):
        label(index, OfflineClient(), "sae_delta", 256)


def test_latents_are_chosen_by_number_by_range_and_by_how_often_they_fire(index: Index) -> None:
    density = {sae_id: index.table(sae_id)["density"] for sae_id in index.saes}
    alive = [(sae_id, n) for sae_id, shares in density.items() for n, share in enumerate(shares) if share > 0]
    assert chosen(index) == alive
    assert chosen(index, "5-9, 3", ["sae_attn"]) == [p for n in (5, 6, 7, 8, 9, 3) if (p := ("sae_attn", n)) in alive]
    top = chosen(index, "top:5")
    assert [sae_id for sae_id, _ in top] == ["sae_attn"] * 5 + ["sae_delta"] * 5 or len(top) == 10
    for sae_id, shares in density.items():
        mine = [shares[n] for id, n in top if id == sae_id]
        assert sorted(mine, reverse=True) == sorted(shares, reverse=True)[:5]
    for wrong in ("9-3", "", "some", "top:", "3..5", "-3"):
        with pytest.raises(FormatError, match="--latents"):
            chosen(index, wrong)


def read_as_delphi(results: Path, hook_points: list[str]) -> list[dict[str, Any]]:
    """All score files, the way delphi's analysis finds and reads them."""
    rows = []
    for folder in (results / "scores").iterdir():
        for hook_point in hook_points:
            for path in folder.glob(f"*{hook_point}*"):
                latent = int(path.stem.split("latent")[-1])
                for sample in json.loads(path.read_bytes()):
                    assert set(sample) == DELPHI_SAMPLE
                    assert len(sample["str_tokens"]) == len(sample["activations"])
                    rows.append({"score": folder.name, "hook_point": hook_point, "latent": latent, **sample})
    return rows


def delphi_accuracy(samples: list[dict[str, Any]]) -> float:
    """Class-balanced accuracy as delphi's analysis computes it: samples without prediction are left out."""
    valid = [sample for sample in samples if sample["prediction"] is not None]
    sides = [[s for s in valid if s["activating"] is side] for side in (True, False)]
    return sum(sum((s["prediction"] >= 0.5) is s["activating"] for s in side) / len(side) for side in sides) / 2


def test_delphi_reads_its_export_as_we_score_it(index: Index, tmp_path: Path) -> None:
    alive = [latent for latent, density in enumerate(index.table("sae_delta")["density"]) if density > 0.01]
    records = label(index, OfflineClient(), "sae_delta", PLANTED_LATENT, *alive[:2])
    records += label(index, OfflineClient(), "sae_attn", 41)
    results = tmp_path / "delphi"
    assert export_delphi(index, results) >= 3
    hook_points = json.loads((results / "run_config.json").read_text())["hookpoints"]
    assert hook_points == ["layers.3.sae_attn", "layers.1.sae_delta"]
    counts = torch.load(results / "log" / "hookpoint_firing_counts.pt", weights_only=True)
    rows = read_as_delphi(results, hook_points)
    for record in records:
        name = {"sae_attn": hook_points[0], "sae_delta": hook_points[1]}[record["sae"]]
        file = results / "explanations" / f"{name}_latent{record['latent']}.txt"
        assert json.loads(file.read_bytes()) == record["label"]
        for kind, score in (("detection", "detection"), ("fuzz", "fuzzing")):
            mine = [r for r in rows if (r["score"], r["hook_point"], r["latent"]) == (kind, name, record["latent"])]
            if record[score] is None:
                assert mine == []
                continue
            assert [(r["str_tokens"], r["prediction"]) for r in mine] == [
                (s["str_tokens"], s["prediction"]) for s in record["samples"][score]
            ]
            assert delphi_accuracy(mine) == pytest.approx(record[score])
        assert counts[name][record["latent"]] == index.latent(record["sae"], record["latent"])["fired"]


def test_a_hook_point_is_no_part_of_another() -> None:
    names = {sae_id: f"layers.{point.layer}.{sae_id}" for sae_id, point in load_recipe("standin").hook_points.items()}
    assert len(names) == 9
    assert not any(a in b for a in names.values() for b in names.values() if a != b)


@pytest.mark.parametrize("which", ["tiny", pytest.param("standin", marks=pytest.mark.slow)])
def test_a_local_model_writes_and_scores(index: Index, release: Path, which: str) -> None:
    folder = str(STANDIN_FOLDER) if which == "standin" else open_target(release).recipe.lm.model
    client = LocalClient(folder, device="cpu")
    assert client.complete("Be brief.", "Hello", 4) == client.complete("Be brief.", "Hello", 4)
    longer = client.complete("Be brief.", "Hello", 9)
    assert longer.startswith(client.complete("Be brief.", "Hello", 4))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_tensors": "pt"}
    ids = tokenizer.apply_chat_template(messages, **options)
    written = model.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True) == longer
    (record,) = label(index, client, "sae_delta", PLANTED_LATENT)
    assert record["client"] == folder
    assert 0 < len(record["label"]) <= 300
    assert len(record["samples"]["detection"]) > 10
    assert not {"label"} & set(record["unparsed"])


def test_a_local_model_without_system_turns_gets_the_words_in_the_users(release: Path) -> None:
    client = LocalClient(open_target(release).recipe.lm.model, device="cpu")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    client._lm = replace(
        client._lm, tokenizer=with_template(client._lm.tokenizer, refusing + "{{ messages[0].content }}")
    )
    whole = client._lm.tokenizer("Be brief.\n\nHello").input_ids
    assert client._tokens({"role": "user", "content": "Be brief.\n\nHello"}) == whole
    assert client.complete("Be brief.", "Hello", 3) == "".join(generate(client._lm, whole, [], 3))
    client._lm = replace(client._lm, tokenizer=with_template(client._lm.tokenizer, "{{ raise_exception('never') }}"))
    with pytest.raises(FormatError, match="refuses a user's turn: never"):
        client.complete("Be brief.", "Hello", 3)


def test_a_local_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        LocalClient(str(tmp_path / "nowhere"))


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
    monkeypatch.setattr(hub, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("SOME_KEY", "secret-key")
    with pytest.raises(HubError) as caught:
        EndpointClient(f"{endpoint}/{path}", "judge", "SOME_KEY").complete("s", "u", 5)
    assert "secret-key" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/v1",
        "ftp://127.0.0.1",
        "https://user:key@example.com",
        "example.com",
        "http://127.0.0.1:bad/v1",
        "http://127.0.0.1:99999/v1",
        "http://127.0.0.1:9/v 1",
        "http://[::1/v1",
        "http://127.0.0.1:9/\u00e9",
    ],
)
def test_addresses_that_are_none_or_would_leak_a_key(url: str) -> None:
    with pytest.raises(FormatError):
        EndpointClient(url, "judge")


@pytest.mark.parametrize("key", ["sk-secret\r", "sk-secret\nmore", "sk secret", "sk-s\u00e9cret"])
def test_a_key_that_no_header_takes_is_named_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(FormatError, match="SOME_KEY") as named:
        EndpointClient("https://example.com/v1", "judge", "SOME_KEY")
    assert "cret" not in str(named.value)


def test_a_missing_key_and_a_dead_endpoint_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PAUSES", (0.0, 0.0))
    with pytest.raises(FormatError, match="NO_SUCH_KEY"):
        EndpointClient("https://example.com/v1", "judge", "NO_SUCH_KEY")
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9.*refused; still so after 2 more tries"):
        EndpointClient("http://127.0.0.1:9/v1", "judge").complete("s", "u", 5)
