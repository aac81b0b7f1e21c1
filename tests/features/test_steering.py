"""Steering against a hand-written hook, on every family: cached and not, batched and not; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standin.model import standin_config
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5MoeForCausalLM

from qwenscope.corpus.chat import with_template
from qwenscope.errors import FormatError, ModelError
from qwenscope.features.continuation import Piece, Sampling, Step, generate, prompt_tokens, side_by_side, write_on
from qwenscope.features.steering import Steering, controls, steer
from qwenscope.lm.forward import site_rows
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.opening import open_target
from qwenscope.sae.sae import TopKSAE

D, LAYER, LATENT = 32, 2, 5


def qwen() -> Any:
    sizes = {"num_hidden_layers": 4, "hidden_size": D, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return Qwen3_5MoeForCausalLM(standin_config(96, **sizes))


def llama() -> Any:
    sizes = {"hidden_size": D, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes))


@pytest.fixture(scope="module", params=[qwen, llama])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    return request.param().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sae() -> TopKSAE:
    return TopKSAE(D, 64, 8, seed=0)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 96, (3, 11), generator=torch.Generator().manual_seed(2))


def by_hand(model: Any, edit: Callable[[Tensor], Tensor], run: Callable[[], Any]) -> Any:
    """Run with a plain forward hook on the layer."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        return (edit(x), *output[1:]) if isinstance(output, tuple) else edit(x)

    handle = model.get_decoder().layers[LAYER].register_forward_hook(hook)
    try:
        return run()
    finally:
        handle.remove()


def edits(sae: TopKSAE) -> dict[str, tuple[Steering, Callable[[Tensor], Tensor]]]:
    direction = sae.decoder.weight.detach()[:, LATENT]
    active = lambda x: sae.encode(x).dense()[..., LATENT : LATENT + 1]  # noqa: E731
    make = lambda **more: Steering(LAYER, sae=sae, latent=LATENT, **{"strength": 1.5, **more})  # noqa: E731
    random = torch.randn(D, generator=torch.Generator().manual_seed(3))
    return {
        "add": (make(unit=4.0), lambda x: x + 6.0 * direction),
        "add of the norm": (make(), lambda x: x + 1.5 * x.norm(dim=-1, keepdim=True) * direction),
        "negative": (make(unit=4.0, strength=-1.5), lambda x: x - 6.0 * direction),
        "clamp": (make(unit=4.0, mode="clamp"), lambda x: x + (6.0 - active(x)) * direction),
        "ablate": (make(mode="ablate"), lambda x: x - active(x) * direction),
        "direction": (
            Steering(LAYER, 2.0, along=5 * random, unit=3.0),
            lambda x: x + 6.0 * torch.nn.functional.normalize(random, dim=0),
        ),
    }


@pytest.mark.parametrize("name", ["add", "add of the norm", "negative", "clamp", "ablate", "direction"])
def test_a_forward_pass_equals_a_hook_by_hand(model: Any, sae: TopKSAE, ids: Tensor, name: str) -> None:
    steering, edit = edits(sae)[name]
    clean = model(ids).logits
    expected = by_hand(model, edit, lambda: model(ids).logits)
    with steer(model, steering):
        steered = model(ids).logits
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-6)
    assert (steered - clean).abs().max() > 1e-4
    assert torch.equal(model(ids).logits, clean)  # nothing stays behind


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["add", "clamp", "ablate"])
def test_generation_equals_a_hook_by_hand(model: Any, sae: TopKSAE, ids: Tensor, name: str, use_cache: bool) -> None:
    steering, edit = edits(sae)[name]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = by_hand(model, edit, lambda: model.generate(ids, **options))
    with steer(model, steering):
        steered = model.generate(ids, **options)
    assert torch.equal(steered.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(steered.logits), torch.stack(expected.logits), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("where", "steered"),
    [("all", range(14)), ("prefill", range(11)), ("decode", range(11, 14)), ([0, 4, 12], [0, 4, 12]), ([], [])],
)
def test_positions_with_a_cache(model: Any, sae: TopKSAE, ids: Tensor, where: Any, steered: Any) -> None:
    position = 0
    chosen = torch.tensor([p in steered for p in range(14)]).view(1, -1, 1)
    direction = sae.decoder.weight.detach()[:, LATENT]

    def edit(x: Tensor) -> Tensor:
        nonlocal position
        position += x.shape[1]
        return x + 6.0 * direction * chosen[:, position - x.shape[1] : position]

    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = by_hand(model, edit, lambda: model.generate(ids, **options))
    with steer(model, Steering(LAYER, 1.5, sae=sae, latent=LATENT, unit=4.0, where=where)):
        found = model.generate(ids, **options)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-6)


