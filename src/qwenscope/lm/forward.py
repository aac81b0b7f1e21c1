"""Whole forward passes: what enters the LM head, what stands between it and the last layer, and logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from qwenscope.errors import ModelError
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site, Where


def site_rows(lm: LanguageModel, input_ids_CT: Tensor, sites: Sequence[Where]) -> dict[Site, Tensor]:
    """Rows of right-padded token ids [C, T] at each of `sites`, {site: x_CTD}: see `LanguageModel.streams`."""
    lengths_C = [input_ids_CT.shape[1]] * len(input_ids_CT)
    return lm.streams(input_ids_CT, lengths_C, [Site.of(site) for site in sites])


def final_hidden(lm: LanguageModel, input_ids_CT: Tensor, *, grad: bool = False) -> Tensor:
    """Residual stream after all layers and the final norm, ready for the LM head: h_CTD. Interventions apply.

    `grad`: keep what a backward pass to rows that an intervention puts in will need.

    Raises:
        ModelError: the model was loaded truncated.
    """
    _refuse_truncated(lm)
    with torch.set_grad_enabled(grad):
        output = lm.decoder(input_ids=input_ids_CT.to(lm.device, non_blocking=True), use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def logits(lm: LanguageModel, h_XD: Tensor, *, grad: bool = False) -> Tensor:
    """The model's own way from rows of `final_hidden` to logits: [..., D] -> float32 [..., V].

    Whatever the family does there (scales, caps, multipliers) is done: its own forward runs, over a decoder that
    returns these rows. V is 248,320 for the published model, 1 MB per row: pass a chunk of rows at a time. `grad`: keep
    what a backward pass to them will need.

    Raises:
        ModelError: the model was loaded truncated or without LM head, or its head does not read its decoder.
    """
    _refuse_truncated(lm)
    _head(lm)
    with torch.set_grad_enabled(grad):
        rows = h_XD.reshape(1, -1, h_XD.shape[-1])
        ids = torch.zeros(rows.shape[:2], dtype=torch.int64, device=lm.device)
        with _decoder_returning(lm, rows) as used:
            output = lm.model(input_ids=ids, use_cache=False)
        scores: Tensor = output.logits.float()
        if not used:
            raise ModelError(f"the LM head of {type(lm.model).__name__} does not read its decoder; it is not supported")
        return scores.reshape(*h_XD.shape[:-1], scores.shape[-1])


class _Returned(BaseModelOutputWithPast):
    """A decoder's output of rows alone: whatever else a head asks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _decoder_returning(lm: LanguageModel, rows: Tensor) -> Iterator[list[bool]]:
    """While the block lasts, the decoder computes nothing and returns `rows`; the list grows whenever it is called."""
    decoder, calls = lm.decoder, list[bool]()
    own = decoder.__dict__.get("forward")

    def forward(*_: Any, **__: Any) -> Any:
        calls.append(True)
        return _Returned(last_hidden_state=rows)

    decoder.forward = forward
    try:
        yield calls
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


@torch.no_grad()
def final_norm(lm: LanguageModel) -> nn.Module:
    """What runs between the last layer and the LM head, found by running two tokens: [..., D] -> [..., D].

    Raises:
        ModelError: it is more than modules one after the other.
    """
    within = {id(part) for layer in lm.layers for part in layer.modules()}
    ran: list[tuple[nn.Module, Tensor]] = []
    stream: list[Tensor] = []

    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if module is lm.layers[-1]:
            stream[:], ran[:] = [first], []
        elif stream and isinstance(first, Tensor):
            ran.append((module, first))

    outside = _largest(lm.decoder, within)
    handles = [module.register_forward_hook(hook) for module in (*outside, lm.layers[-1])]
    try:
        ids = torch.zeros((1, 2), dtype=torch.int64, device=lm.device)
        want = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    norm = nn.Sequential(*(module for module, _ in ran))
    try:
        same = torch.allclose(norm(stream[0].to(want.device)).float(), want.float(), rtol=1e-2, atol=1e-3)
    except (RuntimeError, TypeError, ValueError):
        same = False
    if not same:
        raise ModelError(f"what {type(lm.decoder).__name__} does behind its last layer is no plain norm: not supported")
    return norm


def _largest(module: nn.Module, within: set[int]) -> list[nn.Module]:
    """The largest parts of a module that neither are nor hold any module of `within`."""
    found: list[nn.Module] = []
    for child in module.children():
        if id(child) in within:
            continue
        if any(id(part) in within for part in child.modules()):
            found += _largest(child, within)
        else:
            found.append(child)
    return found


def unembedding(lm: LanguageModel) -> Tensor:
    """Weight of the LM head [V, D], in the model's dtype; a view, not a copy.

    Raises:
        ModelError: the model was loaded without LM head.
    """
    weight: Tensor = _head(lm).weight
    return weight


def _head(lm: LanguageModel) -> Any:
    head = lm.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise ModelError(f"{lm.name} was loaded without its LM head; load it with lm_head=True")
    return head


def _refuse_truncated(lm: LanguageModel) -> None:
    if lm.truncated:
        raise ModelError(f"{lm.name} was loaded up to layer {len(lm.layers) - 1}; logits need all layers")
