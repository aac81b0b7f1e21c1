"""Running the language model for the browser: read a text, steer a continuation; loaded on first use.

Legend: K active latents.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from qwenscope.errors import FormatError
from qwenscope.features.index import open_origin
from qwenscope.features.read import read
from qwenscope.features.steering import Steering, prompt_tokens, side_by_side
from qwenscope.features.store import Index
from qwenscope.lm.load import LanguageModel
from qwenscope.opening import Target

MAX_CHARACTERS = 8000
MAX_TOKENS = 1024
MAX_NEW_TOKENS = 200
MAX_PUSHES = 8


class Runner:
    """The suite and its language model, behind one lock."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._loaded: tuple[Target, LanguageModel] | None = None

    @staticmethod
    def possible(folder: Path) -> bool:
        """Whether the index knows where its SAEs and language model are."""
        return (folder / "origin.json").is_file()

    def _open(self) -> tuple[Target, LanguageModel]:
        if self._loaded is None:
            target = open_origin(self._index.folder)
            self._loaded = target, target.language_model()
        return self._loaded

    def read(self, text: Any, chat: bool) -> dict[str, Any]:
        """Tokens of a text (as a user's turn if `chat`) and each SAE's active latents, strongest first.

        Returns:
            {"tokens", "roles", "saes": {sae_id: [[[latent, value], ...] per token]}}; the first position reads nothing.

        Raises:
            FormatError: the text is empty or too long.
        """
        _check_length(text)
        with self._lock:
            target, lm = self._open()
            given: Any = [{"role": "user", "content": text}] if chat else text
            reading = read(lm, lm.tokenizer, given, target.saes, layers=target.layers, max_length=MAX_TOKENS)
        saes = {}
        for sae_id, codes in reading.codes.items():
            rows: list[list[list[float]]] = [[]]
            for values_K, indices_K in zip(codes.values[1:].tolist(), codes.indices[1:].tolist(), strict=True):
                pairs = sorted(
                    ((value, latent) for value, latent in zip(values_K, indices_K, strict=True)), reverse=True
                )
                rows.append([[latent, float(f"{value:.4g}")] for value, latent in pairs if value > 0])
            saes[sae_id] = rows
        return {"tokens": reading.tokens, "roles": reading.roles, "saes": saes}

    def steer(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Pieces {"run", "text", "effect"} of the steered run and its controls.

        Args:
            asked: {"prompt", "tokens", "pushes": [{"sae", "latent", "strength", "mode", "unit": "max" or "norm",
                "where"}]}; all pushes act together.

        Raises:
            FormatError: a value is missing, of the wrong type or out of range; names it.
        """
        prompt, new_tokens, pushes = asked.get("prompt"), asked.get("tokens", 48), asked.get("pushes")
        _check_length(prompt)
        if not _is_int(new_tokens) or not 1 <= new_tokens <= MAX_NEW_TOKENS:
            raise FormatError(f"tokens is a number between 1 and {MAX_NEW_TOKENS}")
        if not isinstance(pushes, list) or not 1 <= len(pushes) <= MAX_PUSHES:
            raise FormatError(f"pushes is a list of 1 to {MAX_PUSHES} latents")
        for push in pushes:
            self._check_push(push)
        alive = [self._alive(push["sae"]) for push in pushes]
        with self._lock:
            target, lm = self._open()
            steerings = [self._steering(target, push) for push in pushes]
            pieces = side_by_side(lm, prompt_tokens(lm, str(prompt)), steerings, alive=alive, max_new_tokens=new_tokens)
            for piece in pieces:
                yield {"run": piece.run, "text": piece.text, "effect": piece.effect}

    def _check_push(self, push: Any) -> None:
        if not isinstance(push, dict):
            raise FormatError("a push is an object with sae, latent, strength, mode, unit and where")
        sae_id, latent, strength = push.get("sae"), push.get("latent"), push.get("strength")
        if not isinstance(sae_id, str) or not _is_int(latent):
            raise FormatError(f"there is no latent {latent} of {sae_id}")
        self._index.check(sae_id, latent)
        if not isinstance(strength, int | float) or isinstance(strength, bool) or not abs(strength) <= 1000:
            raise FormatError("strength is a number between -1000 and 1000")
        if push.get("unit") not in ("max", "norm"):
            raise FormatError("unit is max or norm")

    def _steering(self, target: Target, push: dict[str, Any]) -> Steering:
        sae_id, latent = push["sae"], push["latent"]
        return Steering(
            layer=target.layers[sae_id],
            strength=float(push["strength"]),
            sae=target.saes[sae_id],
            latent=latent,
            mode=str(push.get("mode")),  # type: ignore[arg-type]
            unit=self._index.latent(sae_id, latent)["max"] if push["unit"] == "max" else "norm",
            where=str(push.get("where")),  # type: ignore[arg-type]
        )

    def _alive(self, sae_id: str) -> list[int]:
        return [latent for latent, density in enumerate(self._index.table(sae_id)["density"]) if density > 0]


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_length(text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise FormatError("there is no text to run")
    if len(text) > MAX_CHARACTERS:
        raise FormatError(f"a text has at most {MAX_CHARACTERS:,} characters, not {len(text):,}")
