"""Train on rows that are already there: `SAETrainer.fit`, for people with activations of their own.

Rows that can be indexed (a tensor, an array, a memmap, a folder of safetensors) are shuffled without holding them:
blocks of neighbouring rows in a random order, then row by row within a chunk of batches. The order is a function of
the seed and the number of rows alone, so that a run that was stopped goes on with the batch that it would have taken.

Legend: R rows, D hidden, B rows of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qwenscope.errors import CheckpointError, FormatError, TrainingError
from qwenscope.files import atomic_path, disk_errors_named, open_safetensors
from qwenscope.sae.rows import Rows, as_rows
from qwenscope.sae.sae import SAE
from qwenscope.seeds import generator
from qwenscope.training.metrics import StepMetrics

BLOCK = 256
"""Neighbouring rows that are read together."""
CHUNK_BATCHES = 16
"""Batches whose rows are shuffled in memory."""
CALIBRATION_ROWS = 16_384
_ORDER = "qwenscope.fit"

OnStep = Callable[[int, StepMetrics], Any]


class Trains(Protocol):
    """What `fit` asks of a trainer."""

    steps: int
    tokens_trained: int

    def calibrate(self, rows_RD: Tensor) -> None:
        """Measure what depends on the data, from its first rows."""

    def step(self, x_BD: Tensor) -> StepMetrics:
        """One optimizer step."""

    def sae(self) -> SAE:
        """The SAE as it stands."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that `load_state_dict` needs to go on to the same bits."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state_dict`."""


class _Indexed(Protocol):
    """Rows that can be read in any order: [R, D], a slice of which `as_rows` takes."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


@dataclass(frozen=True)
class Fit:
    """How a call of `fit` ended.

    steps, rows: of the trainer so far, earlier calls included. finished: whether it saw all rows, or was stopped by
    `on_step`. fvu, l0: on the held-out rows, None without any. dead: share of latents that none of them activates.
    """

    steps: int
    rows: int
    finished: bool
    fvu: float | None = None
    l0: float | None = None
    dead: float | None = None


def fit(
    trainer: Trains,
    rows: Any,
    batch_size: int,
    held_out: Rows | None,
    on_step: OnStep | None,
    path: Path | None,
    checkpoint_every: int,
    seed: int,
    progress: bool,
) -> Fit:
    """See `SAETrainer.fit`."""
    if min(batch_size, checkpoint_every) < 1:
        raise TrainingError(
            f"fit needs batch_size and checkpoint_every of at least 1, not {batch_size} and {checkpoint_every}"
        )
    source = _opened(rows)
    indexed = hasattr(source, "shape")
    order = {"seed": seed, "batch_size": batch_size, "rows": len(source)} if indexed else {}
    done = 0
    if path is not None and path.exists():
        done = _load(trainer, path, order)
    batches = _shuffled(source, batch_size, seed, done) if indexed else islice(map(_batch, source), done, None)
    total = max(1, len(source) // batch_size) if indexed else None
    finished = True
    with ExitStack() as stack:
        advance = stack.enter_context(_bar(total, done)) if progress else None
        for x_BD in batches:
            if trainer.steps == 0:
                trainer.calibrate(_gather(source, _order(len(source), seed)[:CALIBRATION_ROWS]) if indexed else x_BD)
            metrics = trainer.step(x_BD)
            done += 1
            if advance is not None:
                advance(metrics)
            stop = on_step is not None and on_step(trainer.steps, metrics) is True
            if path is not None and (stop or done % checkpoint_every == 0):
                _save(trainer, path, order, done)
            if stop:
                finished = False
                break
    if path is not None and finished:
        _save(trainer, path, order, done)
    measured = {} if held_out is None else measure(trainer.sae(), _opened(held_out), batch_size)
    return Fit(trainer.steps, trainer.tokens_trained, finished, **measured)


@torch.no_grad()
def measure(sae: SAE, rows: Any, batch_size: int = 4096) -> dict[str, float]:
    """`fvu` (float64 sums, about the rows' own mean), `l0` and the share of `dead` latents of `sae` on rows [R, D]."""
    count, error, active = 0, 0.0, 0
    sums_D = torch.zeros(sae.hidden_dim, dtype=torch.float64)
    squares = 0.0
    fired_N = torch.zeros(sae.dict_size, dtype=torch.bool, device=sae.pre_bias.device)
    for start in range(0, len(rows), batch_size):
        x_BD = as_rows(rows[start : start + batch_size]).to(sae.pre_bias)
        codes = sae.encode(x_BD)
        error += float((x_BD - sae.decode(codes)).double().square().sum())
        sums_D += x_BD.double().sum(0).cpu()
        squares += float(x_BD.double().square().sum())
        on = codes.values > 0
        active += int(on.sum())
        fired_N[codes.indices[on]] = True
        count += len(x_BD)
    variance = squares - float(sums_D.square().sum()) / count
    return {"fvu": error / variance, "l0": active / count, "dead": 1 - float(fired_N.float().mean())}


def _opened(rows: Any) -> Any:
    """What `rows` is: indexed [R, D], or an iterable of batches.

    Raises:
        TrainingError: neither, or no rows.
        FormatError: a folder without rows.
    """
    source = _Files(Path(rows)) if isinstance(rows, str | Path) else rows
    if hasattr(source, "shape"):
        if len(source.shape) != 2 or not len(source):
            raise TrainingError(f"rows to fit must be [R, D] with R >= 1, not {list(source.shape)}")
        return source
    if isinstance(source, Iterable):
        return source
    raise TrainingError(
        "rows to fit are a tensor, an array, a folder of safetensors or an iterable of batches, "
        f"not {type(rows).__name__}"
    )


class _Files:
    """The rows of a folder of safetensors as one [R, D]: file after file by name, one matrix in each."""

    def __init__(self, folder: Path) -> None:
        self.matrices: list[tuple[Path, str, int]] = []
        widths = set()
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with open_safetensors(path) as file:
                    names = list(file.keys())
                    shapes = [file.get_slice(name).get_shape() for name in names]
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{path} cannot be read: {error}") from None
            if len(names) != 1 or len(shapes[0]) != 2:
                raise FormatError(f"{path} must hold one matrix of rows, not {dict(zip(names, shapes, strict=True))}")
            self.matrices.append((path, names[0], shapes[0][0]))
            widths.add(shapes[0][1])
        if not self.matrices:
            raise FormatError(f"{folder} is no folder with .safetensors files of rows")
        if len(widths) > 1:
            raise FormatError(f"{folder} holds rows of unlike width: {sorted(widths)}")
        self.shape = (sum(rows for _, _, rows in self.matrices), widths.pop())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        begin, end, _ = rows.indices(len(self))
        parts, offset = [], 0
        for path, name, count in self.matrices:
            first, last = max(begin - offset, 0), min(end - offset, count)
            if first < last:
                with open_safetensors(path) as file:
                    parts.append(file.get_slice(name)[first:last])
            offset += count
        return torch.cat(parts)


def _shuffled(source: _Indexed, batch_size: int, seed: int, skipped: int) -> Iterator[Tensor]:
    """Batches of every row of `source` exactly once, from batch number `skipped` on; the last one takes the rest."""
    count = len(source)
    order_R = _order(count, seed)
    batches = max(1, count // batch_size)
    for chunk in range(skipped // CHUNK_BATCHES, -(-batches // CHUNK_BATCHES)):
        first = chunk * CHUNK_BATCHES
        last = min(first + CHUNK_BATCHES, batches)
        own_R = order_R[first * batch_size : count if last == batches else last * batch_size]
        rows = _gather(source, own_R)
        rows = rows[torch.randperm(len(rows), generator=generator(seed, _ORDER, chunk))]
        for batch in range(max(first, skipped), last):
            begin = (batch - first) * batch_size
            yield rows[begin:] if batch == batches - 1 else rows[begin : begin + batch_size]


def _order(count: int, seed: int) -> Tensor:
    """The numbers 0 .. `count` - 1, int64, in blocks of neighbours whose order is random."""
    blocks = torch.randperm(-(-count // BLOCK), generator=generator(seed, _ORDER, "blocks"))
    order_R = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    return order_R[order_R < count]


def _gather(source: _Indexed, rows_R: Tensor) -> Tensor:
    """Rows of `source` by number, in runs of neighbours."""
    ends = (rows_R.diff() != 1).nonzero().squeeze(1) + 1
    edges = [0, *ends.tolist(), len(rows_R)]
    return torch.cat([as_rows(source[int(rows_R[begin]) : int(rows_R[end - 1]) + 1]) for begin, end in pairwise(edges)])


def _batch(item: Any) -> Tensor:
    """An iterable's item as a batch; a DataLoader over a TensorDataset gives lists of one."""
    return as_rows(item[0] if isinstance(item, list | tuple) else item)


@contextmanager
def _bar(total: int | None, done: int) -> Iterator[Callable[[StepMetrics], None]]:
    """A bar on a terminal or in a notebook; what it gives is called after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total, completed=done)

        def advance(metrics: StepMetrics) -> None:
            bar.update(task, advance=1, description=f"FVU {float(metrics.fvu):.4f}, dead {int(metrics.dead):,}")

        yield advance


def _save(trainer: Trains, path: Path, order: dict[str, Any], done: int) -> None:
    metadata = {_ORDER: json.dumps({**order, "batches": done})}
    with disk_errors_named(path), atomic_path(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in trainer.state_dict().items()}, aside, metadata)


def _load(trainer: Trains, path: Path, order: dict[str, Any]) -> int:
    """Take up a checkpoint of `fit`; returns the batches it had seen.

    Raises:
        CheckpointError: it is none, or of other rows or another order.
    """
    try:
        with open_safetensors(path) as file:
            saved = json.loads((file.metadata() or {})[_ORDER])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of fit ({error}); move it away to begin anew") from None
    batches = int(saved.pop("batches"))
    if saved != order:
        raise CheckpointError(f"{path} is of a fit over {saved}, not {order}; move it away to begin anew")
    trainer.load_state_dict(state)
    return batches
