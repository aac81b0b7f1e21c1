"""The next window beside the steps on the current one: the same batches, nothing harvested in vain, no thread left."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from activations.conftest import BROKEN, LAYERS, ListStream, conversation
from tiny_run import BATCH, STEPS, Reference, make_language_model, make_reference, status, tiny_recipe
from torch import Tensor

from qwenscope.activations.harvest import harvest
from qwenscope.activations.windows import Windows
from qwenscope.errors import CorpusError, TrainingError
from qwenscope.lm.forward import site_rows
from qwenscope.lm.model import LanguageModel
from qwenscope.recipe import Recipe
from qwenscope.training.run import train
from qwenscope.training.telemetry import Progress

MakeRecipe = Callable[..., Recipe]
HARVEST = "qwenscope.activations.source.harvest"
CORPUS = [conversation(i, 30) for i in range(60)]  # six windows of 300 tokens


class OneAtATime(ListStream):
    """Fails if two threads are in it at once; a call takes as long as another thread needs to get in its way."""

    def __init__(self, conversations: list[Any]) -> None:
        super().__init__(conversations)
        self._free = threading.Lock()

    def _alone(self, act: Callable[[], Any]) -> Any:
        assert self._free.acquire(blocking=False), "the corpus is read by two threads at once"
        try:
            threading.Event().wait(0.001)
            return act()
        finally:
            self._free.release()

    def __next__(self) -> Any:
        return self._alone(super().__next__)

    def state(self) -> dict[str, Any]:
        return self._alone(super().state)

    def restore(self, state: dict[str, Any]) -> None:
        self._alone(lambda: super(OneAtATime, self).restore(state))

    def report(self) -> dict[str, Any]:
        return self._alone(super().report)


def rows(batches: list[dict[int, Tensor]]) -> dict[int, Tensor]:
    return {layer: torch.cat([batch[layer] for batch in batches]) for layer in LAYERS}


def same(left: list[dict[int, Tensor]], right: list[dict[int, Tensor]]) -> bool:
    return len(left) == len(right) and all(rows(left)[layer].equal(rows(right)[layer]) for layer in LAYERS)


def harvest_threads() -> set[threading.Thread]:
    """Of this test and of any before it that still hold theirs."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("harvest")}


@pytest.fixture
def harvested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads of all harvests, in order."""
    threads: list[str] = []

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return harvest(*args)

    monkeypatch.setattr(HARVEST, noted)
    return threads


@pytest.mark.parametrize("tokens", [100, 299, 300, 301, 1000, 1800, 5000])
def test_no_window_is_harvested_that_the_run_does_not_need(
    lm: LanguageModel, recipe: MakeRecipe, harvested: list[str], tokens: int
) -> None:
    """From the start and from the middle: as many harvests as without overlap, and the same batches."""
    batches: dict[bool, list[dict[int, Tensor]]] = {}
    counts: dict[bool, list[int]] = {}
    for overlap in (False, True):
        made = recipe(overlap=overlap, tokens=tokens)
        sizes = [min(128, tokens - start) for start in range(0, tokens, 128)]
        batches[overlap], counts[overlap] = [], []
        with closing(Windows(lm, OneAtATime(CORPUS), made)) as source:
            for size in sizes[: len(sizes) // 2]:
                batches[overlap].append(source.next_batch(size))
            state = json.loads(json.dumps(source.state()))
        harvested.clear()
        with closing(Windows(lm, OneAtATime(CORPUS), made)) as source:
            source.restore(state)
            for size in sizes[len(sizes) // 2 :]:
                batches[overlap].append(source.next_batch(size))
        counts[overlap].append(len(harvested))
        harvested.clear()
        with closing(Windows(lm, OneAtATime(CORPUS), made)) as source:
            source.calibration_rows()
            assert same([source.next_batch(size) for size in sizes], batches[overlap])
            assert source.report() == {"conversations": min(60, 10 * -(-tokens // 300))}
        counts[overlap].append(len(harvested))
    assert same(batches[True], batches[False])
    assert counts[True] == counts[False] == [counts[True][0], min(6, -(-tokens // 300))]


def test_the_next_window_is_harvested_before_it_is_asked_for(
    lm: LanguageModel, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another thread, and while this one consumes: the second harvest waits for a step that was taken meanwhile."""
    stepped, began = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def waits(*args: Any) -> Any:
        threads.append(threading.current_thread())
        if len(threads) == 2:
            began.set()
            assert stepped.wait(60)
        return harvest(*args)

    monkeypatch.setattr(HARVEST, waits)
    with closing(Windows(lm, ListStream(CORPUS), recipe())) as source:
        first = source.next_batch(100)
        assert began.wait(60)
        before = source.state(), source.tokens_read, source.left_out
        second = source.next_batch(100)
        assert before[1:] == (source.tokens_read, source.left_out)  # the window in the making does not count yet
        assert source.state() == {**before[0], "offset": 200}
        stepped.set()
        third = source.next_batch(300)
    assert threading.current_thread() not in threads
    with closing(Windows(lm, ListStream(CORPUS), recipe(overlap=False))) as plain:
        assert same([first, second, third], [plain.next_batch(size) for size in (100, 100, 300)])


