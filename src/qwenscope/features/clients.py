"""Who writes explanations: an OpenAI-compatible endpoint, a local model, or a deterministic rule for tests.

A key is read from the environment when it is used; it is never stored, logged or shown.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections import Counter
from typing import Any, Protocol
from urllib.parse import urlsplit

from qwenscope.errors import FormatError, HubError
from qwenscope.features.steering import generate
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
            FormatError: not such an address, or the variable is not set.
        """
        parts = urlsplit(base_url)
        loopback = parts.hostname in ("127.0.0.1", "localhost", "::1")
        if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
            raise FormatError(f"endpoint {base_url} must be https, or http on this machine")
        if parts.username or parts.password:
            raise FormatError("an endpoint holds no key; name an environment variable instead")
        if key_variable is not None and not os.environ.get(key_variable):
            raise FormatError(f"environment variable {key_variable} is not set")
        self.name = model
        self._url, self._key_variable = f"{base_url.rstrip('/')}/chat/completions", key_variable
        self._opener = urllib.request.build_opener(_NoRedirect)

    def complete(self, system: str, user: str, max_tokens: int) -> str:
        """The first choice's text.

        Raises:
            HubError: the endpoint is out of reach, refuses, or answers something else.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.name, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self._key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self._key_variable]}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                answer = json.loads(response.read(ANSWER_LIMIT))
            return str(answer["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            raise HubError(f"{self._url} refuses: {error.code} {error.reason}") from None
        except OSError as error:
            raise HubError(f"{self._url} is out of reach: {getattr(error, 'reason', error)}") from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise HubError(f"{self._url} answers something else than a chat completion") from None


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
        """The assistant's turn."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        prompt: Any = self._lm.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        return "".join(generate(self._lm, prompt, [], max_tokens))


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
