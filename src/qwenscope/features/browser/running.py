"""Running the language model for the browser: read a text, steer a continuation; loaded on first use.

Legend: K active latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard, get_args

from qwenscope.errors import FormatError
from qwenscope.features.browser.model_thread import Job, ModelThread
from qwenscope.features.index import ORIGIN, open_origin
from qwenscope.features.read import Reading, read
from qwenscope.features.steering import Mode, Steering, prompt_tokens, side_by_side
from qwenscope.features.store import Index
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target

MAX_CHARACTERS = 8000
MAX_TOKENS = 1024
MAX_NEW_TOKENS = 200
MAX_PUSHES = 8
_WORDS = {"mode": get_args(Mode), "where": ("all", "prefill", "decode"), "unit": ("max", "norm")}


class Runner:
    """The suite and its language model, on a thread of their own."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._thread = ModelThread()
        self._loaded: tuple[Target, LanguageModel] | None = None
        self.close: Callable[[], bool] = self._thread.close

    @staticmethod
    def possible(folder: Path) -> bool:
        """Whether the index knows where its SAEs and language model are."""
        return (folder / ORIGIN).is_file()

    def read(self, text: Any, chat: bool) -> Job:
        """Tokens of a text (as a user's turn if `chat`) and each SAE's active latents, strongest first.

        Returns:
            One piece, JSON: {"tokens", "roles", "saes": {sae_id: [[[latent, value], ...] per token]}}; the first
            position reads nothing.

        Raises:
            FormatError: the text is empty or too long.
            BusyError: too many wait.
        """
        _check_length(text)
        given: Any = [{"role": "user", "content": text}] if chat else text

        def work() -> Iterator[str]:
            target, lm = self._open()
            yield _reading_json(read(lm, lm.tokenizer, given, target.saes, sites=target.sites, max_length=MAX_TOKENS))

        return self._thread.submit(work)

    def steer(self, asked: dict[str, Any]) -> Job:
        """Pieces, a line of JSON each, {"run", "text", "effect"} of the steered run and its controls.

        Args:
            asked: {"prompt", "tokens", "pushes": [{"sae", "latent", "strength", "mode", "unit": "max" or "norm",
                "where"}]}; all pushes act together.

        Raises:
            FormatError: a value is missing, of the wrong type or out of range; names it.
            BusyError: too many wait.
        """
        prompt, new_tokens, pushes = asked.get("prompt"), asked.get("tokens", 48), asked.get("pushes")
        _check_length(prompt)
        if not _is_int(new_tokens) or not 1 <= new_tokens <= MAX_NEW_TOKENS:
            raise FormatError(f"tokens is a number between 1 and {MAX_NEW_TOKENS}")
        if not isinstance(pushes, list) or not 1 <= len(pushes) <= MAX_PUSHES:
            raise FormatError(f"pushes is a list of 1 to {MAX_PUSHES} latents")
        for push in pushes:
            self._check_push(push)

        def work() -> Iterator[str]:
            alive = [self._index.alive(push["sae"]) for push in pushes]
            target, lm = self._open()
            steerings = [self._steering(target, push) for push in pushes]
            pieces = side_by_side(lm, prompt_tokens(lm, str(prompt)), steerings, alive=alive, max_new_tokens=new_tokens)
            for piece in pieces:
                yield json.dumps({"run": piece.run, "text": piece.text, "effect": piece.effect}) + "\n"

        return self._thread.submit(work)

    def _open(self) -> tuple[Target, LanguageModel]:
        if self._loaded is None:
            target = open_origin(self._index.folder)
            lm = target.language_model()
            for layer in lm.layers:  # a pass for nobody ends at the next layer, however large the model
                layer.register_forward_pre_hook(self._thread.check)
            self._loaded = target, lm
        return self._loaded

    def _check_push(self, push: Any) -> None:
        if not isinstance(push, dict):
            raise FormatError("a push is an object with sae, latent, strength, mode, unit and where")
        sae_id, latent, strength = push.get("sae"), push.get("latent"), push.get("strength")
        if not isinstance(sae_id, str) or not _is_int(latent):
            raise FormatError(f"there is no latent {latent} of {sae_id}")
        self._index.check(sae_id, latent)
        if not isinstance(strength, int | float) or isinstance(strength, bool) or not abs(strength) <= 1000:
            raise FormatError("strength is a number between -1000 and 1000")
        for name, words in _WORDS.items():
            if push.get(name) not in words:
                raise FormatError(f"{name} is {', '.join(words[:-1])} or {words[-1]}, not {push.get(name)!r}")

    def _steering(self, target: Target, push: dict[str, Any]) -> Steering:
        sae_id, latent = push["sae"], push["latent"]
        return Steering(
            site=target.targets[sae_id],
            strength=float(push["strength"]),
            sae=target.saes[sae_id],
            latent=latent,
            mode=push["mode"],
            unit=self._index.latent(sae_id, latent)["max"] if push["unit"] == "max" else "norm",
            where=push["where"],
        )


def _reading_json(reading: Reading) -> str:
    saes = {}
    for sae_id, codes in reading.codes.items():
        rows: list[list[list[float]]] = [[]]
        for values_K, indices_K in zip(codes.values[1:].tolist(), codes.indices[1:].tolist(), strict=True):
            pairs = sorted(((value, latent) for value, latent in zip(values_K, indices_K, strict=True)), reverse=True)
            rows.append([[latent, float(f"{value:.4g}")] for value, latent in pairs if value > 0])
        saes[sae_id] = rows
    return json.dumps({"tokens": reading.tokens, "roles": reading.roles, "saes": saes}, separators=(",", ":"))


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_length(text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise FormatError("there is no text to run")
    if len(text) > MAX_CHARACTERS:
        raise FormatError(f"a text has at most {MAX_CHARACTERS:,} characters, not {len(text):,}")
