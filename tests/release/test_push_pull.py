"""Push and pull over real HTTP: whole or not at all, resumed, idempotent, without a word about the token."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from exact_saes import exact_rows, exact_sae, same
from made_run import POINTS
from writable_hub import TOKEN, WritableHub

from qwenscope import TopKSAE, load_suite
from qwenscope.errors import FormatError, HubError
from qwenscope.hub import redact
from qwenscope.release.package import bind
from qwenscope.release.push import pull, push

REPO = "org/saes"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_pushed_is_what_is_pulled(released: Path, hub: WritableHub, tmp_path: Path) -> None:
    lines = push(released, REPO)
    assert hub.head(REPO) == contents(released)
    assert list(hub.tags[REPO]) == ["v1"]
    assert "tagged v1" in lines[-1]
    assert f'from_pretrained("{REPO}"' in (released / "README.md").read_text()
    for revision in (None, "v1"):
        pull(REPO, tmp_path / f"pulled-{revision}", revision=revision)
        assert contents(tmp_path / f"pulled-{revision}") == contents(released)
    assert list(load_suite(tmp_path / "pulled-v1")) == sorted(POINTS)


def test_a_second_push_and_a_second_pull_change_nothing(released: Path, hub: WritableHub, tmp_path: Path) -> None:
    push(released, REPO)
    before = (len(hub.commits[("models", REPO)]), dict(hub.tags[REPO]))
    hub.requests.clear()
    assert "has this release already" in push(released, REPO)[-1]
    assert not [path for path in hub.requests if "commit" in path or path.startswith("/lfs/")]
    assert (len(hub.commits[("models", REPO)]), dict(hub.tags[REPO])) == before
    pull(REPO, tmp_path / "out")
    hub.requests.clear()
    pull(REPO, tmp_path / "out")
    assert not [path for path in hub.requests if "/resolve/" in path]


def test_a_dry_run_sends_nothing(released: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = contents(released)
    lines = push(released, REPO, dry_run=True)
    assert {line.split()[-1] for line in lines[:-1]} == set(before)
    assert hub.requests == []
    assert contents(released) == before


def test_files_that_the_release_lacks_are_removed(released: Path, hub: WritableHub) -> None:
    hub.add("models", REPO, {".gitattributes": b"x", "old_sae/weights.safetensors": b"old", "README.md": b"old"})
    push(released, REPO)
    assert hub.head(REPO) == contents(released)
    assert ".gitattributes" in hub.commits[("models", REPO)][-1][1]


FAULTS = ["/api/repos/create", "/refs", "/preupload/", "/objects/batch", "/lfs/", "/commit/", "/tree/", "/tag/"]


@pytest.mark.parametrize("words", FAULTS)
def test_push_survives_every_fault_at_every_request(released: Path, hub: WritableHub, words: str) -> None:
    hub.fail(words, 503, 429, 500, "reset")
    push(released, REPO)
    assert not hub.faults
    assert hub.head(REPO) == contents(released)
    assert len(hub.commits[("models", REPO)]) == 2  # the empty repository, and the release
    assert list(hub.tags[REPO]) == ["v1"]


@pytest.mark.parametrize("words", ["after /api/repos/create", "/commit/", "/tag/"])
def test_push_survives_answers_that_get_lost(released: Path, hub: WritableHub, words: str) -> None:
    hub.fail(words if words.startswith("after") else f"after /api/models/{REPO}{words}", "lost")
    push(released, REPO)
    assert not hub.faults
    assert hub.head(REPO) == contents(released)
    assert len(hub.commits[("models", REPO)]) == 2
    assert list(hub.tags[REPO]) == ["v1"]


@pytest.mark.parametrize("words", ["/api/models/", "/tree/", "weights.safetensors", "README.md"])
def test_pull_survives_faults(released: Path, hub: WritableHub, tmp_path: Path, words: str) -> None:
    push(released, REPO)
    hub.fail(words, 503, "reset", 429, "truncate")
    pull(REPO, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(released)


def test_pull_that_gives_up_leaves_nothing_final_and_goes_on_later(
    released: Path, hub: WritableHub, tmp_path: Path
) -> None:
    push(released, REPO)
    hub.fail("saelens/sae_attn_mid/sae_weights.safetensors", *[503] * 60)
    with pytest.raises(HubError, match="org/saes at main"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    hub.requests.clear()
    pull(REPO, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(released)
    fetched = {path for path in hub.requests if "/resolve/" in path}
    assert len(fetched) < len(contents(released)) / 2  # the rest had arrived before


def test_a_push_that_gives_up_shows_nothing(released: Path, hub: WritableHub) -> None:
    hub.fail("/commit/", *[500] * 60)
    with pytest.raises(HubError, match="org/saes"):
        push(released, REPO)
    assert hub.head(REPO) == {}
    assert hub.tags == {}
    hub.faults.clear()
    hub.requests.clear()
    push(released, REPO)
    assert hub.head(REPO) == contents(released)
    assert not [path for path in hub.requests if path.startswith("/lfs/")]  # all large files were there


PUSH = (
    "import sys; from pathlib import Path; "
    "from qwenscope.release.push import push; push(Path(sys.argv[1]), sys.argv[2])"
)


def environment(hub: WritableHub, tmp_path: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("instant", [("/lfs/", 2), ("/commit/", 1), pytest.param(("/lfs/", 5), marks=pytest.mark.slow)])
def test_a_kill_between_files_shows_nothing_and_the_next_push_goes_on(
    released: Path, hub: WritableHub, tmp_path: Path, instant: tuple[str, int]
) -> None:
    words, count = instant
    bind(released, REPO)
    states: list[tuple[int, bool]] = []
    process = subprocess.Popen(
        [sys.executable, "-c", PUSH, str(released), REPO], env=environment(hub, tmp_path), stderr=subprocess.PIPE
    )

    def kill(path: str) -> None:
        states.append((len(hub.commits.get(("models", REPO), [])), bool(hub.tags.get(REPO))))
        if sum(words in seen for seen in hub.requests if not seen.startswith("after")) == count and words in path:
            process.send_signal(signal.SIGKILL)
            process.wait()

    hub.seen = kill
    assert process.wait() == -signal.SIGKILL, process.stderr
    hub.seen = lambda path: None
    for files in (commit[1] for commit in hub.commits[("models", REPO)]):
        visible = {name: data for name, data in files.items() if name != ".gitattributes"}
        assert visible in ({}, contents(released))
    assert not any(tagged for _, tagged in states)
    assert hub.tags == {}
    stored = set(hub.stored)
    hub.requests.clear()
    push(released, REPO)
    assert hub.head(REPO) == contents(released)
    assert list(hub.tags[REPO]) == ["v1"]
    assert not {f"/lfs/{oid}" for oid in stored} & set(hub.requests)


PUBLISHED_SNIPPET = """
import json
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