def test_several_latents_at_once_look_at_the_unsteered_stream(model: Any, sae: TopKSAE, ids: Tensor) -> None:
    other = TopKSAE(D, 32, 4, seed=9)
    first = Steering(LAYER, 2.0, sae=sae, latent=1, mode="clamp", unit=3.0)
    second = Steering(LAYER, 1.0, sae=other, latent=2, mode="clamp", unit=3.0)
    third = Steering(LAYER - 1, 1.0, sae=other, latent=3, unit=3.0)

    def edit(x: Tensor) -> Tensor:
        pushed = (6.0 - sae.encode(x).dense()[..., 1:2]) * sae.decoder.weight[:, 1]
        return x + pushed + (3.0 - other.encode(x).dense()[..., 2:3]) * other.decoder.weight[:, 2]

    with steer(model, third):
        expected = by_hand(model, edit, lambda: model(ids).logits)
    with steer(model, first, second, third):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6)


def test_hooks_are_gone_after_an_error(model: Any, sae: TopKSAE, ids: Tensor) -> None:
    clean = model(ids).logits
    with pytest.raises(RuntimeError, match="stop"), steer(model, Steering(LAYER, 1.0, sae=sae, latent=0)):
        raise RuntimeError("stop")
    assert torch.equal(model(ids).logits, clean)
    assert not model.get_decoder()._forward_pre_hooks


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "a direction"),
        ({"mode": "melt"}, "melt"),
        ({"latent": 0, "strength": float("nan")}, "finite"),
        ({"latent": 0, "strength": float("inf")}, "finite"),
        ({"where": "sideways"}, "sideways"),
        ({"latent": 64}, "no latent 64"),
        ({"latent": -1}, "no latent -1"),
        ({"along": torch.ones(D), "mode": "clamp"}, "mode add"),
    ],
)
def test_impossible_steering_is_named(sae: TopKSAE, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named):
        Steering(
            0, **({"sae": sae} if "latent" in wrong or ("mode" in wrong and "along" not in wrong) else {}), **wrong
        )


def test_a_wrong_width_or_layer_is_named(model: Any, sae: TopKSAE) -> None:
    with pytest.raises(FormatError, match="33"), steer(model, Steering(0, 1.0, along=torch.ones(33))):
        pass
    with pytest.raises(ModelError, match="layer 9"), steer(model, Steering(9, 1.0, sae=sae, latent=0)):
        pass


def test_controls_keep_everything_but_what_they_vary(sae: TopKSAE) -> None:
    real = Steering(LAYER, 2.0, sae=sae, latent=LATENT, mode="clamp", unit=3.0, where="prefill")
    found = controls([real], seed=1, alive=[[3, LATENT]])
    assert list(found) == ["unsteered", "negative strength", "random latent", "random direction"]
    assert found["unsteered"] == []
    assert found["negative strength"][0].strength == -2.0
    assert found["random latent"][0].latent == 3
    both = controls([real, replace(real, latent=9)], alive=[[3], [4]])
    assert [push.latent for push in both["random latent"]] == [3, 4]
    x = torch.randn(2, 4, D)
    torch.testing.assert_close(found["random direction"][0].push(x).norm(dim=-1), real.push(x).norm(dim=-1))
    again = controls([real], seed=1)["random direction"][0].direction_D
    assert torch.equal(again, found["random direction"][0].direction_D)
    assert "negative strength" not in controls([Steering(0, 1.0, sae=sae, latent=0, mode="ablate")])
    assert "random latent" not in controls([Steering(0, 1.0, along=torch.ones(D))])


@pytest.fixture(scope="module")
def loaded(release: Path) -> tuple[LanguageModel, Steering]:
    target = open_target(release)
    lm = load_language_model(target.recipe.lm, lm_head=True)
    return lm, Steering(1, 3.0, sae=target.saes["sae_delta"], latent=7)


@pytest.mark.parametrize(
    ("prompt", "template", "said"),
    [
        ("a\udcff", None, "no UTF-8"),
        ("hello", "{{ raise_exception('not today') }}", "refuses the prompt: not today"),
        ("hello", "{{ 1 // 0 }}", "refuses the prompt: "),
        ("hello", "{{ 'so long ' * 200000 }}", "positions; shorten it"),
    ],
)
def test_a_prompt_that_cannot_be_told_is_one_line(
    loaded: tuple[LanguageModel, Steering], prompt: str, template: str | None, said: str
) -> None:
    lm = replace(loaded[0], tokenizer=with_template(loaded[0].tokenizer, template))
    with pytest.raises(FormatError, match=said):
        prompt_tokens(lm, prompt)


def test_streamed_text_equals_generate(loaded: tuple[LanguageModel, Steering]) -> None:
    lm, steering = loaded
    prompt = prompt_tokens(lm, "order status")
    text = "".join(generate(lm, prompt, [steering], 12))
    with steer(lm, steering):
        whole = lm.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert lm.tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True).startswith(text)
    assert "".join(generate(lm, prompt, [steering], 5, temperature=1.0, seed=4)) == "".join(
        generate(lm, prompt, [steering], 5, temperature=1.0, seed=4)
    )


