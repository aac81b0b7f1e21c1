"""Score tokens as a model generates, through the one intervention seam: a hook that reads rows and changes none.

    ids, roles = prompt(tokenizer, messages)
    with watch(detector, sae, model, roles) as watching:
        model.generate(ids, max_new_tokens=64)
    watching.score                       # of all tokens that went through the model, and counted

The last token of a generation never goes through the model, and is not scored.

Legend: C conversations of a pass (one), T its positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwenscope.analysis.detector import Detector, Running
from qwenscope.corpus.anything import Messages, render_given
from qwenscope.corpus.chat import on_one_day
from qwenscope.corpus.conversation import ROLES
from qwenscope.errors import FormatError
from qwenscope.features.steering import Seen
from qwenscope.lm.hooks import intervene
from qwenscope.lm.model import LanguageModel, as_language_model
from qwenscope.recipe import Recipe
from qwenscope.sae.sae import SAE


class Watching:
    """What a detector has seen of one conversation so far.

    Args:
        detector: the monitor.
        sae: the SAE that it is for.
        roles: codes of ROLES of the prompt's tokens; what comes after them is the assistant's.
        skip_roles: roles that the SAE never saw.
    """

    def __init__(self, detector: Detector, sae: SAE, roles: Sequence[int], skip_roles: Sequence[str] = ()) -> None:
        self.detector, self.sae = detector, sae
        self.position: list[int] = []
        """Of the tokens that counted."""
        self.token: list[float] = []
        """Score of each of them by itself."""
        self.so_far: list[float] = []
        """Score of all up to each of them."""
        self.read = 0
        """Positions that went through the model."""
        self._roles = roles
        self._wanted = {code for code, role in enumerate(ROLES) if role in detector.scope.counted(skip_roles)}
        self._in_roles = 0
        self._running = Running.start(len(detector.weight_F))
        self.seen = Seen()
        """Knows where each pass begins."""

    @property
    def score(self) -> float:
        """Of the conversation so far."""
        return self.so_far[-1] if self.so_far else self.detector.bias

    @property
    def alarm(self) -> bool:
        """Whether that is above the threshold."""
        return self.detector.alarm(self.score)

    def see(self, x_CTD: Tensor) -> Tensor:
        """Score the rows of positions that were not seen before; the rows stay as they are.

        Raises:
            FormatError: a pass of several conversations.
        """
        if len(x_CTD) != 1:
            raise FormatError(f"a pass of {len(x_CTD)} conversations cannot be watched; generate one at a time")
        start, count = self.seen.positions, x_CTD.shape[1]
        new = [t for t in range(self.read, start + count) if self._counts(t)]
        self.read = max(self.read, start + count)
        if new:
            x_RD, position_R = x_CTD[0, [t - start for t in new]], torch.tensor(new)
            active_RF = self.detector.active(self.sae, x_RD, position_R)
            self._running, token_R, so_far_R = self.detector.go_on(self._running, active_RF)
            self.position += new
            self.token += token_R.tolist()
            self.so_far += so_far_R.tolist()
        return x_CTD

    def _counts(self, position: int) -> bool:
        """Whether the next position counts; asked once of each, in order."""
        assistant = ROLES.index("assistant")
        role = int(self._roles[position]) if position < len(self._roles) else assistant
        if position == 0 or role not in self._wanted:
            return False
        self._in_roles += 1
        scope = self.detector.scope
        return (scope.start or 0) < self._in_roles and (scope.stop is None or self._in_roles <= scope.stop)


def prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[dict[str, Any]] | None = None
) -> tuple[Tensor, list[int]]:
    """Token ids [1, T] of a conversation that the assistant is to go on with, and the role of each (codes of ROLES).

    Raises:
        CorpusError: the chat template refuses the messages.
    """
    tokenizer = on_one_day(tokenizer)
    rendered = render_given(tokenizer, messages, tools)
    turns = [dict(message) for message in rendered.messages]
    ids = tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, return_dict=False)  # type: ignore[arg-type]
    roles = [ROLES.index("template")] * len(ids)
    for position, (here, there) in enumerate(zip(rendered.token_ids.tolist(), ids, strict=False)):
        if here != there:
            break
        roles[position] = int(rendered.roles[position])
    return torch.tensor([list(ids)]), roles


@contextmanager
def watch(
    detector: Detector,
    sae: SAE,
    model: PreTrainedModel | LanguageModel,
    roles: Sequence[int] = (),
    recipe: Recipe | None = None,
) -> Iterator[Watching]:
    """Watch what goes through `model` while the block lasts; the model is checked against the monitor's.

    Args:
        detector: the monitor.
        sae: `detector.sae(target)`.
        model: any loaded transformers model.
        roles: of the prompt's tokens, see `prompt`; without them all is the assistant's.
        recipe: of the target, if its SAEs were not trained on all roles.

    Raises:
        FormatError: another model than the monitor's.
        ModelError: it has no such site.
    """
    lm = as_language_model(model)
    detector.check_model(lm)
    watching = Watching(detector, sae, roles, recipe.activations.skip_roles if recipe else ())
    edits: dict[Any, Any] = {detector.about["site"]: watching.see}
    with watching.seen.watching(lm), intervene(lm, edits):
        yield watching
