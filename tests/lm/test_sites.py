"""Sites: rows equal hooks written by hand, nothing runs behind the last one, edits and restarts there are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm.families import FAMILIES, tiny
from torch import Tensor, nn

from qwenscope.errors import ModelError
from qwenscope.lm.forward import final_hidden, final_norm, logits, site_rows, unembedding
from qwenscope.lm.hooks import intervene, record, restart
from qwenscope.lm.model import LanguageModel, as_language_model
from qwenscope.lm.sites import KINDS, Site, SiteKind, module_at, to_stream

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
ATTENTION = {"gpt2": "attn", "gpt_neox": "attention", "falcon": "self_attention"}
NORMALIZING = ("gemma2", "gemma3_text", "olmo2")
DELTA = ("qwen3_5_moe_text", "qwen3_next")
HAND = (
    *("qwen3_5_moe_text", "qwen3_next", "llama", "gemma2", "gemma3_text", "gpt2"),
    *("gpt_neox", "mixtral", "qwen3_moe", "phi3", "olmo2", "falcon"),
)
SITES = ("layers.1.mixer", "layers.1.mlp", "layers.1")
MISSING = {
    *(
        (name, "layers.1.mlp")
        for name in ["opt", "biogpt", "xglm", "mamba", "mamba2", "nemotron_h", "granitemoehybrid", "llama4_text"]
    ),
    ("gemma3n_text", "layers.1"),
    ("falcon_h1", "layers.1.mixer"),
}
"""What these families have no one module for, or whose layers return several streams."""


def language_model(name: str) -> LanguageModel:
    return as_language_model(tiny(name).requires_grad_(False))


def by_hand(lm: LanguageModel, family: str, part: str | None, layer: int = 1) -> nn.Module:
    decoder: Any = lm.model.get_decoder()
    block = (decoder.h if hasattr(decoder, "h") else decoder.layers)[layer]
    if part is None:
        return block
    if part.endswith("_out") and family in NORMALIZING:
        return getattr(block, {"mixer_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}[part])
    mixer = "linear_attn" if family in DELTA and layer != 1 else ATTENTION.get(family, "self_attn")
    return getattr(block, mixer if part.startswith("mixer") else "mlp")


def hooked(module: nn.Module, edit: Any, run: Any) -> Any:
    """Run with a plain forward hook that returns edit(rows)."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        rows = edit(output[0] if isinstance(output, tuple) else output)
        return (rows, *output[1:]) if isinstance(output, tuple) else rows

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return run()
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("family", "part"),
    [
        *((family, part) for family in HAND for part in ("mixer", "mlp", None)),
        *((family, part) for family in (*NORMALIZING, "llama", "qwen3_next") for part in ("mixer_out", "mlp_out")),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_rows_edits_and_restarts_equal_hooks_by_hand(family: str, part: str | None, layer: int) -> None:
    lm, site = language_model(family), Site(".".join(filter(None, ("layers", str(layer), part))))
    module, seen = by_hand(lm, family, part, layer), list[Tensor]()

    def whole() -> Tensor:
        scores: Tensor = lm.model(IDS, use_cache=False).logits
        return scores

    hooked(module, lambda x: seen.append(x.clone()) or x, whole)
    assert torch.equal(site_rows(lm, IDS, [site])[site], seen[0])
    want = hooked(module, lambda x: x * 0.5 + 0.1, whole)
    with intervene(lm, {site: lambda x: x * 0.5 + 0.1}):
        torch.testing.assert_close(logits(lm, final_hidden(lm, IDS)), want, rtol=1e-6, atol=1e-6)
    with record(lm, [site]) as recording:
        final_hidden(lm, IDS)
    with restart(lm, recording, site, recording.rows[site] * 0.5 + 0.1):
        torch.testing.assert_close(logits(lm, final_hidden(lm, IDS)), want, rtol=1e-6, atol=1e-6)


def entered(family: str, part: str, layer: int) -> str:
    """The name in a layer of the module that takes the rows of `part`."""
    if part == "mlp_in":
        return "mlp"
    attention = ATTENTION.get(family, "linear_attn" if family in DELTA and layer != 1 else "self_attn")
    names = {"gpt2": "c_proj", "gpt_neox": "dense", "falcon": "dense"}
    return f"{attention}.{names.get(family, 'out_proj' if attention == 'linear_attn' else 'o_proj')}"


@pytest.mark.parametrize("family", [*HAND, "deepseek_v3", "glm4", "recurrent_gemma"])
@pytest.mark.parametrize("part", ["heads", "mlp_in"])
@pytest.mark.parametrize("layer", [0, 1])
def test_what_a_module_takes_equals_pre_hooks_by_hand(family: str, part: str, layer: int) -> None:
    """Rows, edits and restarts; the rows are as wide as the site says."""
    lm, site = language_model(family), Site(f"layers.{layer}.{part}")
    if family == "recurrent_gemma":
        module = lm.layers[layer].get_submodule({"heads": "temporal_block.linear_out", "mlp_in": "mlp_block"}[part])
    else:
        module = lm.layers[layer].get_submodule(entered(family, part, layer))
    seen: list[Tensor] = []

    def run(edit: Any) -> Tensor:
        def hook(_module: Any, inputs: Any, named: Any) -> Any:
            assert (len(inputs) > 0) != ("hidden_states" in named)
            if inputs:
                return (edit(inputs[0]), *inputs[1:]), named
            return inputs, {**named, "hidden_states": edit(named["hidden_states"])}

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            scores: Tensor = lm.model(IDS, use_cache=False).logits
        handle.remove()
        return scores

    run(lambda x: seen.append(x.clone()) or x)
    assert torch.equal(site_rows(lm, IDS, [site])[site], seen[0])
    assert lm.width(site) == seen[0].shape[-1]
    check_edits(lm, site, lambda x: x * 0.5 + 0.1, run(lambda x: x * 0.5 + 0.1))


def check_edits(lm: LanguageModel, site: Site, edit: Any, want: Tensor, tolerance: float = 1e-6) -> None:
    """An edit by `intervene` and a restart from edited rows both give the logits `want`."""
    with intervene(lm, {site: edit}):
        torch.testing.assert_close(logits(lm, final_hidden(lm, IDS)), want, rtol=tolerance, atol=tolerance)
    with record(lm, [site]) as recording:
        final_hidden(lm, IDS)
    with restart(lm, recording, site, edit(recording.rows[site])):
        torch.testing.assert_close(logits(lm, final_hidden(lm, IDS)), want, rtol=tolerance, atol=tolerance)


PARALLEL = ("gpt_neox", "falcon", "phi", "cohere", "gptj", "openai-gpt")


@pytest.mark.parametrize("family", [*(name for name in HAND if name not in PARALLEL), "glm4", "mpt", "jamba", "lfm2"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_middle_of_a_layer_is_what_came_in_and_what_the_mixer_added(family: str, layer: int) -> None:
    """An edit there reaches MLP and stream alike: it is the same as moving what the mixer adds by as much."""
    lm, site, added = language_model(family), Site(f"layers.{layer}.mid"), Site(f"layers.{layer}.mixer_out")
    entering: list[Tensor] = []
    hook = lm.layers[layer].register_forward_pre_hook(
        lambda _, inputs, named: entering.append((inputs or [named["hidden_states"]])[0].clone()), with_kwargs=True
    )
    rows = site_rows(lm, IDS, [site, added])
    hook.remove()
    torch.testing.assert_close(rows[site], entering[0] + rows[added], rtol=0, atol=0)
    want = hooked(module_at(lm, added), lambda x: x + (0.1 - rows[site] * 0.5), lambda: lm.model(IDS).logits)
    check_edits(lm, site, lambda x: x * 0.5 + 0.1, want, tolerance=1e-5)  # sums in another order


@pytest.mark.parametrize("family", PARALLEL)
def test_a_layer_whose_mixer_and_mlp_read_the_same_stream_has_no_middle(family: str) -> None:
    with pytest.raises(ModelError, match=r"no one mid in layer 1"):
        site_rows(language_model(family), IDS, ["layers.1.mid"])


@pytest.mark.parametrize("family", ["gpt2", "qwen3_5_moe_text", "llama"])
def test_what_heads_add_to_the_stream_is_projected(family: str) -> None:
    lm, site = language_model(family), Site("layers.1.heads")
    rows_RD = site_rows(lm, IDS, [site])[site][0]
    added_RD = site_rows(lm, IDS, ["layers.1.mixer_out"])[Site("layers.1.mixer_out")][0]
    differences_RD = to_stream(lm, site, rows_RD - rows_RD[:1])
    torch.testing.assert_close(differences_RD, added_RD - added_RD[:1], rtol=1e-5, atol=1e-5)
    assert to_stream(lm, Site("layers.1.mid"), added_RD) is added_RD


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("part", ["mixer", "mlp", "heads", "mlp_in", None])
def test_nothing_runs_behind_the_last_site(family: str, part: str | None) -> None:
    """The modules that a pass up to the site calls are the first of those of a whole pass; the site's own come last."""
    lm, site = language_model(family), Site(".".join(filter(None, ("layers.1", part))))

    def called(run: Any) -> list[nn.Module]:
        calls: list[nn.Module] = []
        handles = [m.register_forward_pre_hook(lambda m, _: calls.append(m)) for m in lm.decoder.modules()]
        run()
        for handle in handles:
            handle.remove()
        return calls

    calls = called(lambda: site_rows(lm, IDS, [site, "layers.0"]))
    whole = called(lambda: final_hidden(lm, IDS))
    assert calls == whole[: len(calls)]
    assert not set(calls) & set(lm.layers[2].modules())
    if part in ("heads", "mlp_in"):  # a module that is entered does not run: nothing in it is called
        module = lm.layers[1].get_submodule(entered(family, part, 1))
        assert set(calls) & set(module.modules()) == {module}
        assert calls[-1] is module
        return
    own = set(by_hand(lm, family, part).modules())
    assert own & set(whole) <= set(calls)
    assert calls[-1] in own


def test_sites_are_ordered_as_a_pass_reaches_them() -> None:
    within = ["heads", "mixer", "mixer_out", "mid", "mlp_in", "mlp", "mlp_out"]
    names = [*(f"layers.0.{part}" for part in within), "layers.0", "layers.2.mlp", "layers.2", "layers.10.mixer"]
    assert [site.name for site in sorted(map(Site, reversed(names)))] == names
    assert Site.of(6) == Site("layers.6") == Site.of("layers.6")
    site = Site("layers.6.mlp")
    assert (site.layer, site.part, str(site)) == (6, "mlp", "layers.6.mlp")
    assert (Site("layers.6.rms").part, Site("layers.6.mlp.zscore").part) == (None, "mlp")
    assert (Site("layers.6.rms").norm, site.norm, Site("layers.6.mlp.zscore").layer) == ("rms", None, 6)
    for name in (
        "layers.6.rms.mlp",
        "layers.6.rms.rms",
        "layers.x",
        "layers.06",
        "layer.6",
        "layers.6.",
        "layers.6.nothing",
        "layers.6.mlp.gate",
    ):
        with pytest.raises(ModelError, match="names no site"):
            Site(name)


def test_a_further_kind_of_site_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(layer: nn.Module) -> nn.Module:
        return layer.get_submodule("post_attention_layernorm")

    monkeypatch.setitem(KINDS, "norm", SiteKind(1.5, norm))
    lm, site = language_model("llama"), Site("layers.1.norm")
    assert sorted([Site("layers.1.mlp"), site, Site("layers.1.mixer")])[1] == site
    seen: list[Tensor] = []
    hooked(norm(lm.layers[1]), lambda x: seen.append(x) or x, lambda: lm.model(IDS))
    assert torch.equal(site_rows(lm, IDS, [site])[site], seen[0])
    with record(lm, [site]) as recording:
        final_hidden(lm, IDS)
    with restart(lm, recording, site, seen[0] * 2):
        got = final_hidden(lm, IDS)
    with intervene(lm, {site: lambda x: x * 2}):
        assert torch.equal(got, final_hidden(lm, IDS))


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match=r"no one mlp in layer 1 \(OPTDecoderLayer of self_attn, .*fc1, fc2"):
        site_rows(language_model("opt"), IDS, ["layers.1.mlp"])
    with (
        pytest.raises(ModelError, match=r"layers\.2 of .* was never called"),
        intervene(language_model("llama"), {2: torch.clone}),
    ):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_logits_norm_and_splices(family: str) -> None:
    """Logits by way of our two halves are the model's own; restarts equal whole passes wherever there is a site."""
    lm = language_model(family)
    with torch.no_grad():
        want = lm.model(IDS).logits
    hidden = final_hidden(lm, IDS)
    torch.testing.assert_close(logits(lm, hidden), want.float(), rtol=1e-5, atol=1e-5)
    assert unembedding(lm).shape == (96, 32)
    norm = final_norm(lm)
    last = Site.of(len(lm.layers) - 1)
    if (family, "layers.1") not in MISSING:
        torch.testing.assert_close(norm(site_rows(lm, IDS, [last])[last]), hidden, rtol=1e-5, atol=1e-5)
    for name in SITES:
        site = Site(name)
        if (family, name) in MISSING:
            with pytest.raises(ModelError, match=r"no one|not \[conversations"):
                site_rows(lm, IDS, [site])
            continue
        with record(lm, [site]) as recording:
            final_hidden(lm, IDS)
        with restart(lm, recording, site, recording.rows[site] * 0.5):
            got = final_hidden(lm, IDS)
        with intervene(lm, {site: lambda x: x * 0.5}):
            torch.testing.assert_close(got, final_hidden(lm, IDS), rtol=1e-6, atol=1e-6)
