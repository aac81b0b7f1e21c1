"""The feature browser: an index, a page and, on request, the language model, served on this machine alone.

What the page may do is fixed by the Content-Security-Policy: scripts and styles from here, connections to here, nothing
inline. Requests under a foreign Host name (DNS rebinding) and writes from a foreign Origin are refused.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenscope.errors import FormatError, QwenscopeError
from qwenscope.features.browser.notes import Notes
from qwenscope.features.browser.running import Runner
from qwenscope.features.store import Index, MissingLatentError

logger = logging.getLogger(__name__)

HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
BODY_LIMIT = 64 << 10
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def serve(index: Path, port: int = 8321, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Serve an index on 127.0.0.1 until interrupted.

    Args:
        index: folder made by `build_index`.
        port: 0 takes a free one.
        on_ready: called with the address once it takes connections.

    Raises:
        FormatError: no index, or the port is taken.
    """
    app = make_app(index)
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()  # who connects as soon as the address is out waits instead of being refused
        except (OSError, OverflowError) as error:
            raise FormatError(f"port {port} cannot be used ({error}); choose another with --port") from None
        if on_ready is not None:
            on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def make_app(index: Path | Index) -> ASGIApp:
    """The application alone, for any ASGI server bound to loopback.

    Raises:
        FormatError: no index.
    """
    opened = index if isinstance(index, Index) else Index(index)
    routes = _Routes(opened)
    return _Guard(
        Starlette(
            routes=[
                Route("/", routes.page),
                Route("/page/{name}", routes.page),
                Route("/api/suite", routes.suite),
                Route("/api/search", routes.search),
                Route("/api/sae/{sae}", routes.table),
                Route("/api/labels/{sae}", routes.labels),
                Route("/api/latent/{sae}/{latent:int}", routes.latent),
                Route("/api/notes", routes.notes),
                Route("/api/notes/{sae}/{latent:int}", routes.put_note, methods=["PUT"]),
                Route("/api/read", routes.read, methods=["POST"]),
                Route("/api/steer", routes.steer, methods=["POST"]),
            ],
            exception_handlers={MissingLatentError: _not_found, QwenscopeError: _refused},
        )
    )


def page_files() -> dict[str, bytes]:
    """The front end by file name, as it stands in the package."""
    folder = files("qwenscope.features.browser") / "page"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if Path(entry.name).suffix in TYPES}


class _Routes:
    """One method per route; file names are looked up in a table, so that no path reaches the disk."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._files = page_files()
        self._notes = Notes(index.folder)
        self._runner = Runner(index)

    def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            return JSONResponse({"error": f"there is no page {name}"}, 404)
        return Response(self._files[name], media_type=TYPES[Path(name).suffix])

    def suite(self, _request: Request) -> Response:
        return _json({**self._index.suite(), "live": Runner.possible(self._index.folder)})

    def table(self, request: Request) -> Response:
        blob = self._index.packed_table(request.path_params["sae"])
        return Response(blob, media_type="application/json", headers={"Content-Encoding": "deflate"})

    def labels(self, request: Request) -> Response:
        return _json(self._index.labels(request.path_params["sae"]))

    def latent(self, request: Request) -> Response:
        return _json(self._index.latent(request.path_params["sae"], request.path_params["latent"]))

    def search(self, request: Request) -> Response:
        text = request.query_params.get("q", "")[:200]
        return _json(self._index.search(text, sae_id=request.query_params.get("sae") or None))

    def notes(self, _request: Request) -> Response:
        return _json(self._notes.all())

    async def put_note(self, request: Request) -> Response:
        sae, latent = request.path_params["sae"], request.path_params["latent"]
        asked = await _body(request)
        note, bookmarked = asked.get("note"), asked.get("bookmarked")
        if not isinstance(note, str) or not isinstance(bookmarked, bool):
            raise FormatError("a note is {note: text, bookmarked: true or false}")
        self._index.check(sae, latent)
        await run_in_threadpool(self._notes.put, sae, latent, note, bookmarked)
        return _json({})

    async def read(self, request: Request) -> Response:
        asked = await _body(request)
        return _json(await run_in_threadpool(self._runner.read, asked.get("text"), asked.get("chat") is True))

    async def steer(self, request: Request) -> Response:
        """Newline-delimited JSON, piece by piece; an error after the first piece is a last line with `error`."""
        asked = await _body(request)
        pieces = self._runner.steer(asked)
        first = await run_in_threadpool(next, pieces)

        def lines() -> Iterator[str]:
            yield json.dumps(first) + "\n"
            try:
                for piece in pieces:
                    yield json.dumps(piece) + "\n"
            except QwenscopeError as error:
                yield json.dumps({"error": str(error)}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")


class _Guard:
    """Checks Host, Origin and Content-Type of every request and adds the headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        problem = _problem(scope["method"], Headers(scope=scope))
        if problem is not None:
            await JSONResponse({"error": problem}, 403)(scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)


def _problem(method: str, headers: Headers) -> str | None:
    """Why a request is refused; None if it is not."""
    hosts = headers.getlist("host")
    if len(hosts) != 1 or _host_name(f"http://{hosts[0]}") not in HOSTS:
        return "this server answers under 127.0.0.1 and localhost only"
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return "requests from other sites are refused"
    if method in ("GET", "HEAD"):
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


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request, read no further than BODY_LIMIT."""
    raw = b""
    async for piece in request.stream():
        raw += piece
        if len(raw) > BODY_LIMIT:
            raise FormatError(f"a request has at most {BODY_LIMIT:,} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise FormatError("the request is not JSON") from None
    if not isinstance(value, dict):
        raise FormatError("the request is not a JSON object")
    return value


def _json(value: Any) -> Response:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Response(text, media_type="application/json")


def _not_found(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 404)


def _refused(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)
