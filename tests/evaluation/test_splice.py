"""Splice losses equal whole passes of one conversation at a time, in plain float64."""

from __future__ import annotations

import copy
import math
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation_cases import DIM, LAYER_OF, SITE_OF, constant_sae, conversation, identity_sae, with_rows_left_out
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenscope.activations.harvest import LEFT_OUT
from qwenscope.errors import CorpusError, ModelError
from qwenscope.evaluation.measure import SplitMeter
from qwenscope.lm.batches import make_batches
from qwenscope.lm.forward import final_hidden
from qwenscope.lm.hooks import Recording, intervene, record, restart
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.lm.splice import LEAST_ROWS, CleanPass, clean_pass, losses, variant_pass
from qwenscope.sae.sae import TopKSAE

SITE = Site("layers.3")


def batch_of(conversations, budget=1000):
    ids = [c.token_ids for c in conversations]
    return make_batches([len(i) for i in ids], ids, budget, 0, torch.device("cpu"))[0]


def whole_pass(lm, token_ids, layer=None, edit=None) -> torch.Tensor:
    """Log-probabilities of one conversation alone, through the model's own forward and LM head, float64 [T, V]."""
    edits = {} if layer is None else {layer: edit}
    with intervene(lm, edits), torch.no_grad():
        output = lm.model(input_ids=torch.from_numpy(token_ids).long()[None], use_cache=False)
    return output.logits[0].double().log_softmax(-1)


def stream_of(lm, token_ids, layer) -> torch.Tensor:
    caught = []
    whole_pass(lm, token_ids, layer, lambda x: caught.append(x) or x)
    return caught[0][0]


@pytest.mark.parametrize("layer", [0, 2, 3, 7])
def test_restarting_above_a_layer_is_bit_identical_to_editing_a_whole_pass(lm, conversations, layer) -> None:
    batch = batch_of(conversations)
    site = Site.of(layer)
    clean = clean_pass(lm, batch, [site])
    edited = clean.recording.rows[site] * 0.5 + 0.1
    with intervene(lm, {layer: lambda x: x * 0.5 + 0.1}):
        whole = final_hidden(lm, batch.input_ids_CT)
    ran = []
    handles = [block.mlp.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(lm.layers)]
    with restart(lm, clean.recording, site, edited):
        assert torch.equal(final_hidden(lm, batch.input_ids_CT), whole)
    for handle in handles:
        handle.remove()
    assert ran == list(range(layer + 1, len(lm.layers))), "layers up to the hook are not computed"
    assert torch.equal(final_hidden(lm, batch.input_ids_CT)[clean.predicting], clean.hidden_PD), "and come back after"


def test_layers_come_back_after_an_error(lm, conversations) -> None:
    batch = batch_of(conversations)
    before = final_hidden(lm, batch.input_ids_CT)
    with record(lm, [SITE]) as recording:
        final_hidden(lm, batch.input_ids_CT)
    with pytest.raises(RuntimeError, match="midway"), restart(lm, recording, SITE, before):
        raise RuntimeError("midway")
    assert torch.equal(final_hidden(lm, batch.input_ids_CT), before)


