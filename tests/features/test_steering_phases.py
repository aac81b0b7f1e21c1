"""Steering by phase with caches of either name and without any; gradients through it; edits that nothing calls."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lm.families import tiny
from torch import Tensor, nn
from transformers import DynamicCache

from qwenscope.errors import ModelError
from qwenscope.features.continuation import generate, write_on
from qwenscope.features.steering import Steering, steer
from qwenscope.lm.model import as_language_model
from qwenscope.sae.sae import TopKSAE

D, PUSH = 32, 15.0
IDS = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(0))
SAE = TopKSAE(D, 64, 8, seed=0)


class Tokenizer:
    """Ids as text, of no end."""

    eos_token_id = None

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{number} " for number in ids)


def push(where: Any = "all", layer: int = 1, **more: Any) -> Steering:
    return Steering(layer=layer, sae=SAE, latent=3, **{"strength": 3.0, "unit": 5.0, "where": where, **more})


class Watch:
    """Per pass and position, how far the rows behind layer 1 are moved by what hooks it while the watch lasts."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._before, self.moved = layer, list[Tensor](), list[list[float]]()

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._before.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    def _compare(self, _module: Any, _inputs: Any, output: Any) -> None:
        after = (output[0] if isinstance(output, tuple) else output).detach()
        self.moved.append([round(float(norm), 2) for norm in (after - self._before[-1]).norm(dim=-1)[0]])

    def __enter__(self) -> Watch:
        self._handles = [
            self._layer.register_forward_hook(self._keep, prepend=True),
            self._layer.register_forward_hook(self._compare),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize(
    ("where", "want"),
    [
        ("all", [[PUSH] * 4, [PUSH], [PUSH]]),
        ("prefill", [[PUSH] * 4, [0.0], [0.0]]),
        ("decode", [[0.0] * 4, [PUSH], [PUSH]]),
        ((2, 5), [[0.0, 0.0, PUSH, 0.0], [0.0], [PUSH]]),
    ],
)
@pytest.mark.parametrize("keyword", ["past_key_values", "cache", None])
def test_the_cache_is_known_under_any_name(where: Any, want: Any, keyword: str | None) -> None:
    model: Any = tiny("llama")
    decoder, forward = model.get_decoder(), model.get_decoder().forward

    def renamed(input_ids: Tensor, given: Any = None, cache: Any = None, past_key_values: Any = None) -> Any:
        return forward(input_ids=input_ids, past_key_values=given or cache or past_key_values, use_cache=True)

    decoder.forward = renamed
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), steer(model, push(where)), Watch(decoder.layers[1]) as watch:
        for ids in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:6]):
            decoder(ids, cache) if keyword is None else decoder(ids, **{keyword: cache})
    assert watch.moved == want


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "gpt2"])
def test_generation_by_phase(family: str) -> None:
    lm: Any = as_language_model(tiny(family), Tokenizer())
    for where, want in (("prefill", [[PUSH] * 6, [0.0], [0.0]]), ("decode", [[0.0] * 6, [PUSH], [PUSH]])):
        with torch.no_grad(), steer(lm, push(where)), Watch(lm.layers[1]) as watch:
            lm.model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert watch.moved == want


@pytest.mark.parametrize(
    ("family", "held"), [("mamba", "cache(_params)?"), ("xlstm", "cache(_params)?"), ("rwkv", "state")]
)
def test_a_state_that_does_not_say_how_much_it_read_is_refused_by_phase(family: str, held: str) -> None:
    """All positions need no count, so that they are steered there too."""
    lm = as_language_model(tiny(family), Tokenizer())
    options: Any = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with torch.no_grad(), steer(lm, push()), Watch(lm.layers[1]) as watch:
        lm.model.generate(IDS, **options)
    assert [len(moved) for moved in watch.moved] == [6, 1, 1]
    assert {moved for passed in watch.moved for moved in passed} == {PUSH}
    with pytest.raises(ModelError, match=rf"in {held}, .*steer all positions"), steer(lm, push("decode")):
        lm.model.generate(IDS, **options)


@pytest.mark.parametrize("family", ["openai-gpt", "mamba", "llama"])
def test_streamed_text_is_that_of_passes_over_all_positions(family: str) -> None:
    """Whether the model has a cache of known length, one of its own, or none."""
    lm: Any = as_language_model(tiny(family), Tokenizer())
    ids, want = IDS, list[int]()
    for _ in range(4):
        with torch.no_grad(), steer(lm, push()):
            want.append(int(lm.model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([want[-1:]])], dim=1)
    assert "".join(generate(lm, IDS[0].tolist(), [push()], 4)) == lm.tokenizer.decode(want)


@pytest.mark.parametrize("mode", ["add", "clamp", "ablate"])
def test_gradients_pass_a_steered_layer_as_if_the_push_were_constant(mode: Any) -> None:
    model: Any = tiny("llama")
    steering = push(mode=mode, unit="norm" if mode == "add" else 5.0)
    layers, embedding = model.get_decoder().layers, model.get_input_embeddings().weight

    def gradient() -> Tensor:
        (found,) = torch.autograd.grad(model(IDS).logits.square().mean(), embedding)
        return found

    with steer(model, steering):
        got = gradient()
    handle = layers[1].register_forward_hook(lambda _m, _i, x: x + steering.push(x).detach())
    want = gradient()
    handle.remove()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    assert got.abs().max() > 0
    assert not torch.allclose(got, gradient(), rtol=1e-3)


def test_a_steering_that_no_pass_calls_is_an_error() -> None:
    model: Any = tiny("llama")
    never = r"edit at layers\.2\.mixer of .* was never called"
    with pytest.raises(ModelError, match=never), steer(model, push(layer=None, site="layers.2.mixer")):
        pass
    model.get_decoder().layers[2].forward = lambda x, **_: x  # as a compiled model, it calls no hook of its parts
    with pytest.raises(ModelError, match=never), steer(model, push(layer=None, site="layers.2.mixer")):
        model(IDS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_5_text", "openai-gpt"])
def test_a_prompt_that_no_run_steers_is_read_once(family: str) -> None:
    """By models whose layers keep keys and values; the others read it in every row. Either way the text is the same."""
    lm: Any = as_language_model(tiny(family), Tokenizer())
    widths = list[tuple[int, ...]]()
    handle = lm.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    places, ids = slice(4, None), IDS[0].tolist()
    runs = [[], [push(places)], [push(places, layer=0, strength=-2.0)]]
    written = list(write_on(lm, ids, runs, 3, shadows=True))
    handle.remove()
    if family in ("llama", "gpt2"):
        assert widths[:2] == [(1, 4), (6, 2)]
    for run, steerings in enumerate(runs):
        read = ids
        for step in (step for step in written if step.run == run):
            with torch.no_grad(), steer(lm, *steerings) if steerings else nullcontext():
                want = lm.model(torch.tensor([read]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(step.logits_V, want, rtol=1e-4, atol=1e-4)
            read = [*read, step.token]
