"""Metrics survive kills, full disks and failing services; sinks see what the file sees."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwenscope.errors import RecipeError, TrainingError
from qwenscope.training.guards import LossGuard
from qwenscope.training.telemetry import MetricsFile, Telemetry


def record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 64 * step,
        "saes": {"a": {"fvu": 1 / step}},
        "left_out": {"outlier": 2},
        "seconds": 1.5,
    }


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_on_disk_as_they_are_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    for step in (1, 2):
        file.append(record(step))
        assert steps(tmp_path / "m.jsonl")[-1] == step
    assert json.loads((tmp_path / "m.jsonl").read_text().splitlines()[1]) == record(2)


def test_a_resumed_file_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 7):
        file.append(record(step))
    file.close()
    path.write_bytes(path.read_bytes() + b'{"step": 3, "tor\xff')
    MetricsFile(path, 4).append(record(5))
    assert steps(path) == [1, 2, 3, 4, 5]


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m.jsonl", 0).append({"step": 1, "saes": {"a": {"fvu": float("nan")}}})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "saes": {"a": {"fvu": None}}}


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    telemetry = Telemetry(tmp_path, ["tensorboard"], {}, 0)
    for step in (2, 4):
        telemetry.log(record(step))
    telemetry.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"a/fvu", "left_out/outlier", "tokens", "seconds"}
    assert [(event.step, event.value) for event in events.Scalars("a/fvu")] == [(2, 0.5), (4, 0.25)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_share_one_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    service = ModuleType(name)
    seen: list[Any] = []
    service.init = lambda **options: seen.append(options)  # type: ignore[attr-defined]
    service.log = lambda values, step: seen.append((step, values))  # type: ignore[attr-defined]
    service.finish = lambda: seen.append("finished")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, service)
    telemetry = _telemetry(tmp_path / "run-7", name)
    telemetry.log(record(4))
    telemetry.close()
    options, logged, finished = seen
    assert options["name"] == "run-7"
    assert options["resume"] == "allow"
    assert options["config"] == {"seed": 1}
    assert logged == (4, {"a/fvu": 0.25, "left_out/outlier": 2.0, "tokens": 256.0, "seconds": 1.5})
    assert finished == "finished"


def _telemetry(run: Path, name: str) -> Telemetry:
    run.mkdir()
    return Telemetry(run, [name], {"seed": 1}, 0)


def test_a_service_that_fails_is_dropped_and_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(values: Mapping[str, float], step: int) -> None:
        raise ConnectionError("no route to host")

    service = ModuleType("wandb")
    service.init = lambda **options: None  # type: ignore[attr-defined]
    service.log = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", service)
    telemetry = _telemetry(tmp_path / "run", "wandb")
    with caplog.at_level(logging.ERROR):
        for step in (1, 2):
            telemetry.log(record(step))
    telemetry.close()
    assert caplog.text.count("no route to host") == 1
    assert steps(tmp_path / "run" / "metrics.jsonl") == [1, 2]


def test_a_service_that_is_not_installed_is_a_recipe_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RecipeError, match=r"telemetry\.sinks names trackio.*pip install trackio"):
        Telemetry(tmp_path, ["trackio"], {}, 0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_exploding_loss_stops_the_run_and_an_odd_batch_does_not() -> None:
    guard = LossGuard()
    for step in range(1, 60):
        guard.check({"good": 0.5, "bad": 0.3 if step % 7 else 30.0}, step)
    for step in range(60, 64):
        guard.check({"good": 0.5, "bad": 4.0}, step)
    resumed = LossGuard()
    resumed.restore(json.loads(json.dumps(guard.state())))
    for watching in (guard, resumed):
        with pytest.raises(TrainingError, match=r"^bad: FVU 4 at step 64 .* median 0\.3.*hook_points\.bad\.lr"):
            watching.check({"good": 0.5, "bad": 4.0}, 64)


def test_a_loss_that_stays_hopeless_from_the_start_stops_the_run() -> None:
    guard = LossGuard()
    for step in range(1, 5):
        guard.check({"a": 17_000.0 + step}, step)
    with pytest.raises(TrainingError, match=r"^a: FVU 1\.7e\+04 at step 5 is more than 100; lower hook_points\.a\.lr"):
        guard.check({"a": 17_000.0}, 5)


def test_a_loss_that_is_high_from_the_start_is_no_explosion() -> None:
    guard = LossGuard()
    for step in range(1, 200):
        guard.check({"a": 50.0 / step}, step)
