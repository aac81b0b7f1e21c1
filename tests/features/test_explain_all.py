"""Labels for many latents at once: against an endpoint that fails in every way, stopped and gone on with."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_run import context, start_server
from typer.testing import CliRunner

from qwenscope import hub
from qwenscope.cli.main import app
from qwenscope.errors import HubError, LockError
from qwenscope.features.clients import EndpointClient, OfflineClient, Remembering
from qwenscope.features.label import chosen, explain, foresee
from qwenscope.features.store import Index, explaining, read_explanations

LATENTS = "0-40"


class Judge(BaseHTTPRequestHandler):
    """Answers by the offline rule, unless the server's `fault` says otherwise; counts what it answered."""

    server: JudgeServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            tried = self.server.tried[body]
            self.server.tried[body] += 1
            fault = self.server.fault(len(self.server.tried), tried)
            if fault is None:
                self.server.answered[body] += 1
            stop = 0 < self.server.stop_at <= len(self.server.answered)
        if stop:
            self.server.reached.set()
            self.server.go_on.wait(60)
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        asked = json.loads(body)
        text = OfflineClient().complete("", asked["messages"][1]["content"], asked["max_tokens"])
        if fault == "half":
            text += "\ud83d"
        answer = json.dumps({"choices": [{"message": {"content": text}}]})
        self.wfile.write(
            answer[: 20 if fault == "torn" else None].encode() if fault != "html" else b"<html>busy</html>"
        )

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class JudgeServer(ThreadingHTTPServer):
    """An endpoint on loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Judge)
        self.lock, self.reached, self.go_on = threading.Lock(), threading.Event(), threading.Event()
        self.fault: Callable[[int, int], int | str | None] = lambda number, tried: None
        self.tried, self.answered = Counter[bytes](), Counter[bytes]()
        self.stop_at = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setattr(hub, "PAUSES", (0.0,) * 5)
    with JudgeServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def index(index: Index, tmp_path: Path) -> Index:
    return Index(shutil.copytree(index.folder, tmp_path / "index"))


def labels(index: Index, client: str) -> dict[tuple[str, int], Any]:
    return {
        (sae_id, n): {key: value for key, value in record.items() if key != "client"}
        for sae_id, n, record in read_explanations(index)
        if record["client"] == client
    }


def test_faults_are_tried_again_and_many_at_once_give_what_one_after_the_other_gives(
    index: Index, judge: JudgeServer, tmp_path: Path
) -> None:
    plain = Index(shutil.copytree(index.folder, tmp_path / "plain"))
    for _ in explain(plain, OfflineClient(), chosen(plain, LATENTS)):
        pass
    faults = (429, None, 500, "html", None, "torn", 503)
    judge.fault = lambda number, tried: faults[number % 7] if tried < 2 else None
    places = chosen(index, LATENTS)
    seen: list[int] = []
    client = EndpointClient(judge.url, "judge")
    records = list(explain(index, client, places, concurrency=8, on_progress=lambda _, done, total: seen.append(done)))
    assert sorted((record["sae"], record["latent"]) for record in records) == sorted(places)
    assert seen == list(range(1, len(places) + 1))
    assert labels(index, "judge") == labels(plain, "offline rule") != {}
    assert set(judge.answered.values()) == {1}
    assert max(judge.tried.values()) == 3
    assert not (index.folder / ".explain").exists()
    assert Index(index.folder).labels("sae_delta")  # the checksums are true


def test_what_it_will_cost_is_what_it_costs(index: Index, judge: JudgeServer) -> None:
    places = chosen(index, LATENTS)[:30]  # all of them are looked at
    cost = foresee(index, places)
    list(explain(index, EndpointClient(judge.url, "judge"), places, concurrency=4))
    asked = [json.loads(body) for body in judge.answered.elements()]
    characters = sum(len(message["content"]) for body in asked for message in body["messages"])
    assert (cost.latents, cost.requests) == (30, len(asked))
    assert cost.tokens_out == sum(body["max_tokens"] for body in asked)
    assert cost.tokens_in == pytest.approx(characters / 4, rel=0.05)


def run_to_the_end(folder: Path, url: str) -> None:
    list(explain(Index(folder), EndpointClient(url, "judge"), chosen(Index(folder), LATENTS), concurrency=4))


def test_who_was_killed_goes_on_and_asks_nothing_again(index: Index, judge: JudgeServer) -> None:
    start_server()
    judge.stop_at = 60
    process = context.Process(target=run_to_the_end, args=(index.folder, judge.url))
    process.start()
    assert judge.reached.wait(60)
    with pytest.raises(LockError):
        run_to_the_end(index.folder, judge.url)
    process.kill()
    process.join()
    in_flight = 4  # answers that were under way count as asked, and may be asked again
    judge.stop_at = 0
    judge.go_on.set()
    before = Counter(judge.answered)
    run_to_the_end(index.folder, judge.url)
    assert sum(judge.answered[body] - count for body, count in before.items()) <= in_flight
    assert len(labels(index, "judge")) == len(chosen(index, LATENTS))
    asked = judge.answered.total()
    run_to_the_end(index.folder, judge.url)
    assert judge.answered.total() == asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_is_stopped_keeps_the_answers_under_way_and_asks_none_twice(
    index: Index, judge: JudgeServer, number: signal.Signals
) -> None:
    judge.stop_at = 60
    options = ["--latents", LATENTS, "--endpoint", judge.url, "--model", "judge", "--concurrency", "4"]
    command = [sys.executable, "-m", "qwenscope", "explain", str(index.folder), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert judge.reached.wait(60)
    process.send_signal(number)
    judge.stop_at = 0
    judge.go_on.set()
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, "the same command goes on" in said) == (128 + number, True)
    assert len(labels(index, "judge")) < len(chosen(index, LATENTS))
    run_to_the_end(index.folder, judge.url)
    assert len(labels(index, "judge")) == len(chosen(index, LATENTS))
    assert set(judge.answered.values()) == {1}


def test_a_question_is_asked_once_however_many_ask_it_at_once(judge: JudgeServer, tmp_path: Path) -> None:
    judge.stop_at = 1  # the first answer comes when all have asked
    asked = Remembering(EndpointClient(judge.url, "judge"), tmp_path / "answers.jsonl", lambda: False)
    with closing(asked), ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(asked.complete, "system", "<<word>>", 9) for _ in range(4)]
        assert judge.reached.wait(60)
        judge.go_on.set()
        assert {answer.result() for answer in answers} == {'tokens "word"'}
    assert judge.answered.total() == 1


def test_half_an_emoji_in_an_answer_does_no_harm(index: Index, judge: JudgeServer) -> None:
    judge.fault = lambda number, tried: "half"
    places = chosen(index, "0-3", ["sae_delta"])
    for record in explain(index, EndpointClient(judge.url, "judge"), places):
        assert record["label"].endswith("?")
    assert set(labels(Index(index.folder), "judge")) == set(places)


def test_of_a_label_that_cannot_be_stored_no_half_is_kept(index: Index) -> None:
    before = index.latent("sae_delta", 3)["explanation"]
    with pytest.raises(UnicodeEncodeError), explaining(index) as add:
        add("sae_delta", 3, {"label": "\ud83d", "client": "nobody"})
    assert Index(index.folder).latent("sae_delta", 3)["explanation"] == before


def test_answers_are_kept_while_another_client_labels(index: Index, judge: JudgeServer) -> None:
    places = chosen(index, LATENTS)
    asked = iter(explain(index, EndpointClient(judge.url, "judge"), places, stop=lambda: len(judge.answered) > 20))
    assert len(list(asked)) < len(places)
    list(explain(index, OfflineClient(), chosen(index, "50-52")))
    list(explain(index, EndpointClient(judge.url, "judge"), places))
    assert set(judge.answered.values()) == {1}
    assert not (index.folder / ".explain").exists()


def test_the_rule_replaces_no_label_that_someone_wrote(index: Index, judge: JudgeServer) -> None:
    list(explain(index, EndpointClient(judge.url, "judge"), chosen(index, "0-3")))
    written = labels(index, "judge")
    list(explain(index, OfflineClient(), chosen(index, "0-9")))
    assert labels(index, "judge") == written
    assert len(labels(index, "offline rule")) == len(chosen(index, "0-9")) - len(written)


def test_a_disk_that_takes_no_more_is_one_line(index: Index) -> None:
    most = index.path.stat().st_size
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    command = [sys.executable, "-m", "qwenscope", "explain", str(index.folder)]
    ended = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert ended.returncode not in (0, 1)
    assert "Traceback" not in ended.stderr
    assert str(index.folder) in ended.stderr.splitlines()[-1]
    assert Index(index.folder).labels("sae_delta")


def test_an_endpoint_that_stays_down_ends_it_with_what_was_done_kept(index: Index, judge: JudgeServer) -> None:
    places = chosen(index, LATENTS)
    records = explain(index, EndpointClient(judge.url, "judge"), places)
    done = [next(records) for _ in range(5)]
    judge.fault = lambda number, tried: 502
    with pytest.raises(HubError, match="still so after 5 more tries"):
        list(records)
    judge.fault = lambda number, tried: None
    assert len(labels(index, "judge")) >= len(done)
    list(explain(index, EndpointClient(judge.url, "judge"), places))
    assert len(labels(index, "judge")) == len(places)
    assert set(judge.answered.values()) == {1}


def test_the_command_says_what_it_costs_and_what_it_did(index: Index, judge: JudgeServer) -> None:
    def call(*options: str) -> str:
        return CliRunner().invoke(app, ["explain", str(index.folder), *options], catch_exceptions=False).output

    asked = ["--latents", "top:4", "--endpoint", judge.url, "--model", "judge"]
    said = call(*asked)
    assert "8 latents to label by judge: about 24 requests" in said.replace("23", "24").replace("22", "24")
    assert "labelled 8 latents" in said
    assert said.count("detection") == 8
    assert "0 latents to label by judge (8 more are labelled already)" in call(*asked)
