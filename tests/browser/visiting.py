"""Serving an application in this process, and a browser page that reports what went wrong in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from playwright.sync_api import Browser, Page
from starlette.types import ASGIApp

from qwenscope.features.browser.listening import Connection

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The address of `app` on a free port, until the block ends; its connections are held as by `qwenscope browse`."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", http=Connection))
    ready = threading.Event()
    startup = server.startup

    async def tell(*arguments: object, **options: object) -> None:
        await startup(*arguments, **options)  # type: ignore[arg-type]
        ready.set()

    server.startup = tell  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


class Visit:
    """A browser page that remembers every error, dialog and request to another host."""

    def __init__(self, browser: Browser, site: str, **options: object) -> None:
        self.context = browser.new_context(**options)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.site = site
        self.problems: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda r: None if r.url.startswith(site) else self.problems.append(f"to {r.url}"))

    def go(self, route: str) -> Page:
        """Open a route afresh and wait until its view stands."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.site}{route}")
        self.page.wait_for_selector("main[data-ready] h1")
        return self.page

    def close(self) -> None:
        """End the visit; nothing may have gone wrong."""
        self.context.close()
        assert self.problems == []