def test_layers_that_return_tuples_are_spliced_alike(lm, conversations) -> None:
    batch = batch_of(conversations)
    expected = variant_pass(lm, clean := clean_pass(lm, batch, [SITE]), SITE, clean.recording.rows[SITE] + 1)

    class InTuple(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states, **kwargs):
            return (self.inner(hidden_states, **kwargs),)

    class FirstOf(InTuple):
        """What the loop over layers does in families that return tuples."""

        def forward(self, hidden_states, **kwargs):
            return self.inner(hidden_states, **kwargs)[0]

    lm = copy.deepcopy(lm)
    lm.layers = [InTuple(layer) for layer in lm.layers]
    lm.model.model.layers = torch.nn.ModuleList(FirstOf(layer) for layer in lm.layers)
    clean = clean_pass(lm, batch, [SITE])
    assert torch.equal(variant_pass(lm, clean, SITE, clean.recording.rows[SITE] + 1), expected)


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_losses_equal_one_conversation_at_a_time(lm, conversations, chunk) -> None:
    batch = batch_of(conversations)
    clean = clean_pass(lm, batch, [SITE])
    hidden = variant_pass(lm, clean, SITE, clean.recording.rows[SITE] * 0.7)
    ce_clean, scored = losses(lm, clean, {"shrunk": hidden}, chunk)
    expected_ce, expected_spliced, expected_kl = [], [], []
    for member in batch.members:
        ids = conversations[member].token_ids
        target = torch.from_numpy(ids[1:]).long()[:, None]
        p = whole_pass(lm, ids)[:-1]
        q = whole_pass(lm, ids, 3, lambda x: x * 0.7)[:-1]
        expected_ce.append(-p.gather(1, target).squeeze(1))
        expected_spliced.append(-q.gather(1, target).squeeze(1))
        expected_kl.append((p.exp() * (p - q)).sum(1))
    torch.testing.assert_close(ce_clean, torch.cat(expected_ce), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scored["shrunk"].ce_P, torch.cat(expected_spliced), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scored["shrunk"].kl_P, torch.cat(expected_kl), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("vocabulary", "scale"), [(None, 1.0), (49_152, 1.0), (49_153, 30.0)])
def test_losses_from_the_same_logits_are_float64s_to_1e_6(lm, conversations, vocabulary, scale) -> None:
    """At the model's own vocabulary and at a real one, with flat and with steep distributions."""
    lm = lm if vocabulary is None else vocabulary_of(lm, vocabulary)
    clean = clean_pass(lm, batch_of(conversations), [SITE])
    clean = replace(clean, hidden_PD=clean.hidden_PD * scale)
    hidden = variant_pass(lm, clean, SITE, clean.recording.rows[SITE] * 0.7) * scale
    ce_clean, scored = losses(lm, clean, {0: hidden}, 11)
    p = lm.model.lm_head(clean.hidden_PD).double().log_softmax(1).numpy()
    q = lm.model.lm_head(hidden).double().log_softmax(1).numpy()
    rows = np.arange(len(p))
    np.testing.assert_allclose(ce_clean.numpy(), -p[rows, clean.target_P.numpy()], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scored[0].ce_P.numpy(), -q[rows, clean.target_P.numpy()], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scored[0].kl_P.numpy(), (np.exp(p) * (p - q)).sum(1), rtol=1e-6, atol=1e-6)
    assert scored[0].kl_P.mean().item() == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-6)


def test_logits_are_never_made_for_more_rows_than_a_chunk(lm, conversations) -> None:
    clean = clean_pass(lm, batch_of(conversations), [SITE])
    rows = []
    handle = lm.model.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[-2]))
    losses(lm, clean, {"a": clean.hidden_PD, "b": clean.hidden_PD}, chunk=5)
    handle.remove()
    assert max(rows) == 5
    assert sum(rows) == 3 * len(clean.target_P), "clean logits are made once for all variants"


def vocabulary_of(lm, size: int) -> LanguageModel:
    """The model with another LM head, of `size` random rows."""
    model = copy.copy(lm.model)
    model._modules = dict(lm.model._modules)
    model.lm_head = torch.nn.Linear(DIM, size, bias=False).requires_grad_(False)
    return replace(lm, model=model)


