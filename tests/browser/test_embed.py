"""One latent in another page's frame: allowed to the origins that the server was started with, refused to others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from html import escape
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from planted_suite import PLANTED, PLANTED_LATENT
from playwright.sync_api import Browser, expect
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from visiting import serving

from qwenscope.errors import FormatError
from qwenscope.features.browser.server import make_app

FRAMED = f"embed#/sae_delta/{PLANTED_LATENT}"


async def framing_page(request: Request) -> HTMLResponse:
    return HTMLResponse(f'<!doctype html><iframe src="{escape(request.query_params["to"])}"></iframe>')


@pytest.fixture(scope="module")
def outside() -> Iterator[list[str]]:
    """Two origins of pages that frame what their query names."""
    with ExitStack() as stack:
        pages = [Starlette(routes=[Route("/", framing_page)]) for _ in range(2)]
        yield [stack.enter_context(serving(page)).rstrip("/") for page in pages]


def shown_in_frame(chromium: Browser, origin: str, framed: str) -> tuple[str, list[str]]:
    """What stands in the frame, and what the console says."""
    page = chromium.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"{origin}/?to={framed.replace('#', '%23')}")
    card = page.frame_locator("iframe").locator(".latent-card")
    if not any("frame-ancestors" in text or "403" in text for text in said):
        expect(card).to_contain_text(PLANTED.strip())
        page.close()
        return "card", said
    assert card.count() == 0
    page.close()
    return "refused", said


def test_a_latent_is_framed_by_the_named_origin_alone(chromium: Browser, index: Path, outside: list[str]) -> None:
    with serving(make_app(index, framing=outside[:1])) as site:
        assert shown_in_frame(chromium, outside[0], site + FRAMED)[0] == "card"
        refused, said = shown_in_frame(chromium, outside[1], site + FRAMED)
        assert refused == "refused"
        assert any("frame-ancestors" in text for text in said)
        for whole in ("", f"#/sae/sae_delta/{PLANTED_LATENT}"):  # the rest of the browser is framed by nobody
            assert shown_in_frame(chromium, outside[0], site + whole)[0] == "refused"


def test_without_the_flag_framing_is_refused(chromium: Browser, site: str, outside: list[str]) -> None:
    assert shown_in_frame(chromium, outside[0], site + FRAMED)[0] == "refused"
    page = chromium.new_page()
    page.goto(site + FRAMED)  # by itself it is a page like others
    expect(page.locator(".latent-card h2")).to_have_text(f"sae_delta / {PLANTED_LATENT}")
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
    page.close()


def test_the_policy_names_the_origin_for_one_page(index: Path) -> None:
    with TestClient(make_app(index, framing=["https://lab.example"]), base_url="http://localhost") as client:
        assert client.get("/embed").headers["content-security-policy"].endswith("frame-ancestors https://lab.example")
        for path in ("/", "/api/suite", "/page/app.js"):
            assert client.get(path).headers["content-security-policy"].endswith("frame-ancestors 'none'")
        there = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
        assert client.get("/embed", headers=there).status_code == 200
        assert client.get("/", headers=there).status_code == 403
        assert client.get("/api/suite", headers=there).status_code == 403


@pytest.mark.parametrize(
    "wrong", ["*", "https://*.example", "lab.example", "https://a.example/x", "https://a b", "'self'"]
)
def test_what_is_no_origin_is_named(index: Path, wrong: str) -> None:
    with pytest.raises(FormatError, match="is no origin"):
        make_app(index, framing=[wrong])
