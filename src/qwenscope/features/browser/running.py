"""Running the language model for the browser: read a text, steer a continuation; loaded on first use.

Legend: K active latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwenscope.corpus.conversation import ROLES
from qwenscope.errors import FormatError
from qwenscope.features.browser.asked import (
    Given,
    check_push,
    checked_length,
    given_in,
    is_int,
    latent_in,
    latents_in,
    pushes_in,
    sampling_in,
    token_count,
)
from qwenscope.features.browser.model_thread import Job, ModelThread
from qwenscope.features.browser.results import Result
from qwenscope.features.continuation import answer_start, prompt_tokens, side_by_side
from qwenscope.features.find import find
from qwenscope.features.index import ORIGIN, open_origin
from qwenscope.features.loss_effect import loss_effect
from qwenscope.features.output_score import output_scores
from qwenscope.features.read import Reading, read, read_tokens
from qwenscope.features.steering import Steering
from qwenscope.features.steering_range import KL_BOUND, text_range
from qwenscope.features.store import Index
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target

MAX_TOKENS = 1024
MAX_EXAMPLES = 40
MAX_CONVERSATIONS = 100


class Runner:
    """The suite and its language model, on a thread of their own."""

    def __init__(self, index: Index, results: Sequence[Result] = ()) -> None:
        self._index = index
        self._monitors = {result.name: result.score for result in results if result.score is not None}
        self._thread = ModelThread()
        self._loaded: tuple[Target, LanguageModel] | None = None
        self.close: Callable[[], bool] = self._thread.close

    @staticmethod
    def possible(folder: Path) -> bool:
        """Whether the index knows where its SAEs and language model are."""
        return (folder / ORIGIN).is_file()

    def read(self, asked: dict[str, Any]) -> Job:
        """Tokens of a text or conversation and each SAE's active latents, strongest first.

        Args:
            asked: {"text"}, {"messages", "tools"}, or {"conversation": address of its first token in the index}.

        Returns:
            One piece, JSON: {"tokens", "roles", "truncated", "saes": {sae_id: [[[latent, value], ...] per token]}}; the
            first position reads nothing. At most MAX_TOKENS tokens are read, which `truncated` tells.

        Raises:
            FormatError: nothing to read, or what `given_in` refuses.
            BusyError: too many wait.
        """
        start = asked.get("conversation")
        if start is None:
            given = given_in(asked, "text")
        elif not is_int(start) or not 0 <= start < 1 << 53:
            raise FormatError("conversation is the address of its first token, a number")

        def work() -> Iterator[str]:
            target, lm = self._open()
            saes, sites = target.saes, target.sites
            if start is None:
                content, tools = given.content, given.tools
                reading = read(lm, lm.tokenizer, content, saes, sites=sites, tools=tools, max_length=MAX_TOKENS)
            else:
                kept = self._index.conversation(start)
                ids, roles = kept["ids"][:MAX_TOKENS], [ROLES[role] for role in kept["roles"][:MAX_TOKENS]]
                cut = len(ids) < len(kept["ids"])
                reading = read_tokens(lm, ids, saes, sites=sites, roles=roles, truncated=cut)
            yield _reading_json(reading)

        return self._thread.submit(work)

    def find(self, asked: dict[str, Any]) -> Job:
        """Latents of all SAEs that fire on texts beyond their base rate: see `features/find.py`.

        Args:
            asked: {"texts": [text], "but_not": [text]}.

        Returns:
            One piece, JSON: a list of hits.

        Raises:
            FormatError: no texts, too many, or one of them empty or too long.
            BusyError: too many wait.
        """
        texts, but_not = asked.get("texts"), asked.get("but_not", [])
        if not isinstance(texts, list) or not isinstance(but_not, list) or len(texts) + len(but_not) > MAX_EXAMPLES:
            raise FormatError(f"texts and but_not are lists, of at most {MAX_EXAMPLES} texts together")
        for text in [*texts, *but_not]:
            checked_length(text)
        if not texts:
            raise FormatError("there is no text to find latents by")

        def work() -> Iterator[str]:
            target, lm = self._open()
            yield json.dumps(find(self._index, lm, target.saes, target.sites, texts, but_not=but_not))

        return self._thread.submit(work)

    def score(self, asked: dict[str, Any]) -> Job:
        """A monitor's scores of conversations.

        Args:
            asked: {"conversations": [{"messages", "tools"} or {"text"}], "monitor": its name, where there are several,
                "tokens": whether every token is scored}.

        Returns:
            One piece, JSON: {"scores": [a line of `monitor score` for each]}.

        Raises:
            FormatError: no such monitor, no conversations or too many.
            BusyError: too many wait.
        """
        rows, tokens = asked.get("conversations"), asked.get("tokens", False)
        score = self._monitors[self._monitor(asked.get("monitor"))]
        if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_CONVERSATIONS:
            raise FormatError(f"conversations is a list of 1 to {MAX_CONVERSATIONS}")
        if not all(isinstance(row, dict) for row in rows) or not isinstance(tokens, bool):
            raise FormatError("a conversation is an object with messages or text; tokens is true or false")

        def work() -> Iterator[str]:
            target, lm = self._open()
            yield json.dumps({"scores": score(target, lm, rows, tokens)}, separators=(",", ":"))

        return self._thread.submit(work)

    def _monitor(self, name: Any) -> str:
        """The one that is meant."""
        there = list(self._monitors)
        if not there:
            raise FormatError("there is no monitor here; start browse with --results and a monitor's folder")
        if name is None and len(there) == 1:
            return there[0]
        if name not in there:
            raise FormatError(f"monitor is one of {', '.join(there)}")
        return str(name)

    def steer(self, asked: dict[str, Any]) -> Job:
        """Pieces, a line of JSON each, {"run", "text", "effect", "note"} of the steered run and its controls.

        Args:
            asked: {"prompt", or "messages" and "tools"; "tokens", "temperature", "top_p", "seed", "pushes": [{"sae",
                "latent", "strength", "mode", "unit": "max" or "norm", "where"}]}; all pushes act together.

        Raises:
            FormatError: a value is missing, of the wrong type or out of range; names it.
            BusyError: too many wait.
        """
        given, pushes = given_in(asked, "prompt"), pushes_in(asked, self._index)
        new_tokens, sampling = token_count(asked, 48), sampling_in(asked)

        def work() -> Iterator[str]:
            alive = [self._index.alive(push["sae"]) for push in pushes]
            target, lm = self._open()
            steerings = [self._steering(target, lm, push, given) for push in pushes]
            ids = prompt_tokens(lm, given.content, given.tools)
            pieces = side_by_side(lm, ids, steerings, alive=alive, max_new_tokens=new_tokens, sampling=sampling)
            for piece in pieces:
                yield json.dumps(asdict(piece)) + "\n"

        return self._thread.submit(work)

    def range(self, asked: dict[str, Any]) -> Job:
        """How strong one push may be, in shares of the stream's norm: see `steering_range`.

        Args:
            asked: {"prompt", or "messages" and "tools"; "tokens", "push": as in `steer`, whose strength and unit count
                for nothing}.

        Returns:
            One piece, JSON: {"start", "weakest", "strongest", "kl_bound", "trials": [{"strength", "text", "surprise",
            "kl", "distinct", "changed", "is_text"}]}, the unsteered trial first.

        Raises:
            FormatError, BusyError: as `steer`; the mode is ablate.
        """
        given, new_tokens, asked_push = given_in(asked, "prompt"), token_count(asked, 32), asked.get("push")
        push = {**asked_push, "strength": 0, "unit": "norm"} if isinstance(asked_push, dict) else {}
        check_push(push, self._index)
        if push["mode"] == "ablate":
            raise FormatError("an ablation has no strength")

        def work() -> Iterator[str]:
            target, lm = self._open()
            steering = self._steering(target, lm, push, given)
            ids = prompt_tokens(lm, given.content, given.tools)
            found = text_range(lm, ids, steering, max_new_tokens=new_tokens)
            trials = [asdict(trial) for trial in (found.unsteered, *found.trials)]
            ends = {name: getattr(found, name) for name in ("start", "weakest", "strongest")}
            yield json.dumps({**ends, "kl_bound": KL_BOUND, "trials": trials})

        return self._thread.submit(work)

    def output_scores(self, asked: dict[str, Any]) -> Job:
        """Output scores of some latents: see `features/output_score.py`.

        Args:
            asked: {"sae", "latents"}.

        Returns:
            One piece, JSON: {"scores": [[score, without the push, delta token confidence] of each]}.

        Raises:
            FormatError: no latents, too many, or one that is not there.
            BusyError: too many wait.
        """
        sae_id, latents = latents_in(asked, self._index)

        def work() -> Iterator[str]:
            yield json.dumps({"scores": list(output_scores(*self._open(), sae_id, latents))})

        return self._thread.submit(work)

    def loss_effect(self, asked: dict[str, Any]) -> Job:
        """What ablating a latent where it fires does to the loss: see `features/loss_effect.py`.

        Args:
            asked: {"sae", "latent"}.

        Returns:
            One piece, JSON: the fields of `LossEffect`.

        Raises:
            FormatError: no such latent, or none that can be ablated.
            BusyError: too many wait.
        """
        sae_id, latent = latent_in(asked, self._index)

        def work() -> Iterator[str]:
            yield json.dumps(asdict(loss_effect(self._index, *self._open(), sae_id, latent)))

        return self._thread.submit(work)

    def _open(self) -> tuple[Target, LanguageModel]:
        if self._loaded is None:
            target = open_origin(self._index.folder)
            lm = target.language_model()
            for layer in lm.layers:  # a pass for nobody ends at the next layer, however large the model
                layer.register_forward_pre_hook(self._thread.check)
            self._loaded = target, lm
        return self._loaded

    def _steering(self, target: Target, lm: LanguageModel, push: dict[str, Any], given: Given) -> Steering:
        sae_id, latent = push["sae"], push["latent"]
        answer = push["where"] == "answer"
        return Steering(
            site=target.targets[sae_id],
            strength=float(push["strength"]),
            sae=target.saes[sae_id],
            latent=latent,
            mode=push["mode"],
            unit=self._index.latent(sae_id, latent)["max"] if push["unit"] == "max" else "norm",
            where=slice(answer_start(lm, given.content, given.tools), None) if answer else push["where"],
        )


def _reading_json(reading: Reading) -> str:
    saes = {}
    for sae_id, codes in reading.codes.items():
        rows: list[list[list[float]]] = [[]]
        for values_K, indices_K in zip(codes.values[1:].tolist(), codes.indices[1:].tolist(), strict=True):
            pairs = sorted(((value, latent) for value, latent in zip(values_K, indices_K, strict=True)), reverse=True)
            rows.append([[latent, float(f"{value:.4g}")] for value, latent in pairs if value > 0])
        saes[sae_id] = rows
    names = {"tokens": reading.tokens, "roles": reading.roles, "truncated": reading.truncated}
    return json.dumps({**names, "saes": saes}, separators=(",", ":"))
