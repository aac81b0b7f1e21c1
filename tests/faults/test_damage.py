"""Flipped bits, truncations, missing and foreign files: found, named, and the previous checkpoint used."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from damage import damaged
from tiny_run import BATCH, STEPS, Reference, final_hashes, make_language_model, metrics, status, tiny_recipe
from transformers import Qwen3_5MoeForCausalLM

from qwenscope.errors import CheckpointError, CorpusError, FormatError, TrainingError
from qwenscope.sae.loading import load_suite
from qwenscope.training import checkpoint
from qwenscope.training.run import train
from qwenscope.training.telemetry import Progress


class PulledPlugError(Exception):
    """Ends a run in this process."""


def pull_plug_at(tokens: int):  # type: ignore[no-untyped-def]
    def on_progress(progress: Progress) -> None:
        if progress.phase == "training" and progress.tokens >= tokens:
            raise PulledPlugError(f"at {progress.tokens}")

    return on_progress


@pytest.fixture(scope="session")
def half_way(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in the middle with two checkpoints."""
    run = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(PulledPlugError):
        train(tiny_recipe(tiny_model), run, on_progress=pull_plug_at(24 * BATCH))
    assert status(run)["state"] == "failed"
    assert status(run)["error"] == "PulledPlugError: at 1536"
    return run


@pytest.fixture
def run(half_way: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half_way, tmp_path / "run"))