def test_side_by_side_reports_effects(loaded: tuple[LanguageModel, Steering]) -> None:
    lm, steering = loaded
    prompt = prompt_tokens(lm, "order")
    pieces = list(side_by_side(lm, prompt, [steering], max_new_tokens=6))
    effects = {piece.run: piece.effect for piece in pieces if piece.effect is not None}
    assert list(effects) == ["steered", "unsteered", "negative strength", "random latent", "random direction"]
    assert effects["unsteered"] == pytest.approx(0.0, abs=1e-9)
    assert effects["steered"] > 1e-4
    assert all(isinstance(piece, Piece) for piece in pieces)
    for name, pushes in {"steered": [steering], **controls([steering])}.items():
        together = "".join(piece.text for piece in pieces if piece.run == name)
        assert together == "".join(generate(lm, prompt, pushes, 6))
    with pytest.raises(FormatError, match="empty"):
        next(side_by_side(lm, [], [steering]))


@pytest.mark.parametrize("where", ["all", "prefill", "decode", slice(3, None)])
def test_a_batch_of_runs_equals_single_runs(loaded: tuple[LanguageModel, Steering], where: Any) -> None:
    """To 1e-5 in log-probabilities at every step, with two sites and modes in one batch, and with shadows."""
    lm, steering = loaded
    steering = replace(steering, where=where)
    prompt = prompt_tokens(lm, "order status")
    other = replace(steering, site=3, latent=9, mode="clamp", unit=2.0)
    runs = {"steered": [steering], "both": [steering, other], **controls([steering])}
    single = {name: list(write_on(lm, prompt, [pushes], 8)) for name, pushes in runs.items()}
    batch: dict[str, list[Step]] = {name: [] for name in runs}
    for step in write_on(lm, prompt, list(runs.values()), 8, shadows=True):
        batch[list(runs)[step.run]].append(step)
    for name, steps in single.items():
        assert [step.token for step in batch[name]] == [step.token for step in steps]
        assert "".join(step.text for step in batch[name]) == "".join(step.text for step in steps)
        for one, many in zip(steps, batch[name], strict=True):
            torch.testing.assert_close(one.logits_V.log_softmax(0), many.logits_V.log_softmax(0), rtol=0, atol=1e-5)
    for name, steps in batch.items():
        ids = [*prompt, *(step.token for step in steps)]
        with torch.no_grad():
            clean_TV = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        shadows_TV = torch.stack([step.clean_V for step in steps if step.clean_V is not None])
        torch.testing.assert_close(shadows_TV.log_softmax(-1), clean_TV.log_softmax(-1), rtol=0, atol=2e-5)
        assert name in runs


def test_sampling_is_seeded_and_top_p_cuts(loaded: tuple[LanguageModel, Steering]) -> None:
    lm, steering = loaded
    prompt = prompt_tokens(lm, "order status")

    def tokens(sampling: Sampling) -> list[int]:
        return [step.token for step in write_on(lm, prompt, [[steering]], 8, sampling)]

    assert tokens(Sampling(2.0, seed=1)) == tokens(Sampling(2.0, seed=1)) != tokens(Sampling(2.0, seed=2))
    assert tokens(Sampling(2.0, 1e-9)) == tokens(Sampling())
    with pytest.raises(FormatError, match="top_p"):
        Sampling(top_p=0.0)
    random, logits_V = torch.Generator().manual_seed(0), torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = [Sampling(1.0, 0.6).draw(logits_V, random) for _ in range(300)]
    assert set(drawn) == {0, 1}  # .5 alone is too little
    assert drawn.count(0) / 300 == pytest.approx(0.5 / 0.8, abs=0.1)


def test_an_ablation_that_takes_nothing_away_says_why(loaded: tuple[LanguageModel, Steering]) -> None:
    lm, steering = loaded
    assert steering.sae is not None
    prompt = prompt_tokens(lm, "order status")
    written = [step.token for step in write_on(lm, prompt, [[]], 3) if not step.ends]
    rows_TD = site_rows(lm, torch.tensor([[*prompt, *written[:-1]]]), [1])[Site.of(1)][0]
    active_TN = steering.sae.encode(rows_TD).dense() > 0
    before_N, after_N = active_TN[: len(prompt)].any(0), active_TN[len(prompt) :].any(0)

    def notes(latent: int, where: Any) -> list[str]:
        push = replace(steering, latent=latent, mode="ablate", where=where)
        return [piece.note for piece in side_by_side(lm, prompt, [push], max_new_tokens=3) if piece.note]

    idle, busy = int((~before_N & ~after_N).nonzero()[0]), int(before_N.nonzero()[0])
    (why,) = notes(idle, "all")
    count = len(prompt) + len(written) - 1
    assert why == f"latent {idle} is active on none of the {count} steered tokens, so nothing is taken away"
    assert notes(busy, "all") == []
    early = int((before_N & ~after_N).nonzero()[0])
    (why,) = notes(early, "decode")
    assert why.endswith(f"; it is on {int(active_TN[:, early].sum())} that are not steered")