class LargestTensor(TorchDispatchMode):
    """Size in bytes of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.size = max([self.size, *(tensor.untyped_storage().nbytes() for tensor in tensors)])
        return found


def test_no_tensor_exceeds_a_chunk_at_the_real_vocabulary(lm, conversations) -> None:
    clean = clean_pass(lm, batch_of(conversations), [SITE])
    with LargestTensor() as largest:
        losses(vocabulary_of(lm, 248_320), clean, {0: clean.hidden_PD, 1: clean.hidden_PD})
    assert len(clean.target_P) > LEAST_ROWS, "several chunks"
    assert largest.size == LEAST_ROWS * 248_320 * 4


def test_memory_does_not_grow_with_chunks(lm, conversations) -> None:
    """What is kept of each chunk must not split the heap: that once grew it by every chunk's logits."""
    rows, variants, vocabulary = 4096, 12, 4096
    hidden_PD = torch.randn(rows, DIM)
    none = torch.zeros(0)
    clean = CleanPass(
        batch_of(conversations), Recording({}, {}), none, hidden_PD, torch.zeros(rows, dtype=torch.int64), none
    )
    wide = vocabulary_of(lm, vocabulary)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses(wide, clean, dict.fromkeys(range(variants), hidden_PD))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 0.25 * rows * vocabulary * 8 * variants


def measure(lm, recipe, conversations, sae_of) -> dict:
    saes = {sae_id: sae_of(sae_id) for sae_id in LAYER_OF}
    return SplitMeter(lm, saes, SITE_OF, conversations, recipe).run()


def test_a_perfect_sae_changes_nothing(lm, recipe, conversations) -> None:
    result = measure(lm, recipe, conversations, lambda _: identity_sae())
    for sae_id in LAYER_OF:
        figures = result.figures[sae_id]
        assert figures["fvu"] == 0
        assert figures["ce_spliced"] == figures["ce_clean"]
        assert figures["ce_recovered_zero"] == figures["ce_recovered_mean"] == 1
        assert figures["kl"] == 0
        assert figures["cosine"] == pytest.approx(1, abs=1e-12)
        assert figures["l0"] == DIM, "one of plus and minus for each axis"
        assert result.routing[sae_id]["overlap"] == [1.0] * (7 - LAYER_OF[sae_id])
        assert result.routing[sae_id]["kl"] == [0.0] * (7 - LAYER_OF[sae_id])
    assert all(shift == 0 for states in result.states.values() for shift in states["shift"])


def test_a_zero_sae_is_the_zero_ablation_and_a_mean_sae_the_mean_ablation(lm, recipe, conversations) -> None:
    streams = {
        layer: torch.cat([stream_of(lm, c.token_ids, layer) for c in conversations]).double()
        for layer in LAYER_OF.values()
    }
    zero = measure(lm, recipe, conversations, lambda _: constant_sae())
    mean = measure(lm, recipe, conversations, lambda sae_id: constant_sae(streams[LAYER_OF[sae_id]].mean(0).float()))
    for sae_id, layer in LAYER_OF.items():
        x = streams[layer]
        ratio = float((x**2).sum() / ((x - x.mean(0)) ** 2).sum())
        figures = zero.figures[sae_id]
        assert figures["fvu"] == pytest.approx(ratio, rel=1e-5)
        assert figures["ce_spliced"] == figures["ce_zero_ablation"]
        assert figures["ce_recovered_zero"] == 0
        assert figures["kl"] == figures["kl_zero_ablation"]
        assert figures["l0"] == 0
        assert figures["dead_fraction"] == 1
        figures = mean.figures[sae_id]
        assert figures["fvu"] == pytest.approx(1, rel=1e-6)
        assert figures["ce_recovered_mean"] == pytest.approx(0, abs=1e-3)
        assert mean.figures[sae_id]["ce_clean"] == zero.figures[sae_id]["ce_clean"]


def test_a_harmful_sae_goes_below_zero_and_is_not_clipped(lm, recipe, conversations) -> None:
    result = measure(lm, recipe, conversations, lambda _: identity_sae(-8.0))
    assert result.figures["sae_delta"]["explained_variance"] < -1
    worst = min(figures["ce_recovered_mean"] for figures in result.figures.values())
    assert worst < 0


