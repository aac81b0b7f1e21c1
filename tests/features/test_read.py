"""Reading on bare transformers models, and probes on planted directions."""

from __future__ import annotations

import pytest
import torch
from planted_suite import PLANTED, PLANTED_LATENT
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwenscope.errors import CorpusError, FormatError, ModelError
from qwenscope.features.probe import probe_direction
from qwenscope.features.read import read
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import as_language_model
from qwenscope.lm.sites import Site
from qwenscope.opening import Target, sites_of_suite
from qwenscope.sae.sae import TopKSAE

LAYERS = {"sae_delta": 1, "sae_attn": 3}


def test_a_bare_model_reads_like_a_loaded_one(target: Target) -> None:
    folder = target.recipe.lm.model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = f"order{PLANTED} status"
    reading = read(model, tokenizer, text, target.saes, sites=LAYERS)
    assert "".join(reading.tokens) == text
    assert reading.roles is None
    with torch.no_grad():
        states = model(torch.tensor([reading.token_ids]), output_hidden_states=True).hidden_states
        for sae_id, sae in target.saes.items():
            if LAYERS[sae_id] == 3:  # the last layer's entry of hidden_states stands after the final norm
                continue
            expected = sae.encode(states[LAYERS[sae_id] + 1][0])
            torch.testing.assert_close(reading.codes[sae_id].dense(), expected.dense())
    at = reading.tokens.index(PLANTED)
    assert PLANTED_LATENT in reading.codes["sae_delta"].indices[at]
    loaded = read(load_language_model(target.recipe.lm, last_layer=3), tokenizer, text, target.saes, sites=LAYERS)
    torch.testing.assert_close(loaded.codes["sae_attn"].dense(), reading.codes["sae_attn"].dense())


def test_messages_come_with_roles(target: Target) -> None:
    lm = load_language_model(target.recipe.lm, last_layer=3)
    messages = [{"role": "user", "content": "order"}, {"role": "assistant", "content": "status"}]
    reading = read(lm, lm.tokenizer, messages, target.saes, sites=LAYERS)
    assert reading.roles is not None
    asked = [token for token, role in zip(reading.tokens, reading.roles, strict=True) if role == "user"]
    assert "".join(asked) == "order"
    assert {"user", "assistant", "template"} == set(reading.roles)
    with pytest.raises(CorpusError, match="cannot be rendered"):
        read(lm, lm.tokenizer, [{"role": "nobody", "content": "x"}], target.saes, sites=LAYERS)
    with pytest.raises(CorpusError, match="no text"):
        read(lm, lm.tokenizer, "", target.saes, sites=LAYERS)


def test_layers_come_from_the_configuration_or_the_published_suite(target: Target) -> None:
    sae = TopKSAE(8, 16, 2, seed=0)
    assert sites_of_suite({"sae_attn_mid": sae}) == {"sae_attn_mid": Site("layers.23")}
    sae.config["layer"] = 2
    assert sites_of_suite({"mine": sae}) == {"mine": Site("layers.2")}
    with pytest.raises(FormatError, match="sae_delta"):
        sites_of_suite(target.saes)
    lm = load_language_model(target.recipe.lm, last_layer=1)
    sae.config["layer"] = 1
    with pytest.raises(FormatError, match="hidden_dim 8"):
        read(lm, lm.tokenizer, "order", {"mine": sae})
    with pytest.raises(ModelError, match="layer 3"):
        read(lm, lm.tokenizer, "order", target.saes, sites=LAYERS)
    with pytest.raises(ModelError, match="decoder layers"):
        as_language_model(_NoLayers())  # type: ignore[arg-type]


class _NoLayers:
    class config:  # noqa: N801
        num_hidden_layers = 3

        @staticmethod
        def get_text_config(decoder: bool) -> object:
            return _NoLayers.config

    def get_decoder(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 2)


def _labelled(rows: int = 400) -> tuple[torch.Tensor, torch.Tensor, TopKSAE]:
    """Rows in which latent 5 of an SAE with orthogonal latents is the label, among noise of the others."""
    random = torch.Generator().manual_seed(0)
    sae = TopKSAE(16, 16, 4, seed=0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=random)).Q
    with torch.no_grad():
        sae.encoder.weight.copy_(basis)
        sae.decoder.weight.copy_(basis.T)
    codes = torch.rand(rows, 16, generator=random) * (torch.rand(rows, 16, generator=random) < 0.15)
    labels = torch.rand(rows, generator=random) < 0.4
    codes[:, 5] = labels * (2 + torch.rand(rows, generator=random))
    return codes @ basis, labels, sae


def test_a_probe_finds_the_planted_direction() -> None:
    x, labels, sae = _labelled()
    probe = probe_direction(x, labels, sae)
    assert probe.latents[0][0] == 5
    assert probe.latents[0][1] > 0
    assert float(probe.direction_D @ sae.decoder.weight[:, 5].detach()) > 0.9
    assert probe.codes_accuracy == pytest.approx(1.0, abs=0.02)
    assert probe.raw_accuracy == pytest.approx(1.0, abs=0.02)


def test_labels_at_random_are_chance_when_groups_stay_together() -> None:
    x, _, sae = _labelled()
    random = torch.Generator().manual_seed(1)
    groups = torch.arange(40).repeat_interleave(10)
    labels = (torch.rand(40, generator=random) < 0.5)[groups]
    fingerprints = torch.randn(40, 16, generator=random)[groups]  # rows of a group look alike: leaks would show
    apart = probe_direction(x * 0.1 + fingerprints, labels, sae, groups_R=groups)
    leaky = probe_direction(x * 0.1 + fingerprints, labels, sae)
    assert apart.raw_accuracy < 0.7
    assert leaky.raw_accuracy > apart.raw_accuracy + 0.1


def test_a_probe_refuses_what_it_cannot_measure() -> None:
    x, labels, sae = _labelled(60)
    with pytest.raises(FormatError, match="do not fit"):
        probe_direction(x, labels[:-1], sae)
    with pytest.raises(FormatError, match="both labels"):
        probe_direction(x, torch.ones(60), sae)
    with pytest.raises(FormatError, match="4 groups"):
        probe_direction(x, labels, sae, groups_R=torch.arange(60) % 4)
