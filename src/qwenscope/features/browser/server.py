"""The feature browser: an index, a page and, on request, the language model, served on this machine alone.

What the page may do is fixed by the Content-Security-Policy: scripts and styles from here, connections to here, nothing
inline. Requests under a foreign Host name (DNS rebinding) and writes from a foreign Origin are refused. Only requests
that run the language model wait for it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qwenscope.errors import FormatError, QwenscopeError
from qwenscope.features.browser.edge import EMBED, Guard, body_of, checked_text
from qwenscope.features.browser.listening import Server, listener_on
from qwenscope.features.browser.model_thread import BusyError, Job
from qwenscope.features.browser.notes import ChangedNoteError, Notes, checked_change, named
from qwenscope.features.browser.results import Result
from qwenscope.features.browser.running import Runner
from qwenscope.features.output_score import kept_scores
from qwenscope.features.store import Index, MissingLatentError

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
CONVERSATION_SHOWN = ("start", "id", "source", "split", "tokens", "roles")
SEARCH_LIMIT = 1000
SWITCH_SECONDS = 0.0005
"""How long the model's thread keeps the interpreter when an answer needs it: each answer does several times."""


def serve(
    index: Path | Index,
    port: int = 8321,
    *,
    results: Sequence[Result] = (),
    framing: Sequence[str] = (),
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve an index on 127.0.0.1 until interrupted.

    Args:
        index: folder made by `build_index`, or what was opened there.
        port: 0 takes a free one.
        results: of `analysis.results.read_results`, shown beside it.
        framing: origins whose pages may frame /embed, one latent alone; no others may frame anything.
        on_ready: called with the address once it takes connections.

    Raises:
        FormatError: no index, a damaged one, the port is taken, or an origin is none.
    """
    opened = index if isinstance(index, Index) else Index(index)
    runner = Runner(opened, results)
    app = make_app(opened, results, runner, framing)
    try:
        listener = listener_on(port)
    except (OSError, OverflowError) as error:
        raise FormatError(f"port {port} cannot be used ({error}); choose another with --port") from None
    sys.setswitchinterval(SWITCH_SECONDS)
    with closing(listener):
        if on_ready is not None:
            on_ready(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        server = Server(app, runner.close)
        try:
            server.run(sockets=[listener])
        finally:
            runner.close()
        if server.interrupted:
            raise KeyboardInterrupt


def make_app(
    index: Path | Index, results: Sequence[Result] = (), runner: Runner | None = None, framing: Sequence[str] = ()
) -> Guard:
    """The application alone, for any ASGI server bound to loopback.

    Raises:
        FormatError: no index, a damaged one, or an origin that is none.
    """
    opened = index if isinstance(index, Index) else Index(index)
    routes = _Routes(opened, results, runner or Runner(opened, results))
    return Guard(
        Starlette(
            routes=[
                Route("/", routes.page),
                Route(EMBED, routes.embed),
                Route("/page/{name}", routes.page),
                Route("/api", routes.openapi),
                Route("/api/suite", routes.suite),
                Route("/api/search", routes.search),
                Route("/api/sae/{sae}", routes.table),
                Route("/api/labels/{sae}", routes.labels),
                Route("/api/latent/{sae}/{latent}", routes.latent),
                Route("/api/conversation/{start}", routes.conversation),
                Route("/api/results", routes.results),
                Route("/api/results/{name}", routes.result),
                Route("/api/notes", routes.notes),
                Route("/api/notes/{sae}/{latent}", routes.put_note, methods=["PUT"]),
                Route("/api/read", routes.read, methods=["POST"]),
                Route("/api/find", routes.find, methods=["POST"]),
                Route("/api/steer", routes.steer, methods=["POST"]),
                Route("/api/range", routes.range, methods=["POST"]),
                Route("/api/output/{sae}", routes.kept_scores),
                Route("/api/output", routes.output_scores, methods=["POST"]),
                Route("/api/loss", routes.loss_effect, methods=["POST"]),
                Route("/api/monitor/score", routes.score, methods=["POST"]),
            ],
            exception_handlers={
                MissingLatentError: _refused(404),
                BusyError: _refused(503),
                QwenscopeError: _refused(400),
                ClientDisconnect: _refused(400),  # read by nobody
            },
        ),
        framing,
    )


def page_files() -> dict[str, bytes]:
    """The front end by file name, as it stands in the package."""
    folder = files("qwenscope.features.browser") / "page"
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if Path(entry.name).suffix in TYPES}


class _Routes:
    """One method per route; file names are looked up in a table, so that no path reaches the disk.

    What is in memory is answered in the event loop, what reads SQLite in a thread of the pool, and what runs the
    language model waits in the event loop for the model's own thread.
    """

    def __init__(self, index: Index, results: Sequence[Result], runner: Runner) -> None:
        self._index = index
        self._results = {result.name: result for result in results}
        self._files = page_files()
        self._suite = _json({**index.suite(), "live": Runner.possible(index.folder)}).body
        self._openapi = json.dumps(yaml.safe_load((files("qwenscope.features.browser") / "openapi.yaml").read_bytes()))
        self._notes = Notes(index.folder)
        self._runner = runner

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self._files:
            return JSONResponse({"error": f"there is no page {name}"}, 404)
        return Response(self._files[name], media_type=TYPES[Path(name).suffix])

    async def embed(self, _request: Request) -> Response:
        return Response(self._files["embed.html"], media_type="text/html")

    async def suite(self, _request: Request) -> Response:
        return Response(self._suite, media_type="application/json")

    async def openapi(self, _request: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    def table(self, request: Request) -> Response:
        blob = self._index.packed_table(request.path_params["sae"])
        return Response(blob, media_type="application/json", headers={"Content-Encoding": "deflate"})

    def labels(self, request: Request) -> Response:
        return _json(self._index.labels(request.path_params["sae"]))

    def latent(self, request: Request) -> Response:
        return _json(self._index.latent(request.path_params["sae"], _number(request)))

    def conversation(self, request: Request) -> Response:
        kept = self._index.conversation(_number(request, "start"))
        return _json({name: kept[name] for name in CONVERSATION_SHOWN})

    def search(self, request: Request) -> Response:
        text = checked_text(request.query_params.get("q", ""))
        if len(text) > SEARCH_LIMIT:
            raise FormatError(f"a search has at most {SEARCH_LIMIT:,} characters, not {len(text):,}")
        return _json(self._index.search(text, sae_id=request.query_params.get("sae") or None))

    async def results(self, _request: Request) -> Response:
        return _json(
            [
                {"name": each.name, "kind": each.value["kind"], "summary": each.summary}
                for each in self._results.values()
            ]
        )

    def result(self, request: Request) -> Response:
        result = self._results.get(request.path_params["name"])
        if result is None:
            return JSONResponse({"error": f"there is no result {request.path_params['name']}"}, 404)
        latents = {(each["sae"], each["latent"]) for each in result.value["latents"]}
        return _json({"name": result.name, **result.value, "names": self._index.names(latents)})

    def notes(self, _request: Request) -> Response:
        return _json(named(self._notes.all(), self._index))

    async def put_note(self, request: Request) -> Response:
        sae, latent = request.path_params["sae"], _number(request)
        change = checked_change(await body_of(request))
        self._index.check(sae, latent)
        try:
            return _json(await run_in_threadpool(lambda: self._notes.change(sae, latent, **change)))
        except ChangedNoteError as error:
            return JSONResponse({"error": str(error), "note": error.note}, 409)

    async def read(self, request: Request) -> Response:
        job = self._runner.read(await body_of(request))
        return Response(await _first(request, job), media_type="application/json")

    async def find(self, request: Request) -> Response:
        job = self._runner.find(await body_of(request))
        return Response(await _first(request, job), media_type="application/json")

    async def range(self, request: Request) -> Response:
        job = self._runner.range(await body_of(request))
        return Response(await _first(request, job), media_type="application/json")

    def kept_scores(self, request: Request) -> Response:
        return _json(kept_scores(self._index, request.path_params["sae"]))

    async def output_scores(self, request: Request) -> Response:
        job = self._runner.output_scores(await body_of(request))
        return Response(await _first(request, job), media_type="application/json")

    async def loss_effect(self, request: Request) -> Response:
        job = self._runner.loss_effect(await body_of(request))
        return Response(await _first(request, job), media_type="application/json")

    async def score(self, request: Request) -> Response:
        job = self._runner.score(await body_of(request))
        return Response(await _first(request, job), media_type="application/json")

    async def steer(self, request: Request) -> Response:
        """Newline-delimited JSON, piece by piece; an error after the first piece is a last line with `error`."""
        job = self._runner.steer(await body_of(request))
        return _Lines(await _first(request, job), job)


class _Lines(StreamingResponse):
    """A job's pieces as they come; however the response ends, the job does."""

    def __init__(self, first: str, job: Job) -> None:
        self._job = job
        super().__init__(_lines(first, job), media_type="application/x-ndjson")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _lines(first: str, job: Job) -> AsyncIterator[str]:
    yield first
    try:
        async for piece in job:
            yield piece
            await asyncio.sleep(0)  # several may be ready, and asyncio warns of writes to a client that is gone
    except QwenscopeError as error:
        yield json.dumps({"error": str(error)}) + "\n"


async def _first(request: Request, job: Job) -> str:
    """A job's first piece.

    Raises:
        ClientDisconnect: whoever asked went away; the job is cancelled.
    """
    piece, gone = asyncio.ensure_future(anext(job)), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({piece, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not piece.done():  # the body has been read, so that all that can be received is the disconnection
            raise ClientDisconnect
        return piece.result()
    except BaseException:
        job.cancel()
        raise
    finally:
        piece.cancel()
        gone.cancel()


def _number(request: Request, name: str = "latent") -> int:
    """A number of the route; what is none is not in the index."""
    digits = request.path_params[name]
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16):
        raise MissingLatentError(f"the index has no {name} {digits[:20]}")
    return int(digits)


def _json(value: Any) -> Response:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return Response(text, media_type="application/json")
    except ValueError as error:  # NaN, or half a surrogate pair, from a file that was not written here
        raise FormatError(f"the index holds what cannot be shown ({error}); build it again") from None


def _refused(status: int) -> Callable[[Request, Exception], Response]:
    def answer(_request: Request, error: Exception) -> Response:
        headers = {"Retry-After": str(max(1, error.seconds))} if isinstance(error, BusyError) else None
        return JSONResponse({"error": str(error)}, status, headers)

    return answer
