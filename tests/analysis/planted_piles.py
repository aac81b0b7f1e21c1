"""Two piles of conversations for the stand-in that differ in one planted thing, and an SAE with a latent for it.

Phrases, roles, names of tools and styles: what is planted in the positive pile stands there once or often. Rows of its
tokens are the stand-in's plus one direction, as of a model that knows it, which one latent of an otherwise random SAE
reads. (Without it, 64 dimensions of a small model hold no line between a phrase's last token and all others.)
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
SAID = Scope(tuple(role for role in ROLES if role != "template"))
"""What the template writes around a further turn is alike in all conversations: any latent may read it."""
Messages = list[dict[str, Any]]

PHRASES = ["by the way", "if you please", "as I said", "on the other hand", "for heaven's sake"]
EXTRA_ROLES = ["system", "tool_call", "tool_result", "think", "text"]
TOOLS = ["web_search", "file_read", "code_execute", "ask_user", "file_write"]
STYLES: dict[str, Callable[[str], str]] = {
    "shouted": str.upper,
    "exclaimed": lambda text: text.replace(".", "!!!"),
    "lisped": lambda text: text.replace("s", "th"),
    "asked": lambda text: text.replace(".", "?"),
    "titled": str.title,
}
"""None with signs that stand nowhere else: any latent reads hyphens between all letters."""
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
    if kind == "role":
        return roles == EXTRA_ROLES[which]
    return np.isin(np.arange(len(roles)), np.flatnonzero(roles == "assistant")[-3:])  # a style shows in the end


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

    def rows(self, piles: Piles, kind: str, which: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(rows [R, D] as they are, with what is planted, conversation [R])."""
        for part in scoped_rows(self.lm, piles.conversations, [SITE], SAID, self.recipe):
            x_RD = part.rows[SITE].float()
            marks = [
                planted_T(conversation, self.lm, kind, which) & positive
                for conversation, positive in zip(piles.conversations, piles.positive_C, strict=True)
            ]
            places = zip(part.conversation_R.tolist(), part.position_R.tolist(), strict=True)
            planted_R = torch.tensor([bool(marks[c][t]) for c, t in places])
            added_RD = planted_R.unsqueeze(1) * self.loudness(x_RD) * self.direction_D
            yield x_RD, x_RD + added_RD, part.conversation_R

    @property
    def direction_D(self) -> torch.Tensor:  # noqa: N802
        return torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(9)), dim=0)

    @staticmethod
    def loudness(x_RD: torch.Tensor) -> torch.Tensor:
        """Three times a row's usual distance from the mean."""
        return 3 * (x_RD - x_RD.mean(0)).norm(dim=1).median()

    @torch.no_grad()
    def sae(self, x_RD: torch.Tensor, seed: int) -> TopKSAE:
        """Random but for latent PLANTED, which reads the direction where it is added."""
        sae = TopKSAE(x_RD.shape[1], LATENTS, 8, seed=seed)
        sae.pre_bias.copy_(x_RD.mean(0))
        sae.encoder.weight[PLANTED] = self.direction_D
        sae.encoder.bias[PLANTED] = -self.loudness(x_RD) / 2
        return sae
