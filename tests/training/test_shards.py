"""An SAE spread over ranks against the same SAE in one process: selection, every part of the step, runs, resharding."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_parallel_faults import LOST, fail_at_step_20, signal_itself
from test_trainer import BATCH, HIDDEN, LATENTS, K, rows
from tiny_ranks import complete, on_ranks, ranks, three_saes
from tiny_run import BATCH as BATCH_TOKENS
from tiny_run import final_hashes, metrics, status
from torch import Tensor

from qwenscope.activations.windows import Windows
from qwenscope.lm.load import load_language_model
from qwenscope.lm.sites import sites_of
from qwenscope.parallel.group import Group
from qwenscope.parallel.harvest_plan import HarvestPlan
from qwenscope.parallel.owners import Piece, cut, overlaps, owners, state_of
from qwenscope.parallel.shard import Shard
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.sae.sae import SAE, TopKSAE, random_directions
from qwenscope.training import checkpoint, initial
from qwenscope.training.building import plan_harvest, untrained
from qwenscope.training.sharded import ShardedTrainer

BOUNDS = {1: (0, LATENTS), 2: (0, 56, LATENTS), 3: (0, 3, 64, LATENTS)}  # unlike pieces, one with fewer latents than K


def test_pieces_cover_the_latents_and_name_their_files() -> None:
    assert cut("a", 100, None, 4) == [Piece("a", 0, 100, 100)]
    assert cut("a", 100, 100, 4)[0].stem == "a"
    pieces = cut("a", 1000, 300, 8)
    assert [piece.stem for piece in pieces] == ["a@0-248", "a@248-496", "a@496-744", "a@744-1000"]
    assert len(cut("a", 1000, 64, 3)) == 3  # no more than there are ranks
    assert [stem for stem in ("a", "b", "a@0-8", "a@0-600", "a@744-1000") if overlaps(stem, pieces[1])] == [
        "a",
        "a@0-600",
    ]


@pytest.mark.parametrize("before", [[0, 100], [0, 40, 100], [0, 8, 48, 100]])
def test_state_is_put_together_from_any_pieces(before: list[int]) -> None:
    whole = {
        "encoder": torch.randn(100, 4),
        "decoder.mean": torch.randn(100, 4),
        "ages": torch.arange(100),
        "pre_bias": torch.randn(4),
        "counters": torch.tensor([3]),
    }
    by_latent = {"encoder", "decoder.mean", "ages"}
    tensors = {
        Piece("a", start, stop, 100).stem: {
            name: value[start:stop] if name in by_latent else value for name, value in whole.items()
        }
        for start, stop in pairwise(before)
    } | {"ab": {"encoder": torch.zeros(100, 4)}}
    for piece in [*cut("a", 100, 30, 8), Piece("a", 0, 100, 100)]:
        found = state_of(piece, tensors)
        assert found.keys() == whole.keys()
        for name, value in found.items():
            assert torch.equal(value, whole[name][piece.start : piece.stop] if name in by_latent else whole[name])


def test_a_slice_begins_with_the_directions_of_the_whole() -> None:
    count = (1 << 17) + 5  # more than are drawn at once
    whole = torch.nn.functional.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(9)), dim=1)
    assert torch.equal(random_directions(16, count, 9, 0, count), whole)
    for start, stop in ((0, 8), (65_000, 70_000), (1 << 16, 1 << 17), (count - 7, count)):
        assert torch.equal(random_directions(16, count, 9, start, stop), whole[start:stop])


def select(folder: Path, group: Group) -> None:
    """Each rank asks which of its own values are among the largest; many are equal, some rows have too few."""
    draw = torch.Generator().manual_seed(4)
    for k in (1, 3, 7):
        widths = [2, 7, 5][: group.size]
        values = [torch.randint(0, 4, (50, min(k, width)), generator=draw).float() for width in widths]
        shard = Shard((0, *torch.tensor(widths).cumsum(0).tolist()), k, group)
        mask = shard.largest(values[group.rank], k)
        save_file({"values": values[group.rank], "mask": mask.contiguous()}, folder / f"{k}-{group.rank}.safetensors")


@pytest.mark.parametrize("size", [2, 3])
def test_the_largest_over_ranks_are_exact_with_ties_and_short_rows(size: int, tmp_path: Path) -> None:
    on_ranks(size, partial(select, tmp_path))
    for k in (1, 3, 7):
        parts = [load_file(tmp_path / f"{k}-{rank}.safetensors") for rank in range(size)]
        values, mask = (torch.cat([part[name] for part in parts], dim=1) for name in ("values", "mask"))
        count = min(k, values.shape[1])
        assert (mask.sum(1) == count).all()
        kept = torch.where(mask, values, -torch.inf).topk(count, dim=1).values
        assert torch.equal(kept, values.topk(count, dim=1).values)


OPTIONS: list[dict[str, Any]] = [
    {"aux_k": 3},
    {"aux_k": 3, "cautious": True},
    {"resample_every_steps": 6, "normalise": True},
    {"clip_norm": 0.01, "resample_every_steps": 7},
    {"aux_coefficient": 0.0},
    {"activation": "batch_topk", "aux_k": 3, "normalise": True},
    {"initial_decoder": "rows", "normalise": True},
    {"initial_decoder": "residuals", "normalise": True},
]


def train_shard(folder: Path, bounds: tuple[int, ...], options: dict[str, Any], group: Group) -> None:
    """Thirty steps in float64 of one SAE over all ranks; each leaves its state and metrics, rank 0 the SAE."""
    shard = Shard(bounds, K, group)
    initial._PART = 16  # several parts of few latents
    options = dict(options)
    trainer = ShardedTrainer(
        untrained(HIDDEN, shard, 2, options.pop("activation", "topk")).double(),
        3e-3,
        tokens=100 * BATCH,
        warmup_tokens=5 * BATCH,
        dead_after_tokens=BATCH,
        seed=7,
        precision="fp32",
        moments=torch.float64,
        shard=shard,
        **options,
    )
    trainer.calibrate(rows(200, 3).double())
    numbers: list[Tensor] = []
    for step in range(30):
        seen = trainer.step(rows(BATCH - step, 10 + step).double())
        numbers.append(torch.stack([getattr(seen, name).double() for name in NUMBERS]))
    piece = Piece("a", shard.start, shard.stop, LATENTS)
    state = {name: value.clone() for name, value in trainer.state_dict().items()}
    save_file(state | {"seen": torch.stack(numbers)}, folder / f"{piece.stem}.safetensors")
    if (sae := trainer.collect()) is not None:
        sae.save(folder)
    assert (sae is not None) == group.leads


def count_bytes(folder: Path, group: Group) -> None:
    """Write down what five steps of 32 rows, without dead latents or clipping, hand to torch.distributed."""
    handed = {"all_gather": 0, "all_reduce": 0}
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted_gather(arrived: list[Tensor], tensor: Tensor, *rest: Any, **options: Any) -> None:
        handed["all_gather"] += tensor.nbytes
        gather(arrived, tensor, *rest, **options)

    def counted_reduce(tensor: Tensor, *rest: Any, **options: Any) -> None:
        handed["all_reduce"] += tensor.nbytes
        reduce(tensor, *rest, **options)

    shard = Shard(BOUNDS[group.size], K, group)
    trainer = ShardedTrainer(untrained(HIDDEN, shard, 2), 1e-3, precision="fp32", clip_norm=None, shard=shard)
    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce
    for step in range(5):
        trainer.step(rows(32, step))
    (folder / f"{group.rank}.json").write_text(json.dumps(handed))


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_of_a_step_are_what_the_documentation_says(size: int, tmp_path: Path) -> None:
    """docs/scaling.md, "SAEs over several ranks"."""
    on_ranks(size, partial(count_bytes, tmp_path))
    for rank in range(size):
        handed = json.loads((tmp_path / f"{rank}.json").read_text())
        assert handed == {"all_gather": 5 * (4 * 32 * K + 4), "all_reduce": 5 * (4 * (32 + 1) * HIDDEN + 24)}


def spread(model: Path, **changes: Any) -> Recipe:
    """Of `three_saes`, the two of 256 and 192 latents are spread over the ranks, up to four and three."""
    return three_saes(model, training__latents_per_rank=64, training__precision="fp32", **changes)


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for size in (1, 2, 4):
        complete(size, spread(model), folder / str(size))
    return {size: folder / str(size) for size in (1, 2, 4)}


def check_close(run: Path, reference: Path) -> None:
    """Weights within 1e-3 of each tensor's size and losses within 1e-4 after 48 steps: sums in another order."""
    assert status(run)["state"] == "complete"
    for sae_id in ("sae_delta", "sae_attn", "sae_delta_small"):
        saes = [TopKSAE.from_pretrained(path / "saes" / sae_id) for path in (run, reference)]
        assert saes[0].config == saes[1].config
        for name, value in saes[1].state_dict().items():
            assert (saes[0].state_dict()[name] - value).norm() <= 1e-3 * value.norm(), (sae_id, name)
    for found, expected in zip(metrics(run), metrics(reference), strict=True):
        for sae_id, numbers in expected["saes"].items():
            assert found["saes"][sae_id]["fvu"] == pytest.approx(numbers["fvu"], rel=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_over_ranks_is_that_of_one_process(runs: dict[int, Path], size: int) -> None:
    check_close(runs[size], runs[1])
    newest = checkpoint.list_checkpoints(runs[size] / "checkpoints")[-1]
    files = {path.stem for path in newest.glob("*.safetensors")}
    assert len(files) == {2: 5, 4: 8}[size]
    assert "sae_delta_small" in files  # small enough to be whole
    assert (
        final_hashes(runs[size])["sae_delta_small/weights.safetensors"]
        == (final_hashes(runs[1])["sae_delta_small/weights.safetensors"])
    )


def test_the_result_is_a_function_of_the_number_of_ranks(model: Path, runs: dict[int, Path], tmp_path: Path) -> None:
    """A rank that holds parts of two SAEs is killed in a step; the same number of ranks ends with the same bits."""
    run = tmp_path / "run"
    killed = partial(signal_itself, signal.SIGKILL, 20)
    with ranks(2, spread(model), run, before={1: killed}) as job:
        assert job.wait() == [LOST, -signal.SIGKILL], job.errors()
        assert "lost contact with another rank" in job.errors()
    assert 0 < status(run)["tokens_trained"] <= 20 * BATCH_TOKENS
    complete(2, spread(model), run, resume=True)
    assert final_hashes(run) == final_hashes(runs[2])
    assert metrics(run) == metrics(runs[2])


def test_a_rank_that_fails_in_a_shared_step_says_why(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ranks(2, spread(model), run, before={1: fail_at_step_20}) as job:
        assert job.wait() == [LOST, 1], job.errors()
    assert status(run)["state"] == "failed"
    assert "rank 1: ArithmeticError: something of its own" in status(run)["error"]


def test_latents_are_dealt_anew_over_two_then_one_then_four_ranks(
    model: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    recipe, run = spread(model, checkpoint__every_tokens=10**9), tmp_path / "run"
    for size, step in ((2, 8), (1, 20)):
        stop = partial(signal_itself, signal.SIGTERM, step)
        with ranks(size, recipe, run, resume=size == 1, before=dict.fromkeys(range(size), stop)) as job:
            assert job.wait() == [143] * size, job.errors()
    complete(4, recipe, run, resume=True)
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert [session["ranks"] for session in sessions] == [2, 1, 4]
    check_close(run, runs[1])


def test_gpus_that_share_an_sae_take_turns(model: Path) -> None:
    recipe = spread(model)
    lm = load_language_model(recipe.lm)
    on_gpu = dataclasses.replace(lm, device=torch.device("cuda"))
    assert not plan_harvest(recipe, lm, Group(0, 4)).in_turn
    assert not plan_harvest(three_saes(model), on_gpu, Group(0, 4)).in_turn
    plan = plan_harvest(recipe, on_gpu, Group(0, 4))
    assert plan.in_turn
    conversation = SimpleNamespace(id="a", token_ids=np.arange(50, dtype=np.int32), roles=np.zeros(50, np.uint8))
    threads: set[int] = set()

    class Stream:
        """An endless corpus that notes who reads it."""

        def state(self) -> dict[str, int]:
            return {}

        def __next__(self) -> SimpleNamespace:
            threads.add(threading.get_ident())
            return conversation

    for in_turn in (True, False):
        threads.clear()
        alone = dataclasses.replace(HarvestPlan.alone(sites_of(recipe)), in_turn=in_turn)
        with closing(Windows(lm, Stream(), recipe, alone)) as windows:  # type: ignore[arg-type]
            windows.next_batch(10)
        assert (threads == {threading.get_ident()}) == in_turn


def test_pieces_are_dealt_evenly_and_to_unlike_ranks() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b", ["training.latents_per_rank=6000"])
    for size in (1, 2, 3, 4, 5, 8):
        owned = owners(recipe, size)
        held = [sum(piece.latents for piece in pieces) for pieces in owned]
        assert sum(held) == 2 * 8192 + 7 * 16384
        assert max(held) <= 1.2 * sum(held) / size
        for pieces in owned:
            assert len({piece.sae_id for piece in pieces}) == len(pieces)
            assert [piece.sae_id for piece in pieces] == [
                name for name in recipe.hook_points if name in {piece.sae_id for piece in pieces}
            ]
        for sae_id, point in recipe.hook_points.items():
            parts = [piece for pieces in owned for piece in pieces if piece.sae_id == sae_id]
            assert [piece.start for piece in parts] == [0, *(piece.stop for piece in parts[:-1])]
            assert parts[-1].stop == point.dict_size


NUMBERS = ("fvu", "loss", "aux_loss", "l0", "dead", "grad_norm", "finite")


@pytest.mark.parametrize("options", OPTIONS)
def test_training_is_that_of_one_process(options: dict[str, Any], tmp_path: Path) -> None:
    saes: dict[int, dict[str, Tensor]] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for size, bounds in BOUNDS.items():
        folder = tmp_path / str(size)
        folder.mkdir()
        on_ranks(size, partial(train_shard, folder, bounds, options))
        saes[size] = SAE.from_pretrained(folder).state_dict()
        tensors = {path.stem: load_file(path) for path in folder.glob("a*.safetensors")}
        assert len(tensors) == size
        states[size] = state_of(Piece("a", 0, LATENTS, LATENTS), tensors)
        for name in ("seen", "pre_bias", "pre_bias.square", "generator"):  # what all have is the same on all
            assert all(torch.equal(part[name], states[size][name]) for part in tensors.values())
    assert states[1]["seen"][:, NUMBERS.index("dead")].max() > 10
    for size in (2, 3):
        for name, value in states[1].items():
            assert value.shape == states[size][name].shape
            assert torch.allclose(states[size][name].double(), value.double(), rtol=1e-9, atol=1e-11), name
        for name, value in saes[1].items():
            assert torch.allclose(saes[size][name], value, rtol=1e-6, atol=1e-7), name
