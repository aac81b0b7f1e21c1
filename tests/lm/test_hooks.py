"""The intervention seam: replaces, composes, works in generation, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from by_layer import residual_streams
from lm.conftest import Checkpoint
from lm.tiny_models import FAMILIES
from torch import Tensor, nn

from qwenscope.errors import ModelError
from qwenscope.lm.forward import final_hidden, logits
from qwenscope.lm.hooks import intervene
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.recipe import LMRecipe

IDS = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def lm(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> LanguageModel:
    return load_language_model(LMRecipe(model=str(checkpoint(request.param)[0])), lm_head=True)


def scores(lm: LanguageModel, ids: Tensor = IDS) -> Tensor:
    return logits(lm, final_hidden(lm, ids))


def hooks_left(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_identity_changes_nothing(lm: LanguageModel) -> None:
    want = scores(lm)
    with intervene(lm, {0: lambda x: x, 2: torch.clone}):
        assert torch.equal(scores(lm), want)
    assert hooks_left(lm.model) == 0


def test_replacing_a_stream_by_another_inputs_gives_that_inputs_logits(lm: LanguageModel) -> None:
    """The residual stream is all that later layers see: swapping it in whole swaps the outcome."""
    other = IDS.flip(0)
    stream = residual_streams(lm, other, [1])[1]
    with intervene(lm, {1: lambda _: stream}):
        assert torch.equal(scores(lm), scores(lm, other))
    with intervene(lm, {1: torch.zeros_like}):
        ablated = scores(lm)
    assert torch.allclose(ablated[0, 5], ablated[1, 5], atol=1e-6)  # nothing of the inputs is left
    assert not torch.allclose(ablated[0, 5], scores(lm)[0, 5], atol=1e-3)


def test_later_streams_see_the_edit(lm: LanguageModel) -> None:
    plain = residual_streams(lm, IDS, [0, 1, 2])
    direction = torch.linspace(-1, 1, 32)
    with intervene(lm, {1: lambda x: x + direction}):
        edited = residual_streams(lm, IDS, [0, 1, 2])
    assert torch.equal(edited[0], plain[0])
    assert torch.equal(edited[1], plain[1] + direction)
    assert not torch.allclose(edited[2], plain[2] + direction, atol=1e-3)


def test_nested_edits_compose_from_outer_to_inner(lm: LanguageModel) -> None:
    plain = residual_streams(lm, IDS, [1])[1]
    with intervene(lm, {1: lambda x: x + 1}):
        with intervene(lm, {1: lambda x: x * 2}):
            assert torch.equal(residual_streams(lm, IDS, [1])[1], (plain + 1) * 2)
        assert torch.equal(residual_streams(lm, IDS, [1])[1], plain + 1)
    assert torch.equal(residual_streams(lm, IDS, [1])[1], plain)


def test_generation_with_cache_equals_generation_without(lm: LanguageModel) -> None:
    """The edit applies to the prompt and to each new position alike, so the cache makes no difference."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    lengths: list[int] = []

    def steer(x_CTD: Tensor) -> Tensor:
        lengths.append(x_CTD.shape[1])
        return x_CTD + 4 * direction

    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    plain = lm.model.generate(**prompt, **options, use_cache=True)
    with intervene(lm, {1: steer}):
        cached = lm.model.generate(**prompt, **options, use_cache=True)
        assert lengths == [12, 1, 1, 1, 1, 1]
        uncached = lm.model.generate(**prompt, **options, use_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)
    assert torch.equal(lm.model.generate(**prompt, **options, use_cache=True), plain)


def test_hooks_go_when_the_block_fails(lm: LanguageModel) -> None:
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), intervene(lm, {0: torch.clone, 1: fail}):
        scores(lm)
    with pytest.raises(ModelError, match=r"layer 99 of .* was not built"), intervene(lm, {0: torch.clone, 99: fail}):
        pass
    shapes = r"the edit at layers.1 made \(3, 12, 31\) of \(3, 12, 32\)"
    with pytest.raises(ModelError, match=shapes), intervene(lm, {1: lambda x: x[..., 1:]}):
        scores(lm)
    assert hooks_left(lm.model) == 0


def test_edits_keep_the_models_dtype(checkpoint: Checkpoint) -> None:
    lm = load_language_model(LMRecipe(model=str(checkpoint("text")[0]), dtype="bfloat16"), last_layer=2)
    with intervene(lm, {0: lambda x: x.float() + 0.5}):
        streams = residual_streams(lm, IDS, [0, 2])
    assert {stream.dtype for stream in streams.values()} == {torch.bfloat16}
