"""Activations: what each keeps, against dense formulas; thresholds through files and other libraries' layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exact_saes import exact_sae
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenscope import SAE, TopKSAE, load_suite
from qwenscope.errors import FormatError
from qwenscope.sae.activation import ACTIVATIONS, k_largest
from qwenscope.sae.formats import EXPORTS, FORMATS, IMPORTS, export_suite, import_suite
from qwenscope.sae.sae import Codes

HIDDEN, LATENTS, K = 12, 48, 5
THRESHOLDS = sorted(set(ACTIVATIONS) - {"topk"})


def make_sae(activation: str, *, one_threshold: bool = False) -> SAE:
    """An SAE in general position; thresholds of 0.2 to 1 where it has them, some of them equal if asked."""
    sae = SAE(HIDDEN, LATENTS, K, activation, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in sae.parameters():
            value += 0.3 * torch.randn(value.shape, generator=draw)
        sae.decoder.weight /= sae.decoder.weight.norm(dim=0)
    if sae.threshold is not None:
        sae.threshold.copy_(torch.full((LATENTS,), 0.5) if one_threshold else torch.linspace(0.2, 1, LATENTS))
    return sae


def rows(count: int = 64) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(3))


def dense_codes(sae: SAE, x_BD: Tensor) -> Tensor:
    """By the definition, on all pre-activations."""
    pre_BN = (x_BD - sae.pre_bias) @ sae.encoder.weight.T + sae.encoder.bias
    if sae.activation.name == "topk":
        kept_BN = torch.zeros_like(pre_BN).scatter(1, pre_BN.topk(sae.k, dim=1).indices, 1.0)
    elif sae.threshold is None:
        kept_BN = torch.ones_like(pre_BN)
    else:
        kept_BN = (pre_BN > sae.threshold).to(pre_BN)
    return pre_BN.relu() * kept_BN


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_codes_and_gradients_equal_the_dense_definition(activation: str) -> None:
    sae, x = make_sae(activation).double(), rows().double()
    codes = sae.encode(x)
    torch.testing.assert_close(codes.dense(), dense_codes(sae, x), rtol=0, atol=1e-12)
    weights = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(4)).double()
    gradients = []
    for x_hat in (sae(x), dense_codes(sae, x) @ sae.decoder.weight.T + sae.pre_bias):
        sae.zero_grad()
        (x_hat * weights).sum().backward()
        gradients.append({name: value.grad.clone() for name, value in sae.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("activation", THRESHOLDS)
def test_no_rows_and_rows_without_active_latents(activation: str) -> None:
    sae = make_sae(activation)
    assert sae(torch.zeros(0, HIDDEN)).shape == (0, HIDDEN)
    with torch.no_grad():
        sae.encoder.bias.fill_(-1e6)
        assert torch.equal(sae(rows()), sae.pre_bias.expand(64, -1))


def test_codes_of_unlike_widths_are_put_together() -> None:
    sae, x = make_sae("jumprelu"), rows()
    parts = [sae.encode(part) for part in x.split([1, 7, 56])]
    assert len({part.values.shape[1] for part in parts}) > 1
    torch.testing.assert_close(Codes.cat(parts).dense(), sae.encode(x).dense())


def test_batch_topk_keeps_the_largest_of_the_batch() -> None:
    values_BC = torch.rand(20, 9, generator=torch.Generator().manual_seed(5))
    kept = ACTIVATIONS["batch_topk"](3).keep(values_BC, k_largest)
    assert int((kept > 0).sum()) == 60
    smallest = values_BC.flatten().sort(descending=True).values[59]
    assert torch.equal(kept, values_BC * (values_BC >= smallest))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_files_keep_activation_and_threshold(tmp_path: Path, activation: str) -> None:
    sae = make_sae(activation)
    sae.save(tmp_path / "sae")
    loaded = SAE.from_pretrained(tmp_path / "sae")
    assert type(loaded) is (TopKSAE if activation == "topk" else SAE)
    assert loaded.config == sae.config
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    assert torch.equal(loaded.encode(rows()).dense(), sae.encode(rows()).dense())
    if activation != "topk":
        with pytest.raises(FormatError, match=f"has the activation {activation}; load it by SAE.from_pretrained"):
            TopKSAE.from_pretrained(tmp_path / "sae")


def test_a_missing_threshold_is_named(tmp_path: Path) -> None:
    make_sae("batch_topk").save(tmp_path / "sae")
    path = tmp_path / "sae/weights.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name != "threshold"}, path)
    with pytest.raises(FormatError, match="tensor threshold is missing"):
        SAE.from_pretrained(tmp_path / "sae")


@pytest.mark.parametrize("activation", THRESHOLDS)
@pytest.mark.parametrize("name", sorted(set(EXPORTS) & set(IMPORTS)))
def test_formats_keep_what_they_know_and_refuse_the_rest(tmp_path: Path, name: str, activation: str) -> None:
    sae = make_sae(activation, one_threshold=True)
    sae.save(tmp_path / "suite/sae_a")
    known = FORMATS[name].activations
    assert known is not None
    if activation not in known:
        with pytest.raises(FormatError, match=f"sae_a: {name} has no activation {activation}"):
            export_suite(tmp_path / "suite", name, tmp_path / "there")
        assert not (tmp_path / "there").exists()
        return
    export_suite(tmp_path / "suite", name, tmp_path / "there")
    import_suite(tmp_path / "there", name, tmp_path / "back")
    back = load_suite(tmp_path / "back")["sae_a"]
    assert back.config == sae.config | {"sae_id": "sae_a"}
    back_state, state = back.state_dict(), sae.state_dict()
    if (name, activation) == ("dictionary_learning", "jumprelu"):  # its input is not centred: two roundings
        bias_N = back_state.pop("encoder.bias")
        torch.testing.assert_close(bias_N, state["encoder.bias"], rtol=0, atol=1e-6)
    assert all(torch.equal(value, state[key]) for key, value in back_state.items())


def test_a_foreign_jumprelu_has_no_k(tmp_path: Path) -> None:
    """Without our configuration beside it, every latent may be active; the codes are the same."""
    sae = make_sae("jumprelu")
    sae.save(tmp_path / "suite/sae_a")
    export_suite(tmp_path / "suite", "saelens", tmp_path / "there")
    path = tmp_path / "there/sae_a/cfg.json"
    config = json.loads(path.read_text())
    del config["metadata"]["qwenscope"]
    path.write_text(json.dumps(config))
    import_suite(tmp_path / "there", "saelens", tmp_path / "back")
    back = SAE.from_pretrained(tmp_path / "back", sae_id="sae_a")
    assert (back.activation.name, back.k) == ("jumprelu", LATENTS)
    assert torch.equal(back.encode(rows()).dense(), sae.encode(rows()).dense())


def test_dictionary_learning_jumprelu_is_not_centred(tmp_path: Path) -> None:
    sae = make_sae("jumprelu")
    assert sae.threshold is not None
    state = {
        "W_enc": sae.encoder.weight.detach().T.contiguous(),
        "b_enc": sae.encoder.bias.detach(),
        "W_dec": sae.decoder.weight.detach().T.contiguous(),
        "b_dec": sae.pre_bias.detach(),
        "threshold": sae.threshold,
    }
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "JumpReluAutoEncoder", "layer": 4}}))
    import_suite(tmp_path, "dictionary_learning", tmp_path / "out")
    (back,) = load_suite(tmp_path / "out").values()
    pre_BN = rows().double() @ state["W_enc"].double() + state["b_enc"].double()
    codes_BN = pre_BN.relu() * (pre_BN > state["threshold"])
    torch.testing.assert_close(back.encode(rows()).dense().double(), codes_BN, rtol=0, atol=1e-5)
    assert back.config["layer"] == 4


def test_a_topk_dictionary_with_a_trained_threshold_is_a_topk_sae(tmp_path: Path) -> None:
    """dictionary_learning estimates one from step 1,000 on, and encodes by the k largest all the same."""
    exact_sae().save(tmp_path / "suite/sae_a")
    export_suite(tmp_path / "suite", "dictionary_learning", tmp_path / "there")
    path = tmp_path / "there/sae_a/ae.pt"
    torch.save(torch.load(path, weights_only=True) | {"threshold": torch.tensor(0.37)}, path)
    import_suite(tmp_path / "there", "dictionary_learning", tmp_path / "back")
    back = TopKSAE.from_pretrained(tmp_path / "back", sae_id="sae_a")
    assert all(torch.equal(value, exact_sae().state_dict()[key]) for key, value in back.state_dict().items())


@pytest.mark.parametrize(
    ("hook", "layer", "site"),
    [
        ("blocks.3.hook_resid_post", 3, None),
        ("model.layers.22", 22, None),
        ("model.language_model.layers.7", 7, None),
        ("layers.5", 5, None),
        ("blocks.3.hook_mlp_out", 3, "layers.3.mlp"),
        ("blocks.3.hook_attn_out", 3, "layers.3.mixer"),
        ("model.layers.22.mlp", 22, "layers.22.mlp"),
        ("model.layers.22.linear_attn", 22, "layers.22.mixer"),
        ("blocks.3.hook_resid_pre", 2, None),
        ("blocks.0.hook_resid_pre", None, None),
        ("model.layers.22.mlp.gate", None, None),
    ],
)
def test_saelens_hook_names_give_layer_and_site(tmp_path: Path, hook: str, layer: int | None, site: str | None) -> None:
    exact_sae().save(tmp_path / "suite/sae_a")
    export_suite(tmp_path / "suite", "saelens", tmp_path / "there")
    path = tmp_path / "there/sae_a/cfg.json"
    metadata = {"sae_lens_version": "6.54.12", "model_name": "m", "hook_name": hook}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": metadata}))
    import_suite(tmp_path / "there", "saelens", tmp_path / "back")
    config = SAE.from_pretrained(tmp_path / "back", sae_id="sae_a").config
    assert (config.get("layer"), config.get("site")) == (layer, site)
    assert config.get("hook_name") == (None if layer is not None else hook)


def test_the_stored_dtype_survives_folding(tmp_path: Path) -> None:
    exact_sae().save(tmp_path / "suite/sae_a")
    export_suite(tmp_path / "suite", "saelens", tmp_path / "there")
    weights, path = tmp_path / "there/sae_a/sae_weights.safetensors", tmp_path / "there/sae_a/cfg.json"
    save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_acts_by_decoder_norm": True}))
    import_suite(tmp_path / "there", "saelens", tmp_path / "back")
    imported = SAE.from_pretrained(tmp_path / "back", sae_id="sae_a").config["imported"]
    assert imported["stored_dtype"] == "bfloat16"