repo_id = "org/saes"
sae_id = "sae_attn_mid"

config_path = hf_hub_download(repo_id, f"{sae_id}/config.json")
weights_path = hf_hub_download(repo_id, f"{sae_id}/weights.safetensors")

with open(config_path) as f:
    config = json.load(f)
print(config)

weights = load_file(weights_path)
print(weights.keys())
"""


def test_the_published_cards_snippet_runs_as_it_is(released: Path, hub: WritableHub, tmp_path: Path) -> None:
    push(released, REPO)
    done = subprocess.run(
        [sys.executable, "-c", PUBLISHED_SNIPPET], env=environment(hub, tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    config, keys = done.stdout.splitlines()
    assert "'hidden_dim': 16, 'dict_size': 64, 'k': 6" in config
    for name in ("encoder.weight", "encoder.bias", "decoder.weight", "pre_bias"):
        assert f"'{name}'" in keys


def test_saes_load_straight_from_the_hub(released: Path, hub: WritableHub) -> None:
    push(released, REPO)
    seed = list(POINTS).index("sae_attn_mid")
    for revision in (None, "v1"):
        assert same(TopKSAE.from_pretrained(REPO, "sae_attn_mid", revision=revision), exact_sae(seed), exact_rows())
    assert list(load_suite(REPO, revision="v1")) == sorted(POINTS)
    with pytest.raises(
        FormatError, match=r"has no SAE 'sae_x' \(it has sae_attn_mid, sae_delta_mid, sae_delta_mid_pos1\)"
    ):
        TopKSAE.from_pretrained(REPO, "sae_x")
    with pytest.raises(FormatError, match="say which SAE"):
        TopKSAE.from_pretrained(REPO)
    with pytest.raises(HubError, match="no such revision"):
        TopKSAE.from_pretrained(REPO, "sae_attn_mid", revision="v9")
    with pytest.raises(HubError, match="org/other at main does not exist on the Hub or is private"):
        TopKSAE.from_pretrained("org/other", "sae_attn_mid")


def test_loading_from_the_hub_retries(released: Path, hub: WritableHub) -> None:
    push(released, REPO)
    hub.fail("sae_attn_mid/weights.safetensors", 503, "reset", 429)
    hub.fail(f"/api/models/{REPO}", 500, "reset")
    TopKSAE.from_pretrained(REPO, "sae_attn_mid")
    assert not hub.faults


def test_a_missing_file_on_the_hub_is_named(hub: WritableHub) -> None:
    hub.add("models", REPO, {"sae_a/config.json": b"{}"})
    with pytest.raises(FormatError, match=r"sae_a/weights.safetensors is missing"):
        TopKSAE.from_pretrained(REPO, "sae_a")


def test_a_tag_is_never_moved(released: Path, hub: WritableHub) -> None:
    push(released, REPO)
    old = contents(released)
    (released / "privacy_report.json").write_text(json.dumps({"sources": {}, "scrubbed": {}, "tokens": 0}))
    bind(released, REPO)
    with pytest.raises(HubError, match="tag v1 marks another release; push this one under another --tag"):
        push(released, REPO)
    assert hub.head(REPO) == old
    push(released, REPO, tag="v2")
    assert set(hub.tags[REPO]) == {"v1", "v2"}
    assert hub.head(REPO) == contents(released)


def test_the_token_is_never_shown(
    released: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "hf_" + "wrongWrong" * 3
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(HubError, match=r"refuses access|does not exist") as caught:
        push(released, REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail("/commit/", 503, "reset")
    lines = push(released, REPO)
    shown = str(caught.value) + caplog.text + "".join(lines)
    assert wrong not in shown
    assert TOKEN not in shown
    assert not any(TOKEN.encode() in data for data in hub.head(REPO).values())


@pytest.mark.parametrize(
    "text",
    [
        "token hf_AbCdEf0123456789",
        "Authorization: Bearer abc.def-ghi",
        "https://user:pass@host/x",
        "https://hf_abcdefg@host",
    ],
)
def test_secrets_are_redacted(text: str) -> None:
    shown = redact(text)
    assert "[redacted]" in shown
    for secret in ("AbCdEf0123456789", "abc.def-ghi", "pass", "hf_abcdefg"):
        assert secret not in shown


def test_without_a_token_nothing_is_sent(released: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token to push to org/saes with; log in"):
        push(released, REPO)
    assert hub.requests == []


def test_a_damaged_or_strange_folder_is_not_pushed(released: Path, hub: WritableHub, tmp_path: Path) -> None:
    (released / ".env").write_text("SECRET=1")
    with pytest.raises(FormatError, match=r"\.env is no part of the release"):
        push(released, REPO)
    (released / ".env").unlink()
    path = released / "sae_attn_mid/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"weights.safetensors is damaged"):
        push(released, REPO)
    path.unlink()
    with pytest.raises(FormatError, match=r"weights.safetensors is listed in SHA256SUMS and missing"):
        push(released, REPO)
    with pytest.raises(FormatError, match="no release folder"):
        push(tmp_path, REPO)
    with pytest.raises(FormatError, match="neither an existing folder nor a Hub repository"):
        push(released, "not a repo")
    with pytest.raises(HubError, match="is no tag"):
        push(released, REPO, tag="../v1")
    assert hub.requests == []


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil", "C:evil", "a//b", "evil\n", "./a"]
)
def test_hostile_paths_in_a_repository_are_refused(hub: WritableHub, tmp_path: Path, name: str) -> None:
    hub.add("models", REPO, {name: b"evil", "sae_a/config.json": b"{}"})
    with pytest.raises(FormatError, match="which is refused; nothing was fetched"):
        pull(REPO, tmp_path / "deep/out")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_pulled_suite_is_verified(released: Path, hub: WritableHub, tmp_path: Path) -> None:
    files = contents(released)
    hub.add("models", REPO, files | {"sae_attn_mid/weights.safetensors": b"\x80\x04pickle"})
    with pytest.raises(FormatError, match=r"weights.safetensors is damaged"):
        pull(REPO, tmp_path / "out")
    published = {name: data for name, data in files.items() if name.startswith("sae_")}
    hub.add("models", "org/published", published)
    pull("org/published", tmp_path / "published")
    assert contents(tmp_path / "published") == published
    hub.add("models", "org/bad", published | {"sae_attn_mid/config.json": b'{"k": 6}'})
    with pytest.raises(FormatError, match="hidden_dim must be a whole number"):
        pull("org/bad", tmp_path / "bad")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "bad").exists()


def test_pull_does_not_touch_a_folder_of_something_else(released: Path, hub: WritableHub, tmp_path: Path) -> None:
    push(released, REPO)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(FormatError, match="is not empty and does not hold org/saes"):
        pull(REPO, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}
