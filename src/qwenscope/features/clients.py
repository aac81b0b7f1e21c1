"""Who writes explanations: an OpenAI-compatible endpoint, a local model, or a deterministic rule for tests.

A key is read from the environment when it is used; it is never stored, logged or shown.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from qwenscope.errors import FormatError, HubError, reason
from qwenscope.features.continuation import generate
from qwenscope.hub import retrying
from qwenscope.lm.load import load_language_model
from qwenscope.recipe import LMRecipe

TIMEOUT_SECONDS = 120.0
ANSWER_LIMIT = 1 << 20
MARKED = re.compile(r"<<(.*?)>>(?!>)", re.DOTALL)


class Client(Protocol):
    """Anything that answers."""

    name: str
    """What the records say wrote them."""

    def complete(self, system: str, user: str, max_tokens: int) -> str:
        """The answer to one exchange."""


class EndpointClient:
    """A chat endpoint in the manner of OpenAI: POST {base_url}/chat/completions."""

    def __init__(self, base_url: str, model: str, key_variable: str | None = None) -> None:
        """
        Args:
            base_url: such as http://127.0.0.1:8000/v1; anything but loopback needs https.
            model: the model's name there.
            key_variable: environment variable that holds the key; None sends none.

        Raises:
            FormatError: not such an address, no model, or the variable is not set or holds what is no key.
        """
        try:
            parts = urlsplit(base_url)
            _ = parts.port
        except ValueError as error:
            raise FormatError(f"endpoint {base_url} is no address: {error}") from None
        loopback = parts.hostname in ("127.0.0.1", "localhost", "::1")
        if not model or not base_url.isascii() or not base_url.isprintable() or " " in base_url:
            raise FormatError(f"endpoint {base_url!r} and model {model!r}: give an address and a name")
        if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
            raise FormatError(f"endpoint {base_url} must be https, or http on this machine")
        if parts.username or parts.password:
            raise FormatError("an endpoint holds no key; name an environment variable instead")
        if key_variable is not None:
            key = os.environ.get(key_variable, "")
            if not key:
                raise FormatError(f"environment variable {key_variable} is not set")
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise FormatError(f"environment variable {key_variable} holds a line end or another sign of no key")
        self.name = model
        self._url, self._key_variable = f"{base_url.rstrip('/')}/chat/completions", key_variable
        self._opener = urllib.request.build_opener(_NoRedirect)

    def complete(self, system: str, user: str, max_tokens: int) -> str:
        """The first choice's text.

        Raises:
            HubError: the endpoint refuses; or, after further tries, is out of reach, overloaded or answers nonsense.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.name, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self._key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self._key_variable]}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            return retrying(lambda: self._ask(request), self._url, logging.INFO)
        except urllib.error.HTTPError as error:
            raise HubError(f"{self._url} refuses: {error.code} {error.reason}") from None
        except OSError as error:
            raise HubError(f"{self._url} is out of reach: {getattr(error, 'reason', error)}") from None

    def _ask(self, request: urllib.request.Request) -> str:
        """One try. Raises HTTPError, or OSError, of which `retrying` knows which are worth another."""
        with (
            self._opener.open(request, timeout=TIMEOUT_SECONDS) as response,
            suppress(ValueError, KeyError, IndexError, TypeError, HTTPException),
        ):
            said = json.loads(response.read(ANSWER_LIMIT))["choices"][0]["message"]["content"] or ""
            return str(said).encode(errors="replace").decode()  # half a surrogate pair, where max_tokens cut an emoji
        raise ConnectionError("the answer is something else than a chat completion")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class LocalClient:
    """A causal language model on this machine, likeliest token by token."""

    def __init__(self, model: str, device: str = "auto") -> None:
        """`model`: Hub id or folder of a chat model; raises ModelError if it cannot be loaded."""
        self.name = model
        self._lm = load_language_model(LMRecipe(model=model, device=device), lm_head=True)

    def complete(self, system: str, user: str, max_tokens: int) -> str:
        """The assistant's turn.

        Raises:
            FormatError: the model's chat template takes neither a system turn nor a user's alone.
        """
        try:
            prompt = self._tokens({"role": "system", "content": system}, {"role": "user", "content": user})
        except Exception:  # a template raises what it likes; Gemma's knows no system turn
            try:
                prompt = self._tokens({"role": "user", "content": f"{system}\n\n{user}"})
            except Exception as error:
                raise FormatError(f"the chat template of {self.name} refuses a user's turn: {reason(error)}") from error
        return "".join(generate(self._lm, prompt, [], max_tokens))

    def _tokens(self, *messages: dict[str, str]) -> list[int]:
        told: Any = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        return list(self._lm.tokenizer.apply_chat_template(list(messages), **told))


class OfflineClient:
    """No model at all: names the most frequent marked tokens, and predicts by looking for them. Deterministic."""

    name = "offline rule"

    def complete(self, system: str, user: str, max_tokens: int) -> str:
        """A label for marked examples; for numbered texts under a label, a list of 0 and 1."""
        label, found, texts = user.partition("\n\n")
        if not label.startswith("Feature: "):
            counts = Counter(token.strip() for token in MARKED.findall(user) if token.strip())
            return "tokens " + ", ".join(json.dumps(token, ensure_ascii=False) for token, _ in counts.most_common(3))
        wanted = [json.loads(quoted) for quoted in re.findall(r'"(?:[^"\\]|\\.)*"', label)]
        answers = []
        for text in re.split(r"\n*Text \d+:\n", found + texts)[1:]:
            marked = MARKED.findall(text)
            where = "".join(marked) if marked else text
            answers.append(int(any(token in where for token in wanted)))
        return json.dumps(answers)


class Stopping(Exception):  # noqa: N818 - an ending that was asked for, not an error
    """Nothing more is asked."""


class Remembering:
    """A client that asks nothing twice: answers are written to a file as they come, and found there after a kill."""

    def __init__(self, client: Client, path: Path, stop: Callable[[], bool]) -> None:
        """
        Args:
            client: who is asked.
            path: JSON lines {"asked": digest, "answer"}; a line that a kill cut off counts for nothing.
            stop: looked at before each question; once true, nothing more is asked.
        """
        self.name, self._client, self._stop, self._lock = client.name, client, stop, threading.Lock()
        self._ended = False
        self._answers: dict[str, Future[str]] = {}
        self._file = path.open("ab+")
        self._file.seek(0)
        for line in self._file:
            try:
                kept = json.loads(line)
                asked, answer = str(kept["asked"]), str(kept["answer"])
            except (ValueError, KeyError, TypeError):
                continue
            self._answers[asked] = Future()
            self._answers[asked].set_result(answer)
        self._file.write(b"\n")  # ends a line that was cut off

    def complete(self, system: str, user: str, max_tokens: int) -> str:
        """The kept answer to just this, the one that another thread waits for, or the client's.

        Raises:
            Stopping: it would have to be asked, and no more is.
        """
        asked = hashlib.sha256(json.dumps([self.name, system, user, max_tokens]).encode()).hexdigest()
        with self._lock:
            if (known := self._answers.get(asked)) is None:
                if self._ended or self._stop():
                    raise Stopping
                found = self._answers[asked] = Future[str]()
        if known is not None:
            return known.result()
        try:
            answer = self._client.complete(system, user, max_tokens)
            with self._lock:
                self._file.write(json.dumps({"asked": asked, "answer": answer}).encode() + b"\n")
                self._file.flush()
        except BaseException as error:
            found.set_exception(error)
            raise
        found.set_result(answer)
        return answer

    def end(self) -> None:
        """Ask nothing more; answers under way are still kept."""
        self._ended = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
