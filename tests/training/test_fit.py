"""`SAETrainer.fit`: every row once, the same bits from every container and after a stop, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from qwenscope.errors import CheckpointError, FormatError, QwenscopeError, TrainingError
from qwenscope.sae.sae import TopKSAE
from qwenscope.training.fit import measure
from qwenscope.training.trainer import SAETrainer

HIDDEN, BATCH, ROWS = 24, 64, 64 * 40 + 17


def rows(count: int = ROWS, seed: int = 1) -> Tensor:
    mix = torch.randn(60, HIDDEN, generator=torch.Generator().manual_seed(0))
    return torch.relu(torch.randn(count, 60, generator=torch.Generator().manual_seed(seed)) - 1) @ mix * 3 + 2


def trainer(**options: Any) -> SAETrainer:
    return SAETrainer(TopKSAE(HIDDEN, 96, 4, seed=2), 3e-3, tokens=ROWS, normalise=True, precision="fp32", **options)


def weights(of: SAETrainer) -> dict[str, Tensor]:
    return of.sae().state_dict()


def assert_equal(first: SAETrainer, second: SAETrainer) -> None:
    ours, theirs = weights(first), weights(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Spy(SAETrainer):
    """Keeps what it is given."""

    def step(self, x_BD: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), x_BD]
        return super().step(x_BD)


def test_every_row_is_trained_on_once_in_another_order() -> None:
    x_RD, spy = rows(), Spy(TopKSAE(HIDDEN, 96, 4, seed=2), 3e-3)
    ended = spy.fit(x_RD, batch_size=BATCH)
    assert (ended.steps, ended.rows, ended.finished) == (40, ROWS, True)
    assert [len(batch) for batch in spy.seen] == [BATCH] * 39 + [BATCH + 17]
    seen = torch.cat(spy.seen)
    assert not torch.equal(seen, x_RD)
    assert torch.equal(seen[seen[:, 0].argsort()], x_RD[x_RD[:, 0].argsort()])


def test_all_containers_give_the_same_bits(tmp_path: Path) -> None:
    x_RD = rows()
    tensor = trainer()
    tensor.fit(x_RD, batch_size=BATCH)
    np.save(tmp_path / "rows.npy", x_RD.numpy())
    (tmp_path / "files").mkdir()
    for number, part in enumerate(x_RD.split(700)):
        save_file({"x": part.contiguous()}, tmp_path / "files" / f"{number}.safetensors")
    for given in (x_RD.numpy(), np.load(tmp_path / "rows.npy", mmap_mode="r"), tmp_path / "files"):
        other = trainer()
        other.fit(given, batch_size=BATCH)
        assert_equal(tensor, other)


def test_numpy_and_torch_give_equal_bits_in_every_float_dtype() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        x_BD = rows(BATCH).to(dtype)
        ours, theirs = trainer(), trainer()
        ours.step(x_BD)
        theirs.step(x_BD.numpy())
        assert_equal(ours, theirs)
        codes, same = ours.sae().encode(x_BD), ours.sae().encode(x_BD.numpy())
        assert torch.equal(codes.values, same.values)
        assert torch.equal(codes.indices, same.indices)


def test_a_data_loader_is_taken_in_its_own_order() -> None:
    x_RD, ours, theirs = rows(BATCH * 10), trainer(), trainer()
    ours.fit(DataLoader(TensorDataset(x_RD), batch_size=BATCH))
    theirs.calibrate(x_RD[:BATCH])
    for batch in x_RD.split(BATCH):
        theirs.step(batch)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("stops", [[1], [15, 16, 17], [39]])
@pytest.mark.parametrize("as_batches", [False, True])
def test_stopped_and_resumed_to_the_same_bits(tmp_path: Path, stops: list[int], as_batches: bool) -> None:
    x_RD, seen = rows(), []

    def given() -> Any:
        return list(x_RD.split(BATCH)) if as_batches else x_RD

    whole = trainer(resample_every_steps=10)
    whole.fit(given(), batch_size=BATCH, on_step=lambda step, metrics: seen.append((step, float(metrics.fvu))))
    assert [step for step, _ in seen] == list(range(1, 42 if as_batches else 41))
    again: list[tuple[int, float]] = []
    for stop in [*stops, None]:
        part = trainer(resample_every_steps=10)

        def on_step(step: int, metrics: Any, stop: int | None = stop) -> bool:
            again.append((step, float(metrics.fvu)))
            return step == stop

        ended = part.fit(given(), batch_size=BATCH, checkpoint=tmp_path / "fit.safetensors", on_step=on_step)
        assert ended.finished == (stop is None)
    assert_equal(whole, part)
    assert again == seen
    finished = trainer(resample_every_steps=10)
    assert finished.fit(given(), batch_size=BATCH, checkpoint=tmp_path / "fit.safetensors").steps == whole.steps
    assert_equal(whole, finished)


def test_held_out_rows_are_measured() -> None:
    x_RD, held_out = rows(), rows(500, seed=5)
    ours = trainer()
    ended = ours.fit(x_RD, batch_size=BATCH, held_out=held_out.numpy())
    sae = ours.sae().requires_grad_(False)
    latents_RN = sae.encode(held_out).dense()
    error = (held_out - sae.decode(sae.encode(held_out))).double().square().sum()
    variance = (held_out.double() - held_out.double().mean(0)).square().sum()
    assert ended.fvu == pytest.approx(float(error / variance), rel=1e-9)
    assert ended.l0 == pytest.approx(float((latents_RN > 0).sum(1).float().mean()), rel=1e-6)
    assert ended.dead == pytest.approx(float((latents_RN > 0).sum(0).eq(0).float().mean()), abs=1e-6)
    assert ended.fvu == measure(sae, held_out)["fvu"] < 0.6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((0, HIDDEN), np.float32), r"\[R, D\] with R >= 1, not \[0, 24\]"),
        (torch.zeros(HIDDEN), r"\[R, D\] with R >= 1, not \[24\]"),
        (np.zeros((100, HIDDEN), np.int64), "floating-point numbers, not int64"),
        (torch.zeros(100, HIDDEN, dtype=torch.int32), "floating-point numbers, not torch.int32"),
        (torch.zeros(100, 3), r"must be \[B, 24\] with B >= 1, not \[100, 3\]"),
        (np.full((100, HIDDEN), np.nan, np.float32), "calibration rows are not finite"),
        (7, "an iterable of batches, not int"),
        ("no-such-folder", "no folder with .safetensors files"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(given: Any, message: str) -> None:
    with pytest.raises(QwenscopeError, match=message) as raised:
        trainer().fit(given)
    assert "\n" not in str(raised.value)


def test_folders_and_checkpoints_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    save_file({"x": rows(10)}, folder / "a.safetensors")
    save_file({"x": torch.zeros(4, 3)}, folder / "b.safetensors")
    with pytest.raises(FormatError, match=r"rows of unlike width: \[3, 24\]"):
        trainer().fit(folder)
    (folder / "b.safetensors").write_bytes(b"no rows")
    with pytest.raises(FormatError, match=r"b\.safetensors cannot be read"):
        trainer().fit(folder)
    save_file({"x": rows(10), "y": rows(10)}, folder / "b.safetensors")
    with pytest.raises(FormatError, match=r"b\.safetensors must hold one matrix"):
        trainer().fit(folder)
    checkpoint = folder / "b.safetensors"
    with pytest.raises(CheckpointError, match="is no checkpoint of fit"):
        trainer().fit(rows(), checkpoint=checkpoint)
    other = tmp_path / "fit.safetensors"
    trainer().fit(rows(), batch_size=BATCH, checkpoint=other)
    with pytest.raises(CheckpointError, match="is of a fit over"):
        trainer().fit(rows(), batch_size=BATCH, seed=1, checkpoint=other)
    with pytest.raises(TrainingError, match="batch_size and checkpoint_every of at least 1"):
        trainer().fit(rows(), batch_size=0)


BOUNDED = """
import sys, numpy as np, resource, torch
from qwenscope import SAETrainer, TopKSAE
torch.set_num_threads(1)
path, rows = sys.argv[1], int(sys.argv[2])
x_RD = np.memmap(path, np.float32, "r", shape=(rows, 64))

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

trainer, peak = SAETrainer(TopKSAE(64, 128, 4), 1e-3, tokens=rows), []
trainer.fit(x_RD, batch_size=8192, on_step=lambda step, metrics: peak.append(anonymous()))
print(max(peak) - peak[0], trainer.tokens_trained)
"""


@pytest.mark.slow
def test_two_gigabytes_of_rows_take_bounded_memory(tmp_path: Path) -> None:
    count = 2**31 // 256
    path = tmp_path / "rows.f32"
    with path.open("wb") as file:
        for seed in range(64):
            np.random.default_rng(seed).standard_normal((count // 64, 64), dtype=np.float32).tofile(file)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BOUNDED, str(path), str(count)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown, trained = map(float, ran.stdout.split())
    assert trained == count
    assert grown < 400  # MiB: a chunk of 16 batches is 32, the order of 8M rows 64
