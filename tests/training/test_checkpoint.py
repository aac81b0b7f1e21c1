"""Checkpoint folders: exact round trip, damage always found and named, whole or absent at every instant of a save."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from damage import damaged
from safetensors.torch import load_file
from torch import Tensor

from qwenscope.errors import CheckpointError, ResourceError
from qwenscope.training import checkpoint
from qwenscope.training.saver import Saver


def some_tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        "sae_a": {
            "weight": torch.randn(7, 5, generator=g),
            "shadow": torch.randn(3, 3, generator=g).bfloat16(),
            "fired": torch.randint(0, 1 << 40, (9,), generator=g),
            "order": torch.randint(0, 99, (4,), generator=g, dtype=torch.int16),
            "flag": torch.tensor([True, False]),
            "scalar": torch.tensor(3.5, dtype=torch.float64),
            "empty": torch.empty(0, 4),
            "strided": torch.randn(6, 4, generator=g).t(),
        },
        "sae_b": {"weight": torch.randn(2, 2, generator=g)},
    }


STATE = {"tokens": 4096, "cursor": {"rows": [1, 2], "text": "ñ €"}, "loss": 0.1 + 0.2}


def test_a_checkpoint_reads_back_to_the_bit(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 12, STATE, some_tensors())
    assert path.name == "step-00000012"
    read = checkpoint.load(path)
    assert read.state == STATE
    for stem, group in some_tensors().items():
        assert read.tensors[stem].keys() == group.keys()
        for name, tensor in group.items():
            assert read.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(read.tensors[stem][name], tensor), name


def test_files_are_ordinary_safetensors_and_the_manifest_tells_the_truth(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, STATE, some_tensors())
    assert torch.equal(load_file(path / "sae_a.safetensors")["strided"], some_tensors()["sae_a"]["strided"])
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {"state.json", "sae_a.safetensors", "sae_b.safetensors"}
    for name, entry in files.items():
        data = (path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_thousand_flipped_bits_and_a_hundred_truncations_are_all_found(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, STATE, some_tensors(1))
    newest = checkpoint.save(tmp_path, 2, STATE, some_tensors(2))
    for victim in damaged(newest.iterdir(), flips=1000, truncations=100, seed=5):
        found, passed_over = checkpoint.load_newest(tmp_path)
        assert found is not None
        assert found.path.name == "step-00000001"
        assert len(passed_over) == 1
        assert str(victim) in passed_over[0]
    found, passed_over = checkpoint.load_newest(tmp_path)
    assert (found is not None and found.path) == newest
    assert passed_over == []


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "sae_b.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, 3, STATE, some_tensors())
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(path)


def test_nothing_verifies_is_an_error_and_nothing_there_is_not(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path / "none") == (None, [])
    for step in (1, 2):
        (checkpoint.save(tmp_path, step, STATE, some_tensors()) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .*step-00000002.*step-00000001"):
        checkpoint.load_newest(tmp_path)


def test_a_newer_format_is_named_and_no_older_one_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, STATE, some_tensors())
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 7)
    checkpoint.save(tmp_path, 2, STATE, some_tensors())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 7.*reads up to 1.*upgrade"):
        checkpoint.load_newest(tmp_path)


def test_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot name a file"):
        checkpoint.save(tmp_path / "c", 1, STATE, {"../evil": {"w": torch.zeros(1)}})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c"]


def test_rotation_keeps_the_last_and_the_snapshots(tmp_path: Path) -> None:
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, STATE, some_tensors(), snapshot=step in (2, 4))
    (tmp_path / ".step-00000009.tmp").mkdir()
    checkpoint.rotate(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (2, 4, 6, 7)]


def test_damaged_newer_checkpoints_are_set_aside_not_counted(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path, step, STATE, some_tensors()) for step in (1, 2, 3)]
    (paths[2] / "sae_a.safetensors").write_bytes(b"")
    found, _ = checkpoint.load_newest(tmp_path)
    assert found is not None
    checkpoint.set_aside_newer(tmp_path, found.path)
    checkpoint.rotate(tmp_path, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-step-00000003", "step-00000002"]


def test_too_little_space_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = checkpoint.save(tmp_path, 1, STATE, some_tensors())
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1000))
    needed = checkpoint.checkpoint_bytes(some_tensors())
    with pytest.raises(ResourceError, match=rf"step-00000002: {needed:,} bytes needed, 1,000 free"):
        checkpoint.save(tmp_path, 2, STATE, some_tensors())
    assert list(tmp_path.iterdir()) == [old]


def test_the_estimate_bounds_what_is_written(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, STATE, some_tensors())
    assert sum(p.stat().st_size for p in path.iterdir()) <= checkpoint.checkpoint_bytes(some_tensors())


def test_the_saver_writes_what_stood_there_when_it_was_called(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=2)
    tensors = {"sae_a": {"w": torch.zeros(500_000)}}
    for step in range(1, 5):
        tensors["sae_a"]["w"].fill_(step)
        saver.save(step, {"step": step}, tensors, snapshot=False)
        tensors["sae_a"]["w"].fill_(-1)  # the next training step writes at once
    assert saver.ended(wait=True)
    assert not saver.ended(wait=True)
    kept = checkpoint.list_checkpoints(tmp_path)
    assert [int(p.name[5:]) for p in kept] == [3, 4]
    for path in kept:
        read = checkpoint.load(path)
        assert torch.equal(read.tensors["sae_a"]["w"], torch.full((500_000,), float(read.state["step"])))


def test_an_error_of_the_background_save_surfaces_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, keep=2)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=0))
    saver.save(1, {}, some_tensors(), snapshot=False)
    with pytest.raises(ResourceError, match="bytes needed"):
        saver.ended(wait=True)
    monkeypatch.undo()
    assert not saver.ended()
    saver.save(2, {}, some_tensors(), snapshot=False)
    assert saver.ended(wait=True)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
