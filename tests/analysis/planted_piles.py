"""Two piles of conversations for the stand-in that differ in one planted thing, and an SAE with a latent for it.

Phrases, roles, names of tools and styles: what is planted in the positive pile stands there once or often, and a latent
of an otherwise random SAE reads it, by least squares on other conversations than those that are contrasted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwenscope.analysis.piles import Piles, Reader, labelled
from qwenscope.analysis.pooling import Scope, scoped_rows
from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.corpus.tool_use import chat_conversation
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.sae.sae import TopKSAE

SITE = Site("layers.7")
PLANTED, LATENTS = 7, 256
Messages = list[dict[str, Any]]
Mask = Callable[[Conversation, LanguageModel], np.ndarray]

PHRASES = ["by the way", "if you please", "as I said", "on the other hand", "for heaven's sake"]
EXTRA_ROLES = ["system", "tool_call", "tool_result", "think", "text"]
TOOLS = ["web_search", "file_read", "code_execute", "ask_user", "file_write"]
STYLES: dict[str, Callable[[str], str]] = {
    "shouted": str.upper,
    "exclaimed": lambda text: text.replace(".", "!!!"),
    "lisped": lambda text: text.replace("s", "th"),
    "spelled": lambda text: "-".join(text[:120]),
    "numbered": lambda text: "".join(f"{n}) {word} " for n, word in enumerate(text.split()[:30])),
}
CASES = [(kind, which) for kind in ("phrase", "role", "tool", "style") for which in range(5)]


def base(index: int) -> Messages:
    """One question and its answer."""
    messages = [dict(message) for message in chat_conversation(11, index)["messages"] if message["role"] != "system"]
    return [{"role": each["role"], "content": each["content"][:240]} for each in messages[:2]]


def call(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"query": "today"}}}


def row(kind: str, which: int, index: int, positive: bool) -> dict[str, Any]:
    """A row of a file of conversations."""
    messages = base(index)
    choose = random.Random(index)
    if kind == "phrase" and positive:
        words = messages[0]["content"].split(" ")
        words.insert(choose.randrange(len(words)), PHRASES[which] + ",")
        messages[0]["content"] = " ".join(words)
    elif kind == "role" and positive:
        role = EXTRA_ROLES[which]
        if role == "text":
            return {"text": " ".join(message["content"] for message in messages)}
        if role == "system":
            messages.insert(0, {"role": "system", "content": base(index + 500)[1]["content"][:80]})
        elif role == "think":
            messages[1]["reasoning_content"] = base(index + 500)[1]["content"][:80]
        elif role == "tool_call":
            messages[1]["tool_calls"] = [call(choose.choice(TOOLS))]
        else:
            messages.insert(1, {"role": "tool", "content": base(index + 500)[1]["content"][:80]})
            messages.insert(1, {"role": "assistant", "content": "One moment."})
    elif kind == "tool":
        others = [name for name in TOOLS if name != TOOLS[which]]
        messages[1]["tool_calls"] = [call(TOOLS[which] if positive else choose.choice(others))]
    elif kind == "style" and positive:
        messages[1]["content"] = list(STYLES.values())[which](messages[1]["content"])
    return {"messages": messages}


def planted_T(conversation: Conversation, lm: LanguageModel, kind: str, which: int) -> np.ndarray:  # noqa: N802
    """bool [T]: on which tokens of a positive conversation the planted thing stands."""
    roles = np.array(ROLES)[conversation.roles]
    if kind in ("phrase", "tool"):
        wanted = PHRASES[which] + "," if kind == "phrase" else TOOLS[which]
        ends = np.cumsum([len(lm.tokenizer.decode([id])) for id in conversation.token_ids.tolist()])
        text = "".join(lm.tokenizer.decode([id]) for id in conversation.token_ids.tolist())
        start = text.rfind(wanted)
        place = np.searchsorted(ends, start + len(wanted) - 1, side="right")
        return np.arange(len(roles)) == place
    return roles == (EXTRA_ROLES[which] if kind == "role" else "assistant")


@dataclass
class Planted:
    """The stand-in up to SITE, loaded once."""

    recipe: Recipe
    lm: LanguageModel

    @staticmethod
    def load() -> Planted:
        recipe = load_recipe("standin", ["corpus.max_length=256"])
        return Planted(recipe, load_language_model(recipe.lm, last_layer=SITE.layer))

    def piles(self, kind: str, which: int, start: int, each: int = 12) -> Piles:
        reader = Reader(self.lm.tokenizer, 256)
        labels = [number % 2 == 0 for number in range(2 * each)]
        rows = [row(kind, which, start + number, positive) for number, positive in enumerate(labels)]
        return labelled([reader.read(each, f"row:{n}") for n, each in enumerate(rows)], labels)

    def rows(self, piles: Piles) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(rows [R, D], conversation [R], position [R])."""
        for part in scoped_rows(self.lm, piles.conversations, [SITE], Scope(), self.recipe):
            yield part.rows[SITE].float(), part.conversation_R, part.position_R

    @torch.no_grad()
    def sae(self, kind: str, which: int) -> TopKSAE:
        """Random but for latent PLANTED, whose pre-activation is about 10 on what is planted and below 0 elsewhere."""
        piles = self.piles(kind, which, start=100)
        ((x_RD, conversation_R, position_R),) = self.rows(piles)
        masks = [
            planted_T(conversation, self.lm, kind, which) & positive
            for conversation, positive in zip(piles.conversations, piles.positive_C, strict=True)
        ]
        target_R = torch.tensor(
            [bool(masks[c][t]) for c, t in zip(conversation_R.tolist(), position_R.tolist(), strict=True)]
        )
        mean_D = x_RD.mean(0)
        weight_R = torch.where(target_R, 1 / target_R.sum(), 1 / (~target_R).sum()).sqrt().unsqueeze(1)
        ridge = 1e-3 * torch.eye(x_RD.shape[1]) * ((x_RD - mean_D) * weight_R).square().sum() / x_RD.shape[1]
        weighted = (x_RD - mean_D) * weight_R
        answer_R1 = weight_R * torch.where(target_R, 1.0, -1.0).unsqueeze(1)
        direction_D = torch.linalg.solve(weighted.T @ weighted + ridge, weighted.T @ answer_R1).squeeze(1)
        scores_R = (x_RD - mean_D) @ direction_D
        low, high = scores_R[~target_R].quantile(0.999), scores_R[target_R].median()
        sae = TopKSAE(x_RD.shape[1], LATENTS, 8, seed=which)
        sae.pre_bias.copy_(mean_D)
        sae.encoder.weight[PLANTED] = 10 * direction_D / (high - low).clamp(min=1e-3)
        sae.encoder.bias[PLANTED] = -10 * low / (high - low).clamp(min=1e-3)
        return sae
