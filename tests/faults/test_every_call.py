"""One run of 13 steps, struck at its every file-system call: errors, half writes, kills, and cuts that lose what was
not fsynced. Whatever happens, the run says so in one line, or ends to the bit like one that nothing happened to.

The slow tests strike the first and the last call of each kind (libc's name and the path, numbers and what is random in
it left out), and with EVERY_CALL=1 in the environment every single one, which takes an hour of one core.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from disk_model import (
    Call,
    Pick,
    Tree,
    after_each,
    kept_all,
    kept_names,
    kept_nothing,
    kept_some,
    read_trace,
    write_tree,
)
from fault_worker import KILL, SHORT, Worker, fault_worker
from tiny_run import BATCH, Reference, final_hashes, metrics, status, tiny_recipe

from qwenscope.errors import CheckpointError, FormatError, ResourceError
from qwenscope.training import checkpoint

FAULTS = (errno.EIO, errno.ENOSPC, errno.EROFS, SHORT, errno.EACCES, errno.EMFILE)
CHANCE = re.compile(r"(?<=\.)\d+-[0-9a-f]+(?=\.tmp)|(?<=\.tmp)\w{6}$|\d+")
"""What differs between the names of like files."""
TOLD = ("status.json", "metrics.jsonl", "checkpoints", "saes")  # what an ending is judged by
PROMISED = {kind.exit_code for kind in (ResourceError, FormatError, CheckpointError)}


@dataclass
class Small:
    """The recipe, what an undisturbed session of it left, and how to disturb others."""

    worker: Worker
    recipe: Path
    reference: Reference
    calls: list[Call]
    """That the undisturbed session made."""
    trace: Path
    root: Path
    """The folder in which its run folder stood."""

    def strike(self, run: Path, nth: int, fault: int, sticky: bool = False) -> bool:
        """A session that is struck, and one that goes on from there; whether the first ended by itself, and well."""
        ending = self.worker.session(self.recipe, run, nth=nth, fault=fault, sticky=sticky)
        where = f"call {nth}, fault {fault}: {ending}"
        assert "Traceback" not in ending.said, where
        if ending.code == 0:
            self.reference.check(run)
            return True
        if fault == KILL:
            assert ending.code == -9, where
        else:
            assert ending.code in PROMISED, where
            assert ending.said.splitlines()[-1], where
            assert sticky or not (run / "status.json").exists() or status(run)["state"] == "failed", where
        self.go_on(run, where)
        return False

    def numbers(self, fault: int) -> list[int]:
        """Of the calls to strike with `fault`; half a write can only befall a write."""
        writes = [call for call in self.calls if fault != SHORT or call.first == "write"]
        if os.environ.get("EVERY_CALL"):
            return [call.number for call in writes]
        first, last = ({kind(call): call.number for call in some} for some in (writes[::-1], writes))
        return sorted({*first.values(), *last.values()})

    def go_on(self, run: Path, where: str) -> None:
        """Nothing is in the way any more: the run comes to its end, and leaves nothing lying about."""
        ending = self.worker.session(self.recipe, run, resume=(run / "recipe.yaml").exists())
        assert ending.code == 0, f"{where}; then {ending}"
        self.reference.check(run)
        assert leftovers(run) == [], where

    def states(self, picks: Iterable[Pick]) -> Iterator[Tree]:
        """What a cut after each call of the undisturbed session may leave, each once."""
        seen = set()
        picks = list(picks)
        for disk in after_each(read_trace(self.trace), self.root):
            for pick in picks:
                tree = disk.left(pick)
                if (known := key(tree)) not in seen:
                    seen.add(known)
                    yield tree


def kind(call: Call) -> tuple[str, str]:
    """Equal for calls that do the same to like files."""
    return call.first, CHANCE.sub("*", call.second)


def key(tree: Tree) -> int:
    """Equal for equal trees."""
    return hash(tuple((name, hash(inner) if isinstance(inner, bytes) else key(inner)) for name, inner in tree.items()))


def leftovers(run: Path) -> list[str]:
    """Hidden names but for the lock's."""
    return [str(path) for path in run.rglob(".*") if path.name != ".lock"]


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    folder = tmp_path_factory.mktemp("every-call")
    recipe = tiny_recipe(
        tiny_model,
        training__tokens=13 * BATCH - 10,
        training__resample_every_steps=5,
        activations__cache=str(folder / "cache"),  # the windows' rows need not be computed hundreds of times
    )
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (root := folder / "root").mkdir()
    with fault_worker(folder) as worker:
        ending = worker.session(folder / "recipe.yaml", root / "run", trace=folder / "trace")
        assert ending.code == 0, ending
        reference = Reference(final_hashes(root / "run"), metrics(root / "run"))
        assert len(reference.hashes) == 6
        calls = [call for call in read_trace(folder / "trace") if call.what == "call"]
        assert len(calls) == ending.calls
        yield Small(worker, folder / "recipe.yaml", reference, calls, folder / "trace", root)


