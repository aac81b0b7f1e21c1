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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwenscope.corpus.anything import Messages, render_given
from qwenscope.corpus.conversation import ROLES
from qwenscope.features.token_text import pieces_of, readable
from qwenscope.lm.forward import site_rows
from qwenscope.lm.model import LanguageModel, as_language_model
from qwenscope.lm.sites import Site, Where
from qwenscope.opening import check_widths, sites_of_suite
from qwenscope.sae.sae import SAE, Codes


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
    truncated: bool = False
    """Whether tokens beyond the longest that was asked for are missing."""


def read(
    model: PreTrainedModel | LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    text_or_messages: str | Messages,
    suite: Mapping[str, SAE],
    *,
    sites: Mapping[str, Where] | None = None,
    tools: list[dict[str, Any]] | None = None,
    max_length: int = 4096,
) -> Reading:
    """Tokens, roles and codes of a text, at every hook point of `suite`, from one truncated pass.

    Args:
        model: a transformers causal language model, or a loaded `LanguageModel`.
        tokenizer: its tokenizer.
        text_or_messages: plain text, read as a document of the corpus (with BOS where the tokenizer writes it), or
            messages for the tokenizer's chat template.
        suite: SAEs by id.
        sites: {sae_id: where it reads}; None takes each SAE's own configuration, or the published suite's by id.
        tools: tool schemas of a conversation.
        max_length: tokens beyond are cut off.

    Raises:
        CorpusError: no tokens, or messages that the template refuses.
        FormatError: an SAE whose site is not known, or that does not fit the model.
        ModelError: a site that the model does not have.
    """
    lm = as_language_model(model, tokenizer)
    rendered = render_given(tokenizer, text_or_messages, tools, max_length)
    roles = None if isinstance(text_or_messages, str) else [ROLES[role] for role in rendered.roles.tolist()]
    ids: list[int] = rendered.token_ids.tolist()
    return read_tokens(lm, ids, suite, sites=sites, roles=roles, truncated=rendered.truncated)


def read_tokens(
    lm: LanguageModel,
    token_ids: Sequence[int],
    suite: Mapping[str, SAE],
    *,
    sites: Mapping[str, Where] | None = None,
    roles: list[str] | None = None,
    truncated: bool = False,
) -> Reading:
    """As `read`, of tokens that are there already, such as an index's; `roles` and `truncated` are told of them.

    Raises:
        FormatError, ModelError: as `read`.
    """
    at = sites_of_suite(suite) if sites is None else {sae_id: Site.of(site) for sae_id, site in sites.items()}
    check_widths(suite, at, lm)
    token_ids = list(token_ids)
    rows = site_rows(lm, torch.tensor([token_ids]), sorted({at[sae_id] for sae_id in suite}))
    codes = {}
    with torch.no_grad():
        for sae_id, sae in suite.items():
            found = sae.encode(rows[at[sae_id]][0].to(sae.pre_bias.device))
            codes[sae_id] = Codes(found.values.cpu(), found.indices.cpu(), sae.dict_size)
    return Reading(token_ids, readable(pieces_of(lm.tokenizer, token_ids)), roles, codes, truncated)