def test_restore_and_report_in_the_middle_of_a_harvest(lm: LanguageModel, recipe: MakeRecipe) -> None:
    """Whatever is in the making is waited for: the stream is never where another thread put it."""
    with closing(Windows(lm, OneAtATime(CORPUS), recipe(tokens=1800))) as source:
        begin = source.state()
        first = [source.next_batch(128) for _ in range(3)]
        assert source.report() == {"conversations": 20}
        source.restore(begin)
        assert same([source.next_batch(128) for _ in range(3)], first)
        assert source.report() == {"conversations": 20}
        assert source.next_batch(128)[LAYERS[0]].shape == (128, 32)


def test_another_pass_of_the_language_model_meanwhile_disturbs_no_row(lm: LanguageModel, recipe: MakeRecipe) -> None:
    ids_CT = torch.arange(40).remainder(90).unsqueeze(0)
    alone = site_rows(lm, ids_CT, LAYERS)
    with closing(Windows(lm, ListStream(CORPUS), recipe(overlap=False))) as plain:
        want = [plain.next_batch(100) for _ in range(10)]
    with closing(Windows(lm, ListStream(CORPUS), recipe())) as source:
        for batch in want:
            assert same([source.next_batch(100)], [batch])
            for _ in range(5):
                assert all(x_CTD.equal(alone[layer]) for layer, x_CTD in site_rows(lm, ids_CT, LAYERS).items())


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_of_a_harvest_comes_when_its_rows_are_due(
    lm: LanguageModel, recipe: MakeRecipe, overlap: bool
) -> None:
    """Every row before it is handed out: with and without overlap a run fails after the same step."""
    corpus = [*CORPUS[:12], *[conversation(100 + i, 30, BROKEN) for i in range(10)]]
    with closing(Windows(lm, ListStream(corpus), recipe(overlap=overlap))) as source:
        for _ in range(3):
            assert len(source.next_batch(100)[LAYERS[0]]) == 100
        for _ in range(2):
            with pytest.raises(TrainingError, match="8 of 300 rows at hook point sae_5 are not finite"):
                source.next_batch(100)


def test_the_corpus_ends_in_advance(lm: LanguageModel, recipe: MakeRecipe, harvested: list[str]) -> None:
    with closing(Windows(lm, ListStream(CORPUS[:14]), recipe(tokens=5000))) as source:
        assert [len(source.next_batch(200)[LAYERS[0]]) for _ in range(5)] == [200, 200, 20, 0, 0]
        assert source.report() == {"conversations": 14}
    assert len(harvested) == 2
    with closing(Windows(lm, ListStream([]), recipe())) as empty, pytest.raises(CorpusError, match="no conversation"):
        empty.calibration_rows()


def test_close_waits_and_leaves_no_thread(
    lm: LanguageModel, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = harvest_threads()
    began, go_on, ended = threading.Event(), threading.Event(), []

    def waits(*args: Any) -> Any:
        if not ended:
            ended.append("first")
            return harvest(*args)
        began.set()
        assert go_on.wait(60)
        made = harvest(*args)
        ended.append("second")
        return made

    monkeypatch.setattr(HARVEST, waits)
    source = Windows(lm, ListStream(CORPUS), recipe())
    source.next_batch(100)
    assert began.wait(60)
    threading.Timer(0.05, go_on.set).start()
    state = source.state()
    source.close()
    assert ended == ["first", "second"]
    assert harvest_threads() <= before
    assert source.state() == state
    assert source.report() == {"conversations": 10}
    source.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A whole run with overlap, as is the default."""
    return make_reference(model, tmp_path_factory.mktemp("reference") / "run")


def test_a_run_without_overlap_ends_the_same(model: Path, reference: Reference, tmp_path: Path) -> None:
    train(tiny_recipe(model, activations__overlap=False), tmp_path / "run")
    reference.check(tmp_path / "run")


def test_overlap_may_change_on_resume_and_an_error_leaves_no_thread(
    model: Path, reference: Reference, tmp_path: Path
) -> None:
    """Stopped twice in the middle of a window, once each way; a run that fails waits for the harvest under way."""
    run, before = tmp_path / "run", harvest_threads()

    def stop_at(tokens: int) -> Callable[[Progress], None]:
        def stop(progress: Progress) -> None:
            if progress.phase == "training" and progress.tokens >= tokens:
                raise ArithmeticError("something of its own")

        return stop

    for part, overlap in ((1, True), (2, False)):
        changed = tiny_recipe(model, activations__overlap=overlap)
        with pytest.raises(ArithmeticError, match="something of its own"):
            train(changed, run, resume=part > 1, on_progress=stop_at(part * STEPS // 3 * BATCH))
        assert harvest_threads() <= before
        assert status(run)["state"] == "failed"
    train(tiny_recipe(model), run, resume=True)
    reference.check(run)