def test_figures_equal_a_plain_computation_over_single_conversations(lm, recipe, conversations) -> None:
    saes = {sae_id: TopKSAE(16, 32, 5, seed=layer) for sae_id, layer in LAYER_OF.items()}
    result = SplitMeter(lm, saes, SITE_OF, conversations, recipe).run()
    for sae_id, layer in LAYER_OF.items():
        clean, spliced, rows, hats = [], [], [], []
        with torch.no_grad():
            for c in conversations:
                rows.append(x := stream_of(lm, c.token_ids, layer))
                hats.append(saes[sae_id](x))
                target = torch.from_numpy(c.token_ids[1:]).long()[:, None]
                clean.append(-whole_pass(lm, c.token_ids)[:-1].gather(1, target))
                q = whole_pass(lm, c.token_ids, layer, saes[sae_id])
                spliced.append(-q[:-1].gather(1, target))
        x, x_hat = torch.cat(rows).double(), torch.cat(hats).double()
        figures = result.figures[sae_id]
        assert figures["tokens"] == len(x)
        assert figures["predicted_tokens"] == len(torch.cat(clean))
        assert figures["fvu"] == pytest.approx(float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()), rel=1e-3)
        assert figures["ce_clean"] == pytest.approx(float(torch.cat(clean).mean()), rel=1e-3)
        assert figures["ce_spliced"] == pytest.approx(float(torch.cat(spliced).mean()), rel=1e-3)
        sums = result.sums[sae_id]
        assert sums["residual"].sum() / sums["deviation"].sum() == pytest.approx(figures["fvu"], rel=1e-9)
        assert sums["ce_clean"][5] == 0, "a conversation of one token predicts nothing"
        assert sums["ce_spliced"][1] == pytest.approx(float(spliced[1].sum()), rel=1e-3)


def test_rows_left_out_are_counted_and_keep_their_stream(lm, recipe, conversations) -> None:
    result = measure(lm, with_rows_left_out(recipe), conversations, lambda _: constant_sae())
    figures = result.figures["sae_attn"]
    assert figures["left_out"] == dict.fromkeys(LEFT_OUT, 0) | {"first_position": len(conversations)}
    assert figures["tokens"] == sum(len(c.token_ids) - 1 for c in conversations)
    spliced = []
    for c in conversations:

        def zero_all_but_the_first(x):
            return torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], dim=1)

        q = whole_pass(lm, c.token_ids, 3, zero_all_but_the_first)
        spliced.append(-q[:-1].gather(1, torch.from_numpy(c.token_ids[1:]).long()[:, None]))
    assert figures["ce_spliced"] == pytest.approx(float(torch.cat(spliced).mean()), rel=1e-3)


def test_special_tokens_are_the_tokenizers_added_ones(lm, recipe, conversations) -> None:
    result = measure(lm, recipe, conversations, lambda _: constant_sae())
    ids = np.concatenate([c.token_ids for c in conversations])
    assert result.figures["sae_attn"]["special_tokens"]["tokens"] == int((ids >= 59).sum()) > 0


def test_one_token_is_too_few(lm, recipe) -> None:
    with pytest.raises(CorpusError, match=r"split chat has 1 usable tokens in 1 conversations"):
        measure(lm, recipe, [conversation(1, 3)], lambda _: identity_sae())


def test_two_tokens_are_enough(lm, recipe) -> None:
    figures = measure(lm, recipe, [conversation(2, 3)], lambda _: identity_sae()).figures["sae_attn"]
    assert figures["fvu"] == 0
    assert figures["predicted_tokens"] == 1
    assert math.isfinite(figures["ce_recovered_zero"])


def test_an_unused_layer_has_no_ce_recovered(lm, recipe, conversations, monkeypatch) -> None:
    monkeypatch.setattr(lm.model.model.norm, "forward", torch.zeros_like)
    with pytest.raises(ModelError, match=r"zero ablation at layers\.2"):
        measure(lm, recipe, conversations, lambda _: identity_sae())