def test_a_damaged_checkpoint_is_passed_over_by_name_and_the_end_is_the_same(
    run: Path, tiny_model: Path, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = checkpoint.list_checkpoints(run / "checkpoints")
    victim = newest / "sae_attn.safetensors"
    data = bytearray(victim.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 8
    victim.write_bytes(data)
    train(tiny_recipe(tiny_model), run, resume=True)
    reference.check(run)
    assert f"passed over a checkpoint: {victim} is damaged (sha256 differs)" in caplog.text
    session = json.loads((run / "run.json").read_text())["sessions"][-1]
    assert session["from"] == older.name
    assert str(victim) in session["passed_over"][0]
    assert (run / "checkpoints" / f"damaged-{newest.name}").is_dir()


def test_flipped_bits_and_truncations_in_final_saes_are_all_found(
    tiny_model: Path, tmp_path: Path, reference: Reference
) -> None:
    run = tmp_path / "run"
    train(tiny_recipe(tiny_model), run)
    files = [path for path in (run / "saes").rglob("*") if path.is_file()]
    assert set(final_hashes(run)) == {str(path.relative_to(run / "saes")) for path in files}
    for victim in damaged(files, flips=400, truncations=40, seed=3):
        # A list of checksums that was itself changed names the file that it no longer vouches for.
        named = victim.parent if victim.name == "SHA256SUMS" else victim
        with pytest.raises(FormatError, match=re.escape(str(named))):
            load_suite(run)
    assert set(load_suite(run)) == {"sae_attn", "sae_delta"}
    reference.check(run)


def test_starting_over_is_never_silent(run: Path, tiny_model: Path) -> None:
    older, newest = checkpoint.list_checkpoints(run / "checkpoints")
    (newest / "state.json").unlink()
    (older / "sae_delta.safetensors").write_bytes(b"")
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .*state\.json.*sae_delta\.safetensors"):
        train(tiny_recipe(tiny_model), run, resume=True)
    assert sorted(path.name for path in run.rglob("*")) == before
    assert status(run)["state"] == "failed"
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=f"holds no checkpoint, but status.json knows of {newest.name}"):
        train(tiny_recipe(tiny_model), run, resume=True)


def test_a_checkpoint_of_a_newer_format_is_named(run: Path, tiny_model: Path) -> None:
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_bytes(checkpoint._manifest_bytes({**manifest, "format_version": 2}))
    with pytest.raises(CheckpointError, match=rf"{newest} has checkpoint format 2.*reads up to 1; upgrade"):
        train(tiny_recipe(tiny_model), run, resume=True)


def test_a_checkpoint_of_another_recipe_is_not_loaded(run: Path, tiny_model: Path) -> None:
    other = tiny_recipe(tiny_model, hook_points__sae_attn__dict_size=200)
    (run / "recipe.yaml").write_text(other.to_yaml())
    with pytest.raises(ValueError, match=r"step-\d+ is of another recipe .*sae_attn\.dict_size: 192 there, 200 now"):
        train(other, run, resume=True)


def test_other_weights_under_the_same_name_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = make_language_model(tmp_path / "lm")
    recipe = tiny_recipe(model)
    with pytest.raises(PulledPlugError):
        train(recipe, tmp_path / "run", on_progress=pull_plug_at(8 * BATCH))
    other = Qwen3_5MoeForCausalLM.from_pretrained(model)
    torch.manual_seed(99)
    for parameter in other.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    other.save_pretrained(model)
    with pytest.raises(CheckpointError, match="holds other weights than when the run began"):
        train(recipe, tmp_path / "run", resume=True)


def test_metrics_lines_torn_or_beyond_the_checkpoint_are_replaced(
    run: Path, tiny_model: Path, reference: Reference
) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "tokens"')
    train(tiny_recipe(tiny_model), run, resume=True)
    reference.check(run)
    steps = [record["step"] for record in metrics(run)]
    assert steps == sorted(set(steps))


def test_a_corpus_that_ends_early_is_never_called_complete(tiny_model: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "How long is a day?"}, {"role": "assistant", "content": "24 hours. " * 20}]
    rows = [{"messages": [{**talk[0], "content": f"{talk[0]['content']} {i}"}, talk[1]]} for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"name": "files", "path": str(tmp_path / "chats.jsonl"), "weight": 1.0}]
    recipe, run = tiny_recipe(tiny_model, corpus__sources=sources), tmp_path / "run"
    with pytest.raises(CorpusError, match=r"the corpus ended after [\d,]+ of training.tokens = 3,062"):
        train(recipe, run)
    ended = status(run)
    assert ended["state"] == "failed"
    assert "the corpus ended" in ended["error"]
    assert 0 < ended["tokens_trained"] < ended["tokens_target"]
    assert not (run / "saes").exists()
    with (tmp_path / "chats.jsonl").open("a") as file:  # and nobody can slip other data under a begun run
        file.write(json.dumps(rows[0]) + "\n")
    with pytest.raises(CorpusError):
        train(recipe, run, resume=True)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    from qwenscope.activations.windows import Windows
    from qwenscope.lm.sites import Site

    real, calls = Windows.next_batch, []

    def poisoned(self: Windows, size: int) -> dict[Site, torch.Tensor]:
        batch = real(self, size)
        calls.append(size)
        struck = len(calls) == 20
        return {
            site: x_BD * (float("inf") if struck and site == Site("layers.3") else 1) for site, x_BD in batch.items()
        }

    monkeypatch.setattr(Windows, "next_batch", poisoned)
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"sae_attn: loss or gradient is not finite at step 20"):
        train(tiny_recipe(tiny_model), run)
    assert status(run)["state"] == "failed"
    assert [path.name for path in checkpoint.list_checkpoints(run / "checkpoints")] == [
        "step-00000015",
        "step-00000018",
    ]
    monkeypatch.undo()
    train(tiny_recipe(tiny_model), run, resume=True)
    reference.check(run)


def test_a_killed_ending_is_taken_up_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Reference
) -> None:
    run = tmp_path / "run"

    def pull_plug(*_: object) -> None:
        raise PulledPlugError("while publishing")

    monkeypatch.setattr("qwenscope.training.run.publish", pull_plug)
    with pytest.raises(PulledPlugError):
        train(tiny_recipe(tiny_model), run)
    assert status(run)["state"] == "failed"
    assert status(run)["tokens_trained"] == STEPS * BATCH - 10
    assert not (run / "saes").exists()
    monkeypatch.undo()
    report = (run / "privacy_report.json").read_bytes()
    train(tiny_recipe(tiny_model), run, resume=True)
    reference.check(run)
    assert (run / "privacy_report.json").read_bytes() == report
