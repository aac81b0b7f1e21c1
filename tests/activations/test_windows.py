"""Windows: each kept token once, in an order that is a function of the seed, resumable anywhere."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from activations.conftest import BROKEN, LAYERS, LOUD, ListStream, conversation
from torch import Tensor

from qwenscope.activations.harvest import LEFT_OUT, Harvest, harvest
from qwenscope.activations.windows import Windows
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import CheckpointError, CorpusError, RecipeError, TrainingError
from qwenscope.lm.forward import site_rows
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.recipe import LMRecipe, Recipe
from qwenscope.seeds import generator

MakeRecipe = Callable[..., Recipe]
CORPUS = [conversation(i, 3 + (i * 7) % 40) for i in range(60)]
TOKENS = sum(len(c.token_ids) for c in CORPUS)
HARVEST = "qwenscope.activations.source.harvest"
Batches = list[dict[int, Tensor]]


def drain(source: Windows, size: int) -> tuple[Batches, list[tuple[str, int]]]:
    """All batches to the corpus's end, and the tokens they came from."""
    batches, tokens = [], []
    while len((batch := source.next_batch(size))[LAYERS[0]]):
        batches.append(batch)
        tokens += source.last_tokens()
    return batches, tokens


def equal(left: Batches, right: Batches) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a[layer], b[layer]) for a, b in zip(left, right, strict=True) for layer in LAYERS
    )


@pytest.mark.parametrize("size", [1, 77, 128, 300])
def test_each_token_once(lm: LanguageModel, recipe: MakeRecipe, size: int) -> None:
    source = Windows(lm, ListStream(CORPUS), recipe())
    batches, tokens = drain(source, size)
    assert sorted(tokens) == sorted((c.id, t) for c in CORPUS for t in range(len(c.token_ids)))
    assert [len(batch[LAYERS[0]]) for batch in batches] == [size] * (TOKENS // size) + [TOKENS % size] * (
        TOKENS % size > 0
    )
    assert source.tokens_read == TOKENS
    assert source.state()["window"] > 3
    assert source.report() == {"conversations": 60}
    assert source.next_batch(size)[LAYERS[0]].shape == (0, 32)


def test_rows_belong_to_their_tokens_at_every_hook_point(lm: LanguageModel, recipe: MakeRecipe) -> None:
    """Each row against its own conversation run alone: layers, shuffle and tokens fit together."""
    source = Windows(lm, ListStream(CORPUS), recipe())
    alone = {c.id: site_rows(lm, torch.tensor(c.token_ids[None]).long(), LAYERS) for c in CORPUS}
    for _ in range(4):
        batch = source.next_batch(100)
        for layer in LAYERS:
            want = torch.stack([alone[id][layer][0, position] for id, position in source.last_tokens()])
            torch.testing.assert_close(batch[layer], want, rtol=1e-5, atol=1e-5)


def test_order_is_the_seeds_permutation_of_each_window(lm: LanguageModel, recipe: MakeRecipe) -> None:
    """The whole order by independent arithmetic: conversations until 300 tokens, randperm by (seed, window, i)."""
    _, tokens = drain(Windows(lm, ListStream(CORPUS), recipe(seed=7)), 64)
    want: list[tuple[str, int]] = []
    window: list[tuple[str, int]] = []
    index = 0
    for one in CORPUS:
        window += [(one.id, t) for t in range(len(one.token_ids))]
        if len(window) >= 300 or one is CORPUS[-1]:
            want += [window[r] for r in torch.randperm(len(window), generator=generator(7, "window", index))]
            window, index = [], index + 1
    assert tokens == want
    assert drain(Windows(lm, ListStream(CORPUS), recipe(seed=8)), 64)[1] != want


def test_batches_are_a_pure_function_of_recipe_and_seed(lm: LanguageModel, recipe: MakeRecipe) -> None:
    first, _ = drain(Windows(lm, ListStream(CORPUS), recipe()), 128)
    second, _ = drain(Windows(lm, ListStream(CORPUS), recipe()), 128)
    assert equal(first, second)


