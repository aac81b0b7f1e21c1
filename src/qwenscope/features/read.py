"""Read a text or conversation with a suite of SAEs, on any Hugging Face causal language model.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from qwenscope import load_suite
    from qwenscope.features.read import read

    reading = read(model, tokenizer, "The capital of France", load_suite("runs/demo"))
    reading.codes["sae_attn_mid"].indices        # [T, K] latents per token

Legend: T tokens, K active latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwenscope.corpus.chat import ROLES, render
from qwenscope.corpus.repair import Dropped
from qwenscope.errors import CorpusError, ModelError
from qwenscope.features.token_text import pieces_of, readable
from qwenscope.lm.forward import residual_streams
from qwenscope.lm.load import LanguageModel, layer_kinds
from qwenscope.opening import check_widths, layers_of
from qwenscope.sae.topk import Codes, TopKSAE

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reading:
    """What a suite sees in a text."""

    token_ids: list[int]
    tokens: list[str]
    """Text of each token; a character of several tokens stands at the first of them, the others are empty."""
    roles: list[str] | None
    """Role of each token of a conversation; None for plain text."""
    codes: dict[str, Codes]
    """{sae_id: codes [T, K]}. The first position is an attention sink in many models: its codes mean little."""


def read(
    model: PreTrainedModel | LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    text_or_messages: str | Messages,
    suite: Mapping[str, TopKSAE],
    *,
    layers: Mapping[str, int] | None = None,
    tools: list[dict[str, Any]] | None = None,
    max_length: int = 4096,
) -> Reading:
    """Tokens, roles and codes of a text, at every hook point of `suite`, from one truncated pass.

    Args:
        model: a transformers causal language model, or a loaded `LanguageModel`.
        tokenizer: its tokenizer.
        text_or_messages: plain text, or messages for the tokenizer's chat template.
        suite: SAEs by id.
        layers: {sae_id: layer}; None takes each SAE's own configuration, or the published suite's by id.
        tools: tool schemas of a conversation.
        max_length: tokens beyond are cut off.

    Raises:
        CorpusError: no tokens, or messages that the template refuses.
        FormatError: an SAE whose layer is not known, or that does not fit the model.
        ModelError: a layer that the model does not have.
    """
    lm = as_language_model(model, tokenizer)
    at = layers_of(suite) if layers is None else dict(layers)
    check_widths(suite, lm)
    token_ids, roles = _tokens(tokenizer, text_or_messages, tools, max_length)
    streams = residual_streams(lm, torch.tensor([token_ids]), sorted({at[sae_id] for sae_id in suite}))
    codes = {}
    with torch.no_grad():
        for sae_id, sae in suite.items():
            found = sae.encode(streams[at[sae_id]][0].to(sae.pre_bias.device))
            codes[sae_id] = Codes(found.values.cpu(), found.indices.cpu(), sae.dict_size)
    return Reading(token_ids, readable(pieces_of(tokenizer, token_ids)), roles, codes)


def as_language_model(model: PreTrainedModel | LanguageModel, tokenizer: Any = None) -> LanguageModel:
    """The view of any Hugging Face causal language model that interventions and forward passes work on.

    Raises:
        ModelError: the decoder layers are not to be found.
    """
    if isinstance(model, LanguageModel):
        return model
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    stacks = [
        module
        for module in decoder.children()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no list of decoder layers; this family is not supported")
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        layers=list(stacks[0]),
        layer_kinds=layer_kinds(config),
        hidden_dim=config.hidden_size,
        device=embedding.device,
        dtype=embedding.dtype,
        name=model.name_or_path or type(model).__name__,
        revision=None,
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, given: str | Messages, tools: list[dict[str, Any]] | None, max_length: int
) -> tuple[list[int], list[str] | None]:
    if isinstance(given, str):
        token_ids: list[int] = tokenizer(given, add_special_tokens=False).input_ids[:max_length]
        if not token_ids:
            raise CorpusError("there is no text to read")
        return token_ids, None
    try:
        rendered = render([dict(message) for message in given], tools, tokenizer, max_length)
    except Dropped as dropped:
        raise CorpusError(f"the messages cannot be rendered: {dropped}") from None
    return rendered.token_ids.tolist(), [ROLES[role] for role in rendered.roles.tolist()]
