"""Forward passes: the full model's own numbers, only the needed layers, and exact rows from padded batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from by_layer import residual_streams
from lm.conftest import Checkpoint
from lm.families import tiny
from lm.tiny_models import FAMILIES
from torch import Tensor, nn

from qwenscope.errors import ModelError
from qwenscope.lm.batches import make_batches
from qwenscope.lm.forward import final_hidden, logits, site_rows, unembedding
from qwenscope.lm.hooks import record
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel, as_language_model
from qwenscope.lm.sites import Site
from qwenscope.recipe import LMRecipe

LENGTHS = [1, 2, 3, 5, 17, 63, 64, 65, 127, 128, 129, 300, 511, 512, 777, 1024, 1500, 2047, 2048]


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def lm(checkpoint: Checkpoint) -> LanguageModel:
    return load_language_model(LMRecipe(model=str(checkpoint("text")[0])), lm_head=True)


def hooks_left(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_bit_identical_to_hooks_on_the_full_model(checkpoint: Checkpoint, family: str) -> None:
    """Our pass of the truncated model against plain hooks in an ordinary pass of the model as transformers made it."""
    folder, full = checkpoint(family)
    lm = load_language_model(LMRecipe(model=str(folder)), last_layer=2)
    layers = next(part for part in full.get_decoder().children() if isinstance(part, nn.ModuleList))
    caught: dict[int, Tensor] = {}

    def catch(layer: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: caught.update(
            {layer: output[0] if isinstance(output, tuple) else output}
        )

    handles = [layers[layer].register_forward_hook(catch(layer)) for layer in (0, 1, 2)]
    with torch.no_grad():
        full(input_ids=ids(3, 70))
    for handle in handles:
        handle.remove()
    streams = residual_streams(lm, ids(3, 70), [2, 0, 1])
    assert list(streams) == [2, 0, 1]
    for layer, x_CTD in streams.items():
        assert x_CTD.shape == (3, 70, 32)
        assert torch.equal(x_CTD, caught[layer])


def test_later_layers_are_not_run(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_language_model(LMRecipe(model=str(checkpoint("text")[0])), lm_head=True)
    want = residual_streams(lm, ids(2, 10), [3])[3]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this must not run")

    for layer in lm.layers[4:]:
        monkeypatch.setattr(layer, "forward", refuse)
    monkeypatch.setattr(lm.model.get_decoder().norm, "forward", refuse)
    monkeypatch.setattr(lm.model.get_output_embeddings(), "forward", refuse)
    assert torch.equal(residual_streams(lm, ids(2, 10), [1, 3])[3], want)
    with pytest.raises(AssertionError, match="must not run"):
        residual_streams(lm, ids(2, 10), [4])
    assert hooks_left(lm.model) == 0


@pytest.mark.parametrize(("family", "longest"), [("text", 2048), ("llama", 2048), ("gemma", 300)])
def test_padded_rows_equal_the_conversation_alone(checkpoint: Checkpoint, family: str, longest: int) -> None:
    """FAST is exact: every row of right-padded batches within 1e-5 of the same conversation run alone, all layers."""
    lm = load_language_model(LMRecipe(model=str(checkpoint(family)[0])))
    layers = range(len(lm.layers))
    lengths = [length for length in LENGTHS if length <= longest]
    token_ids = [ids(length, seed=length).numpy() for length in lengths]
    compared = 0
    for batch in make_batches(lengths, token_ids, 8192, 0, lm.device):
        streams = residual_streams(lm, batch.input_ids_CT, layers)
        for row, length in enumerate(batch.lengths_C):
            alone = residual_streams(lm, batch.input_ids_CT[row : row + 1, :length], layers)
            for layer in layers:
                got_TD, want_TD = streams[layer][row, :length], alone[layer][0]
                worst = ((got_TD - want_TD).norm(dim=-1) / want_TD.norm(dim=-1)).max()
                assert worst < 1e-5, (family, length, layer)
            compared += length
    assert compared == sum(lengths)


@pytest.mark.parametrize("lengths", [[1, 5, 65, 400], pytest.param(LENGTHS, marks=pytest.mark.slow)])
def test_padded_rows_of_the_standin_are_exact_at_its_nine_hook_points(lengths: list[int]) -> None:
    """The same on a trained model with both layer kinds 36 layers deep."""
    lm = load_language_model(LMRecipe(model="standin", dtype="float32"), last_layer=35)
    hooked = [6, 7, 14, 15, 21, 22, 23, 34, 35]
    assert [lm.layer_kinds[layer] for layer in hooked] == ["deltanet", "attention"] * 2 + ["deltanet"] * 2 + [
        "attention",
        "deltanet",
        "attention",
    ]
    token_ids = [ids(length, seed=length).numpy() for length in lengths]
    for batch in make_batches(lengths, token_ids, 8192, 0, lm.device):
        streams = residual_streams(lm, batch.input_ids_CT, hooked)
        for row, length in enumerate(batch.lengths_C):
            alone = residual_streams(lm, batch.input_ids_CT[row : row + 1, :length], hooked)
            for layer in hooked:
                apart_TD = streams[layer][row, :length] - alone[layer][0]
                assert (apart_TD.norm(dim=-1) / alone[layer][0].norm(dim=-1)).max() < 1e-5, (length, layer)


def test_padding_and_neighbours_do_not_matter(lm: LanguageModel) -> None:
    """Other tokens behind the padding and other conversations in the batch change nothing."""
    batch = ids(3, 40)
    want = residual_streams(lm, batch, [5, 7])
    batch[0, 25:] = 7
    batch[1] = 9
    got = residual_streams(lm, batch, [5, 7])
    for layer in want:
        torch.testing.assert_close(got[layer][0, :25], want[layer][0, :25], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got[layer][1], want[layer][1], rtol=1e-2)


def test_logits_are_the_full_models(checkpoint: Checkpoint) -> None:
    for family in FAMILIES:
        folder, full = checkpoint(family)
        lm = load_language_model(LMRecipe(model=str(folder)), lm_head=True)
        hidden = final_hidden(lm, ids(2, 30))
        with torch.no_grad():
            want = full(input_ids=ids(2, 30)).logits
        torch.testing.assert_close(logits(lm, hidden), want, rtol=1e-5, atol=1e-5)
        chunks = torch.cat([logits(lm, chunk) for chunk in hidden.flatten(0, 1).split(7)])
        torch.testing.assert_close(chunks, want.flatten(0, 1), rtol=1e-5, atol=1e-5)
        assert not hidden.requires_grad


def test_what_was_not_built_is_named(checkpoint: Checkpoint) -> None:
    folder = str(checkpoint("text")[0])
    cut = load_language_model(LMRecipe(model=folder), last_layer=3, lm_head=True)
    with pytest.raises(ModelError, match=r"layer 4 of .* was not built; layers 0 to 3 were"):
        residual_streams(cut, ids(1, 3), [1, 4])
    with pytest.raises(ModelError, match="was loaded up to layer 3; logits need all layers"):
        final_hidden(cut, ids(1, 3))
    assert unembedding(cut).shape == (96, 32)
    headless = load_language_model(LMRecipe(model=folder))
    with pytest.raises(ModelError, match="without its LM head"):
        logits(headless, final_hidden(headless, ids(1, 3)))


def test_rows_beyond_a_models_learned_positions_are_refused() -> None:
    learned = as_language_model(tiny("gpt2").requires_grad_(False))
    assert learned.known_positions == 64
    with pytest.raises(ModelError, match=r"knows 64 positions.*has 65 tokens; set corpus.max_length to 64"):
        residual_streams(learned, ids(1, 65), [0])
    assert as_language_model(tiny("llama")).known_positions is None


def test_a_model_that_reads_long_texts_in_parts_is_refused() -> None:
    """Its layers run once per part, so that a hook sees the last one, or with a pass cut off the first."""
    lm = as_language_model(tiny("xlstm", max_inference_chunksize=5).requires_grad_(False))
    assert site_rows(lm, ids(2, 5), [1])[Site.of(1)].shape == (2, 5, 32)
    with pytest.raises(ModelError, match=r"layers\.1 of .* gives 5 of 12 positions.*corpus\.max_length"):
        site_rows(lm, ids(2, 12), [1])
    with pytest.raises(ModelError, match=r"layers\.1 of .* ran twice"), record(lm, [Site.of(1)]):
        final_hidden(lm, ids(2, 12))