def test_resume_anywhere_is_exact_and_harvests_one_window(
    lm: LanguageModel, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = [*CORPUS[:20], conversation(70, 30, LOUD), *CORPUS[20:]]
    source = Windows(lm, ListStream(corpus), recipe(overlap=False))
    states, batches, counts = [], [], []
    for _ in range(9):
        states.append(json.dumps(source.state()))
        batches.append(source.next_batch(128))
        counts.append((source.tokens_read, source.left_out))
    harvested: list[int] = []
    monkeypatch.setattr(HARVEST, lambda *args: harvested.append(1) or harvest(*args))
    for start, state in enumerate(states):
        resumed = Windows(lm, ListStream(corpus), recipe(overlap=False))
        resumed.restore(json.loads(state))
        assert json.loads(json.dumps(resumed.state())) == json.loads(state)
        harvested.clear()
        assert equal([resumed.next_batch(128)], [batches[start]])
        assert len(harvested) <= 2  # the window itself, and the next one where the batch straddles
        for later in range(start + 1, min(start + 4, len(states))):
            assert equal([resumed.next_batch(128)], [batches[later]])
            assert (resumed.tokens_read, resumed.left_out) == counts[later]
    assert source.left_out["outlier"] == 1


def test_state_at_a_windows_end_does_not_go_back(lm: LanguageModel, recipe: MakeRecipe) -> None:
    source = Windows(lm, ListStream([conversation(i, 30) for i in range(30)]), recipe())
    source.next_batch(300)
    assert (source.state()["window"], source.state()["offset"]) == (1, 0)
    assert source.state()["cursor"] == {"next": 10}


def test_a_changed_corpus_is_noticed_on_resume(lm: LanguageModel, recipe: MakeRecipe) -> None:
    source = Windows(lm, ListStream(CORPUS), recipe())
    for _ in range(4):
        source.next_batch(100)
    for changed in (CORPUS[:14] + CORPUS[15:], CORPUS[:18]):
        resumed = Windows(lm, ListStream(changed), recipe())
        resumed.restore(source.state())
        with pytest.raises(CheckpointError, match=r"window 1 holds other conversations .* corpus\.sources changed"):
            resumed.next_batch(100)


def test_left_out_rows_are_counted_and_never_handed_out(lm: LanguageModel, recipe: MakeRecipe) -> None:
    corpus = [*CORPUS[:30], conversation(70, 30, LOUD), conversation(71, 30, BROKEN), *CORPUS[30:]]
    source = Windows(lm, ListStream(corpus), recipe(skip_first_position=True))
    batches, tokens = drain(source, 128)
    assert source.left_out == dict.fromkeys(LEFT_OUT, 0) | {"non_finite": 1, "outlier": 1, "first_position": 62}
    assert source.tokens_read == TOKENS + 60 == len(tokens) + 64
    assert all(batch[layer].isfinite().all() for batch in batches for layer in LAYERS)
    assert not {(f"{70:016x}", 29), (f"{71:016x}", 29)} & set(tokens)


def test_windows_of_unlike_size_take_memory_of_one_size(
    lm: LanguageModel, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, sizes = set(), set()

    def watched(*args: Any) -> Harvest:
        made = harvest(*args)
        rows.update(len(x_RD) for x_RD in made.rows.values())
        sizes.update(x_RD.untyped_storage().nbytes() for x_RD in made.rows.values())
        return made

    monkeypatch.setattr(HARVEST, watched)
    loud = [conversation(100 + i, 20, LOUD) for i in range(3)]  # windows with rows left out, too
    drain(Windows(lm, ListStream(loud + CORPUS), recipe(outlier_factor=10.0)), 77)
    assert len(rows) > 3
    assert sizes == {(300 + 64) * 32 * lm.dtype.itemsize}


def test_broken_windows_name_the_hook_point(lm: LanguageModel, recipe: MakeRecipe) -> None:
    corpus = [conversation(i, 20, BROKEN) for i in range(20)]
    with pytest.raises(TrainingError, match="15 of 300 rows at hook point sae_5 are not finite"):
        Windows(lm, ListStream(corpus), recipe()).next_batch(100)


def test_calibration_rows_come_first_and_are_trained_on(lm: LanguageModel, recipe: MakeRecipe) -> None:
    plain, _ = drain(Windows(lm, ListStream(CORPUS), recipe()), 128)
    source = Windows(lm, ListStream(CORPUS), recipe(calibration_tokens=100))
    rows = source.calibration_rows()
    batches, _ = drain(source, 128)
    assert equal(batches, plain)
    for layer in LAYERS:
        assert torch.equal(rows[layer], batches[0][layer][:100])
    whole = Windows(lm, ListStream(CORPUS), recipe(calibration_tokens=10_000)).calibration_rows()
    assert 300 <= len(whole[LAYERS[0]]) < 350


@pytest.mark.parametrize("overlap", [False, True])
def test_windows_in_memory(
    lm: LanguageModel, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """When a window is harvested, no earlier one is alive but the one that is consumed at the time."""
    alive: weakref.WeakSet[Harvest] = weakref.WeakSet()
    counts: list[int] = []

    def watched(*args: Any) -> Harvest:
        counts.append(len(alive))
        made = harvest(*args)
        alive.add(made)
        return made

    monkeypatch.setattr(HARVEST, watched)
    drain(Windows(lm, ListStream(CORPUS), recipe(overlap=overlap, tokens=TOKENS)), 100)
    assert len(counts) > 3
    assert max(counts) <= int(overlap)


def test_bad_input_is_named(lm: LanguageModel, recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"training\.batch_size 301 exceeds activations\.window_tokens 300"):
        Windows(lm, ListStream(CORPUS), recipe()).next_batch(301)
    with pytest.raises(CorpusError, match="the corpus holds no conversation"):
        Windows(lm, ListStream([]), recipe()).next_batch(10)
    with pytest.raises(CorpusError, match="no conversation"):
        Windows(lm, ListStream([]), recipe()).calibration_rows()


def test_the_real_corpus_stream(recipe: MakeRecipe) -> None:
    """With the packaged model's tokenizer and generated conversations: once each, and resumable."""
    lm = load_language_model(LMRecipe(model="standin", dtype="float32"), last_layer=max(LAYERS).layer)
    wanted = recipe(window_tokens=2000)
    corpus = wanted.corpus.model_copy(update={"max_length": 256, "batch_tokens": 2048})
    wanted = wanted.model_copy(update={"corpus": corpus})

    def source() -> Windows:
        return Windows(lm, CorpusStream(corpus, lm.tokenizer, seed=wanted.seed), wanted)

    one, batches, tokens = source(), [], []
    for step in range(40):
        if step == 25:
            state = json.loads(json.dumps(one.state()))
        batches.append(one.next_batch(128))
        tokens += one.last_tokens()
    assert len(set(tokens)) == len(tokens) == 40 * 128
    assert one.report()["tokens"] == one.tokens_read
    two = source()
    two.restore(state)
    assert equal([two.next_batch(128) for _ in range(15)], batches[25:])
