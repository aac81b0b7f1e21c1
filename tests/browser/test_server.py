"""What the server refuses, and how it says so; no browser needed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted_suite import PLANTED, PLANTED_LATENT
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from qwenscope.errors import FormatError
from qwenscope.features.browser.edge import BODY_LIMIT
from qwenscope.features.browser.export import export_site
from qwenscope.features.browser.server import make_app, page_files, serve
from qwenscope.features.continuation import generate, prompt_tokens
from qwenscope.features.form import unpack
from qwenscope.features.index import open_origin
from qwenscope.features.steering import Steering
from qwenscope.features.store import Index

JSON = {"Content-Type": "application/json"}
PUSH = {"sae": "sae_delta", "latent": PLANTED_LATENT, "strength": 1.0, "mode": "add", "unit": "max", "where": "all"}
STEER = {"pushes": [PUSH], "prompt": "order status", "tokens": 3}


@pytest.fixture(scope="module")
def client(app: ASGIApp) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1:8321") as opened:
        yield opened


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "", "[::1", "0.0.0.0", "a@b"]
)
def test_a_foreign_host_name_is_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/api/suite", "/page/app.js"):
        response = client.get(path, headers={"Host": host})
        assert response.status_code == 403
        assert "sae" not in response.text


@pytest.mark.parametrize("host", ["127.0.0.1:8321", "localhost", "LOCALHOST:80", "[::1]:9"])
def test_loopback_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/suite", headers={"Host": host}).status_code == 200


def test_every_answer_carries_the_policy(client: TestClient) -> None:
    for response in (
        client.get("/"),
        client.get("/api/suite"),
        client.get("/nothing"),
        client.get("/", headers={"Host": "x"}),
    ):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/page/../server.py",
        "/page/..%2fserver.py",
        "/page/%2e%2e%2f%2e%2e%2fstore.py",
        "/page//etc/passwd",
        "/page/..\\server.py",
        "/page/app.js%00.html",
        "/api/sae/../x",
        "/api/sae/%2e%2e%2findex.sqlite",
        "/api/latent/sae_delta/-1",
        "/api/latent/sae_delta/999999",
        "/api/latent/sae_delta/99999999999999999999999999",
        "/api/latent/%00/1",
        "/origin.json",
        "/index.sqlite",
        "/data/suite.json",
    ],
)
def test_path_tricks_find_nothing(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_pages_come_with_their_types_and_hold_nothing_inline(client: TestClient) -> None:
    for name, content in page_files().items():
        response = client.get("/" if name == "index.html" else f"/page/{name}")
        assert response.content == content
        text = content.decode()
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text
        assert "innerHTML" not in text
        assert " style=" not in text
        assert "<script>" not in text
    assert client.get("/page/app.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {**JSON, "Origin": "http://evil.example"},
        {**JSON, "Origin": "null"},
        {**JSON, "Sec-Fetch-Site": "cross-site"},
        {**JSON, "Sec-Fetch-Site": "same-site"},
    ],
)
def test_writes_from_elsewhere_are_refused(client: TestClient, headers: dict[str, str]) -> None:
    body = b'{"note": "x", "bookmarked": true}'
    assert client.put("/api/notes/sae_delta/1", content=body, headers=headers).status_code == 403
    assert _notes(client, 1) == []


def _notes(client: TestClient, latent: int) -> list[dict[str, Any]]:
    notes = [note for note in client.get("/api/notes").json() if note["latent"] == latent]
    assert all(isinstance(note.pop("label"), str) and isinstance(note.pop("peaks"), list) for note in notes)
    return notes


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"text": 1}', b'{"text": ""}', b"{}"]
)
def test_bodies_that_are_no_request(client: TestClient, body: bytes) -> None:
    for path in ("/api/read", "/api/steer"):
        response = client.post(path, content=body, headers=JSON)
        assert response.status_code == 400
        assert response.json()["error"]


def test_bodies_and_texts_have_a_limit(client: TestClient) -> None:
    response = client.post("/api/read", content=b'"' + b"a" * BODY_LIMIT + b'"', headers=JSON)
    assert (response.status_code, response.json()["error"]) == (400, "a request has at most 65,536 bytes")
    assert "at most 8,000 characters" in client.post("/api/read", json={"text": "a" * 8001}).json()["error"]
    note = {"note": "a" * 4001, "bookmarked": False}
    assert "at most 4,000 characters" in client.put("/api/notes/sae_delta/1", json=note).json()["error"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sae": "sae_nope"}, "sae_nope"),
        ({"sae": ["x"]}, "no latent"),
        ({"latent": 10**9}, "no latent 1000000000"),
        ({"latent": True}, "no latent"),
        ({"strength": "2"}, "strength"),
        ({"strength": 1e9}, "strength"),
        ({"mode": "melt"}, "melt"),
        ({"where": "nowhere"}, "nowhere"),
        ({"where": [1, 2]}, "where"),
        ({"unit": "miles"}, "unit"),
    ],
)
def test_a_wrong_push_is_named(client: TestClient, change: dict[str, Any], named: str) -> None:
    response = client.post("/api/steer", json=STEER | {"pushes": [PUSH, PUSH | change]})
    assert response.status_code in (400, 404)
    assert named in response.json()["error"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": 0}, "tokens"),
        ({"prompt": " "}, "no text"),
        ({"prompt": ["x"]}, "no text"),
        ({"pushes": []}, "pushes is a list of 1 to 8"),
        ({"pushes": [PUSH] * 9}, "pushes is a list of 1 to 8"),
        ({"pushes": PUSH}, "pushes is a list"),
        ({"pushes": ["x"]}, "a push is an object"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_steering_names_what_is_wrong(client: TestClient, change: dict[str, Any], named: str) -> None:
    response = client.post("/api/steer", json=STEER | change)
    assert response.status_code == 400
    assert named in response.json()["error"]


def test_reading_and_steering_answer(client: TestClient) -> None:
    read = client.post("/api/read", json={"text": f"order{PLANTED} status"}).json()
    assert read["saes"]["sae_delta"][0] == []
    at = read["tokens"].index(PLANTED)
    assert PLANTED_LATENT in [latent for latent, _ in read["saes"]["sae_delta"][at]]
    lines = client.post("/api/steer", json=STEER).text.splitlines()
    assert len(lines) > 5


def test_the_api_describes_itself(client: TestClient, app: ASGIApp) -> None:
    """Every route of it, each of its parameters, and nothing else."""
    found = client.get("/api").json()
    assert (found["openapi"], found["info"]["version"]) == ("3.0.3", "3")
    routes = [route for route in app._app.routes if route.path.startswith("/api")]  # type: ignore[attr-defined]
    assert set(found["paths"]) == {route.path for route in routes}
    for route in routes:
        for method in route.methods - {"HEAD"}:
            said = found["paths"][route.path][method.lower()]
            assert said["summary"]
            assert "200" in said["responses"]
            assert [p["name"] for p in said.get("parameters", []) if p["in"] == "path"] == list(route.param_convertors)
            assert ("requestBody" in said) == (method in ("POST", "PUT"))
    document = (Path(__file__).parents[2] / "docs/http-api.md").read_text()
    assert all(f"{route.path}`" in document or f"{route.path}?" in document for route in routes)


def test_latents_are_found_by_example(client: TestClient) -> None:
    texts = [f"{word}{6 * PLANTED} status" for word in ("order", "title", "query")]
    hits = client.post("/api/find", json={"texts": texts}).json()
    assert {"sae", "latent", "label", "texts", "share", "rate", "lift"} <= set(hits[0])
    assert len(hits) <= 50
    assert client.post("/api/find", json={"texts": texts, "but_not": texts}).json() == []
    for wrong in ({}, {"texts": []}, {"texts": "a"}, {"texts": [" "]}, {"texts": ["a"] * 41}, {"texts": [1]}):
        assert client.post("/api/find", json=wrong).status_code == 400


def test_what_a_latent_does_is_measured(client: TestClient) -> None:
    asked = {"sae": "sae_delta", "latents": [PLANTED_LATENT, 9]}
    scores = client.post("/api/output", json=asked).json()["scores"]
    assert len(scores) == 2
    assert all(0 <= x <= 1 for *score, _ in scores for x in score)
    assert client.get("/api/output/sae_delta").json() == []
    found = client.post("/api/loss", json={"sae": "sae_delta", "latent": PLANTED_LATENT}).json()
    assert found["positions"] >= found["conversations"] > 0
    assert found["interval"][0] <= found["change"] <= found["interval"][1]
    for path, wrong, said in (
        ("output", {"latents": []}, "list of 1 to 256"),
        ("output", {"latents": ["7"]}, "no latent"),
        ("loss", {"latent": 10**6}, "no latent"),
    ):
        response = client.post(f"/api/{path}", json={"sae": "sae_delta", **wrong})
        assert response.status_code in (400, 404)
        assert said in response.json()["error"]
    assert client.get("/api/output/sae_nope").status_code == 404


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"messages": []}, "at least one turn"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "turn 1 has the role 'wizard'"),
        ({"messages": [{"role": "user", "content": "x"}], "text": "x"}, "not both"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": {}}, "tools is a list"),
        ({"messages": [{"role": "user", "content": "x" * 40_000}]}, "at most 40,000 characters"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "non_text_content"),
        ({"conversation": -1}, "conversation is the address"),
        ({"conversation": 10**12}, "no conversation of the index begins"),
        ({}, "no text"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_named(client: TestClient, asked: dict[str, Any], said: str) -> None:
    response = client.post("/api/read", json=asked)
    assert response.status_code in (400, 404)
    assert said in response.json()["error"]
    assert "\n" not in response.json()["error"]


def test_a_kept_conversation_is_read_token_by_token(client: TestClient, index: Path) -> None:
    example = Index(index).latent("sae_delta", PLANTED_LATENT)["examples"][0]
    kept = client.get(f"/api/conversation/{example['start']}").json()
    found = client.post("/api/read", json={"conversation": example["start"]}).json()
    assert found["tokens"] == kept["tokens"]
    roles = client.get("/api/suite").json()["roles"]
    assert found["roles"] == [roles[code] for code in kept["roles"]]
    activation = dict(found["saes"]["sae_delta"][example["position"]])[PLANTED_LATENT]
    assert activation == pytest.approx(example["activations"][example["peak"]], rel=2e-3)
    assert client.get("/api/conversation/999999999").status_code == 404


def test_the_range_of_a_push_is_measured(client: TestClient) -> None:
    found = client.post("/api/range", json={"push": PUSH, "prompt": "order status", "tokens": 4}).json()
    strengths = [trial["strength"] for trial in found["trials"]]
    assert strengths == sorted(strengths)
    assert strengths[0] == 0 < strengths[1] < 0.05 < strengths[-1] == 4
    assert found["start"] in [*strengths, None]
    for wrong in ({"push": PUSH | {"mode": "ablate"}}, {"push": PUSH, "tokens": 0}, {"push": "x"}, {}):
        response = client.post("/api/range", json={"prompt": "order status", **wrong})
        assert response.status_code == 400


def test_several_latents_steer_together_as_in_python(client: TestClient, index: Path) -> None:
    pushes = [PUSH, {**PUSH, "sae": "sae_attn", "latent": 41, "mode": "clamp", "unit": "norm", "strength": 3}]
    lines = client.post("/api/steer", json=STEER | {"pushes": pushes}).text.splitlines()
    written = [json.loads(line) for line in lines]
    target = open_origin(index)
    lm = target.language_model()
    largest = Index(index).latent("sae_delta", PLANTED_LATENT)["max"]
    both = [
        Steering(1, 1.0, target.saes["sae_delta"], PLANTED_LATENT, unit=largest),
        Steering(3, 3.0, target.saes["sae_attn"], 41, "clamp"),
    ]
    expected = "".join(generate(lm, prompt_tokens(lm, "order status"), both, 3))
    assert "".join(piece["text"] for piece in written if piece["run"] == "steered") == expected
    effects = {piece["run"]: piece["effect"] for piece in written if piece["effect"] is not None}
    assert effects["steered"] > 1e-6


def test_notes_are_kept_replaced_and_removed(client: TestClient) -> None:
    put = lambda note, marked: client.put("/api/notes/sae_delta/3", json={"note": note, "bookmarked": marked})  # noqa: E731
    assert put("reads HTML", True).status_code == 200
    kept = {"sae": "sae_delta", "latent": 3, "note": "reads HTML", "bookmarked": True, "lists": []}
    assert _notes(client, 3) == [kept]
    put("", False)
    assert _notes(client, 3) == []
    assert client.put("/api/notes/sae_delta/300", json={"note": "x", "bookmarked": True}).status_code == 404
    assert client.put("/api/notes/nope/3", json={"note": "x", "bookmarked": True}).status_code == 404
    wrong: list[dict[str, Any]] = [
        {"note": 5, "bookmarked": True},
        {"bookmarked": 1},
        {"note": "x", "was": None},
        {"lists": ["a"]},
        {"lists": {"a": 1}},
        {"lists": {" ": True}},
        {"lists": {"a" * 101: True}},
        {"note": "a" * 4001},
        {"nope": 1},
    ]
    for change in wrong:
        assert client.put("/api/notes/sae_delta/3", json=change).status_code == 400, change
    assert _notes(client, 3) == []


def test_a_note_that_its_writer_has_not_seen_is_not_replaced(client: TestClient) -> None:
    path = "/api/notes/sae_delta/5"
    assert client.put(path, json={"note": "first", "was": ""}).json()["note"] == "first"
    late = client.put(path, json={"note": "second", "was": "", "bookmarked": True, "lists": {"later": True}})
    assert (late.status_code, late.json()["note"]) == (409, "first")
    assert _notes(client, 5) == [{"sae": "sae_delta", "latent": 5, "note": "first", "bookmarked": False, "lists": []}]
    marked = client.put(path, json={"bookmarked": True, "lists": {" later ": True, "other": False}})
    assert marked.json() == {"sae": "sae_delta", "latent": 5, "note": "first", "bookmarked": True, "lists": ["later"]}
    assert client.put(path, json={"note": "second", "was": "first"}).json()["lists"] == ["later"]
    client.put(path, json={"note": "", "bookmarked": False})
    (left,) = _notes(client, 5)
    assert (left["note"], left["lists"]) == ("", ["later"])
    client.put(path, json={"lists": {"later": False}})
    assert _notes(client, 5) == []


def test_search_is_served(client: TestClient) -> None:
    hits = client.get("/api/search", params={"q": PLANTED}).json()
    assert (hits[0]["sae"], hits[0]["latent"]) == ("sae_delta", PLANTED_LATENT)
    assert client.get("/api/search", params={"q": PLANTED, "sae": "nope"}).status_code == 404


def test_serving_needs_an_index_and_a_free_port(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"index\.sqlite"):
        make_app(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(FormatError, match="--port"):
            serve(index, taken.getsockname()[1])
    with pytest.raises(FormatError, match="--port"):
        serve(index, 70_000)


def test_an_export_holds_no_path_of_this_machine_and_overwrites_nothing(
    index: Path, exported: Path, tmp_path: Path
) -> None:
    files = list(exported.rglob("*.json.z"))
    assert len(files) > 30
    for path in files:
        assert str(index.parent) not in json.dumps(unpack(path.read_bytes()))
    assert not list(exported.rglob("origin.json")) + list(exported.rglob("*.sqlite"))
    (tmp_path / "kept").touch()
    with pytest.raises(FormatError, match="not empty"):
        export_site(index, tmp_path)


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, "/", 200),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"}, "/", 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, "/", 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, "/api/suite", 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, "/", 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Host": "evil.example"}, "/", 403),
    ],
)
def test_links_from_other_pages_open_the_page_and_nothing_else(
    client: TestClient, headers: dict[str, str], path: str, status: int
) -> None:
    assert client.get(path, headers=headers).status_code == status


@pytest.mark.parametrize("text", ["\\ud800", "a\\udfffb", "\\u0000"])
def test_text_that_is_none_is_refused_at_the_edge(client: TestClient, text: str) -> None:
    push = json.dumps(PUSH)
    for method, path, body in (
        ("PUT", "/api/notes/sae_delta/3", f'{{"note": "{text}", "bookmarked": true}}'),
        ("POST", "/api/read", f'{{"text": "{text}"}}'),
        ("POST", "/api/steer", f'{{"prompt": "{text}", "pushes": [{push}]}}'),
        ("POST", "/api/steer", f'{{"prompt": "a", "{text}": 1, "pushes": [{push}]}}'),
        ("POST", "/api/read", '{"text": "a", "seed": NaN}'),
        ("POST", "/api/read", '{"text": "a", "seed": 1e999}'),
    ):
        response = client.request(method, path, content=body.encode(), headers=JSON)
        assert response.status_code == 400
        assert "\n" not in response.json()["error"]
    assert client.get("/api/search?q=%00").status_code == 400
    assert client.get("/api/search?q=%ED%A0%80").status_code == 200
    assert client.get("/api/search", params={"q": "a" * 1001}).status_code == 400
    assert client.get(f"/api/latent/sae_delta/{'9' * 5000}").status_code == 404
