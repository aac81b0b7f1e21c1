"""What enters: which requests are answered at all, and the texts in them, checked once, here."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenscope.errors import FormatError

_ORIGIN = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::\d{1,5})?")
HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
BODY_LIMIT = 64 << 10
BODY_SECONDS = 10.0
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors "
)
EMBED = "/embed"
"""The one page that other origins may frame, where the server was started with their names."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Guard:
    """Checks Host, Origin and Content-Type of every request and adds the headers to every response."""

    def __init__(self, app: ASGIApp, framing: Sequence[str] = ()) -> None:
        """`framing`: origins whose pages may frame EMBED; see `checked_origin`."""
        self._app = app
        self._framing = [checked_origin(origin) for origin in framing]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        framing = self._framing if scope["path"] == EMBED else []
        policy = POLICY + (" ".join(framing) or "'none'")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update({**HEADERS, "Content-Security-Policy": policy})
            await send(message)

        problem = _problem(scope["method"], scope["path"], Headers(scope=scope), bool(framing))
        if problem is not None:
            await JSONResponse({"error": problem}, 403)(scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)


def checked_origin(origin: str) -> str:
    """`origin` itself, such as https://lab.example or http://localhost:8000.

    Raises:
        FormatError: it is no origin; a path, a wildcard or a second word would allow more than it says.
    """
    if not _ORIGIN.fullmatch(origin):
        raise FormatError(f"{origin} is no origin; give scheme and host alone, such as https://lab.example")
    return origin


def _problem(method: str, path: str, headers: Headers, framed: bool) -> str | None:
    """Why a request is refused; None if it is not."""
    hosts = headers.getlist("host")
    if len(hosts) != 1 or _host_name(f"http://{hosts[0]}") not in HOSTS:
        return "this server answers under 127.0.0.1 and localhost only"
    reading = method in ("GET", "HEAD")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        # Whoever follows a link from elsewhere sees the page; the page they came from sees nothing of it. Which page
        # frames another is for the policy to say: a request does not name it.
        to = headers.get("sec-fetch-dest")
        followed = (path == "/" and to in (None, "document")) or (framed and to == "iframe")
        if not (reading and followed and headers.get("sec-fetch-mode") == "navigate"):
            return "requests from other sites are refused"
    if reading:
        return None
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != hosts[0]:
        return "writes from other origins are refused"
    if headers.get("content-type", "").split(";")[0].strip() != "application/json":
        return "send application/json"
    return None


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object of a request, read no further than BODY_LIMIT and no longer than BODY_SECONDS.

    Raises:
        FormatError: too long, too slow, no JSON object, or a value in it that is neither text nor a finite number.
        ClientDisconnect: the sender went away.
    """
    raw = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                raw += piece
                if len(raw) > BODY_LIMIT:
                    raise FormatError(f"a request has at most {BODY_LIMIT:,} bytes")
    except TimeoutError:
        raise FormatError(f"the request did not arrive within {BODY_SECONDS:.0f} s") from None
    try:
        value = json.loads(raw)
        _check_value(value)
    except FormatError:
        raise
    except (ValueError, RecursionError):
        raise FormatError("the request is not JSON") from None
    if not isinstance(value, dict):
        raise FormatError("the request is not a JSON object")
    return value


def checked_text(text: str) -> str:
    """`text` itself.

    Raises:
        FormatError: it holds a NUL or half of a surrogate pair, which no file or tokenizer takes.
    """
    if "\0" in text or any("\ud800" <= sign <= "\udfff" for sign in text):
        raise FormatError("the text holds a NUL or half a surrogate pair; take it out")
    return text


def _check_value(value: Any) -> None:
    if isinstance(value, str):
        checked_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise FormatError("the request holds a number that is not finite")
    elif isinstance(value, list | dict):
        for part in value:
            _check_value(part)
            if isinstance(value, dict):
                _check_value(value[part])
