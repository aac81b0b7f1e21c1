"""Running the language model for the browser: read a text, steer a continuation; loaded on first use.

Legend: K active latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard, get_args

from qwenscope.errors import FormatError
from qwenscope.features.browser.model_thread import Job, ModelThread
from qwenscope.features.browser.results import Result
from qwenscope.features.continuation import Sampling, answer_start, prompt_tokens, side_by_side
from qwenscope.features.find import find
from qwenscope.features.index import ORIGIN, open_origin
from qwenscope.features.read import Reading, read
from qwenscope.features.steering import Mode, Steering
from qwenscope.features.steering_range import KL_BOUND, text_range
from qwenscope.features.store import Index
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target

MAX_CHARACTERS = 8000
MAX_TOKENS = 1024
MAX_NEW_TOKENS = 200
MAX_PUSHES = 8
MAX_EXAMPLES = 40
MAX_CONVERSATIONS = 100
_WORDS = {"mode": get_args(Mode), "where": ("answer", "all", "prefill", "decode"), "unit": ("max", "norm")}


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
            _check_length(text)
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
            asked: {"prompt", "tokens", "temperature", "top_p", "seed", "pushes": [{"sae", "latent", "strength", "mode",
                "unit": "max" or "norm", "where"}]}; all pushes act together.

        Raises:
            FormatError: a value is missing, of the wrong type or out of range; names it.
            BusyError: too many wait.
        """
        prompt, new_tokens, pushes = asked.get("prompt"), asked.get("tokens", 48), asked.get("pushes")
        _check_length(prompt)
        _check_tokens(new_tokens)
        if not isinstance(pushes, list) or not 1 <= len(pushes) <= MAX_PUSHES:
            raise FormatError(f"pushes is a list of 1 to {MAX_PUSHES} latents")
        for push in pushes:
            self._check_push(push)
        sampling = _sampling(asked)

        def work() -> Iterator[str]:
            alive = [self._index.alive(push["sae"]) for push in pushes]
            target, lm = self._open()
            steerings = [self._steering(target, lm, push, str(prompt)) for push in pushes]
            ids = prompt_tokens(lm, str(prompt))
            pieces = side_by_side(lm, ids, steerings, alive=alive, max_new_tokens=new_tokens, sampling=sampling)
            for piece in pieces:
                yield json.dumps(asdict(piece)) + "\n"

        return self._thread.submit(work)

    def range(self, asked: dict[str, Any]) -> Job:
        """How strong one push may be, in shares of the stream's norm: see `steering_range`.

        Args:
            asked: {"prompt", "tokens", "push": as in `steer`, whose strength and unit count for nothing}.

        Returns:
            One piece, JSON: {"start", "weakest", "strongest", "kl_bound", "trials": [{"strength", "text", "surprise",
            "kl", "distinct", "changed", "is_text"}]}, the unsteered trial first.

        Raises:
            FormatError, BusyError: as `steer`; the mode is ablate.
        """
        prompt, new_tokens, given = asked.get("prompt"), asked.get("tokens", 32), asked.get("push")
        _check_length(prompt)
        _check_tokens(new_tokens)
        push = {**given, "strength": 0, "unit": "norm"} if isinstance(given, dict) else {}
        self._check_push(push)
        if push["mode"] == "ablate":
            raise FormatError("an ablation has no strength")

        def work() -> Iterator[str]:
            target, lm = self._open()
            steering = self._steering(target, lm, push, str(prompt))
            found = text_range(lm, prompt_tokens(lm, str(prompt)), steering, max_new_tokens=new_tokens)
            trials = [asdict(trial) for trial in (found.unsteered, *found.trials)]
            ends = {name: getattr(found, name) for name in ("start", "weakest", "strongest")}
            yield json.dumps({**ends, "kl_bound": KL_BOUND, "trials": trials})

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

    def _steering(self, target: Target, lm: LanguageModel, push: dict[str, Any], prompt: str) -> Steering:
        sae_id, latent = push["sae"], push["latent"]
        answer = push["where"] == "answer"
        return Steering(
            site=target.targets[sae_id],
            strength=float(push["strength"]),
            sae=target.saes[sae_id],
            latent=latent,
            mode=push["mode"],
            unit=self._index.latent(sae_id, latent)["max"] if push["unit"] == "max" else "norm",
            where=slice(answer_start(lm, prompt), None) if answer else push["where"],
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


def _check_tokens(count: Any) -> None:
    if not _is_int(count) or not 1 <= count <= MAX_NEW_TOKENS:
        raise FormatError(f"tokens is a number between 1 and {MAX_NEW_TOKENS}")


def _sampling(asked: dict[str, Any]) -> Sampling:
    temperature, top_p, seed = asked.get("temperature", 0), asked.get("top_p", 1), asked.get("seed", 0)
    if not all(isinstance(value, int | float) for value in (temperature, top_p)) or not _is_int(seed):
        raise FormatError("temperature, top_p and seed are numbers, seed a whole one")
    return Sampling(float(temperature), float(top_p), abs(seed) % (1 << 31))


def _check_length(text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise FormatError("there is no text to run")
    if len(text) > MAX_CHARACTERS:
        raise FormatError(f"a text has at most {MAX_CHARACTERS:,} characters, not {len(text):,}")