def test_some_calls_refused(small: Small, tmp_path: Path) -> None:
    draw = random.Random(5)
    for number, fault in enumerate(FAULTS):
        small.strike(tmp_path / str(number), draw.choice(small.numbers(fault)), fault)


@pytest.mark.parametrize(
    ("what", "name", "fault"),
    [
        ("stat64", "status.json", errno.EACCES),
        ("fsync", ".recipe.yaml.*.tmp", errno.EROFS),
        ("open64", ".lock", errno.EMFILE),
    ],
)
def test_the_first_calls_refused(small: Small, tmp_path: Path, what: str, name: str, fault: int) -> None:
    number = next(c.number for c in small.calls if c.first == what and Path(c.second).match(name))
    assert not small.strike(tmp_path / "run", number, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_call_refused(small: Small, tmp_path: Path, fault: int) -> None:
    survived = 0
    for nth in small.numbers(fault):
        survived += small.strike(tmp_path / "run", nth, fault)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert survived > 0
    assert fault != SHORT or survived == len(small.numbers(fault))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [errno.EROFS, errno.ENOSPC])
def test_every_change_refused_from_a_call_on(small: Small, tmp_path: Path, fault: int) -> None:
    for nth in small.numbers(fault)[::3]:
        small.strike(tmp_path / "run", nth, fault, sticky=True)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.slow
def test_a_kill_at_every_call(small: Small, tmp_path: Path) -> None:
    for nth in small.numbers(KILL):
        small.strike(tmp_path / "run", nth, KILL)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_no_cut_leaves_a_false_complete_or_a_torn_checkpoint(small: Small, tmp_path: Path) -> None:
    seen = set()
    for tree in small.states([kept_all, kept_nothing, kept_names, *map(kept_some, range(3))]):
        inside = tree.get("run", {})
        assert isinstance(inside, dict)
        told = {name: inside[name] for name in inside if name in TOLD}
        if (known := key(told)) in seen:
            continue
        seen.add(known)
        run = tmp_path / str(len(seen)) / "run"
        write_tree({"run": told}, run.parent)
        newest, passed_over = checkpoint.load_newest(run / "checkpoints")
        assert passed_over == []
        if (run / "status.json").exists():
            said = json.loads((run / "status.json").read_text())
            assert said["checkpoint"] is None or (newest is not None and newest.path.name >= said["checkpoint"])
            if said["state"] == "complete":
                small.reference.check(run)
        shutil.rmtree(run.parent)
    assert len(seen) > 100


def test_some_cuts_and_kills_are_gone_on_from(small: Small, tmp_path: Path) -> None:
    draw = random.Random(6)
    for name, pick in {"killed": kept_all, "cut": kept_nothing, "names": kept_names, "some": kept_some(4)}.items():
        tree = draw.choice(list(small.states([pick])))
        write_tree(tree, tmp_path / name)
        small.go_on(tmp_path / name / "run", name)


@pytest.mark.slow
def test_every_cut_and_kill_is_gone_on_from(small: Small, tmp_path: Path) -> None:
    for count, tree in enumerate(small.states([kept_all, kept_nothing, kept_names, kept_some(1)])):
        write_tree(tree, tmp_path / str(count))
        small.go_on(tmp_path / str(count) / "run", f"state {count}")
        shutil.rmtree(tmp_path / str(count))
