"""Pictures of the browser's pages for the README: headless Chromium, light theme, 1,080 wide, 256 colors.

    python bench/pictures.py INDEX docs/images latent-smollm2=#/sae/middle/7 steer-smollm2='#/steer?push=...&run=1'

Each NAME=ROUTE becomes docs/images/NAME.png; a route that runs the language model is waited for until it has answered.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from features import browse
from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH, HEIGHT = 1080, 860
PATIENCE = 600_000
"""Milliseconds that a text under steering may take on a busy machine."""


def picture(page: Page, address: str, height: int) -> bytes:
    """A PNG of the page's top once it stands whole and no model runs."""
    page.goto(address)
    page.wait_for_selector("main[data-ready] h1", timeout=PATIENCE)
    page.wait_for_timeout(1000)  # a link to a steering begins to run it
    page.wait_for_selector("main button:disabled", state="detached", timeout=PATIENCE)
    shot = page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
    small = io.BytesIO()
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    """Browse the index, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("routes", nargs="+", metavar="NAME=ROUTE")
    parser.add_argument("--height", type=int, default=HEIGHT)
    options = parser.parse_args()
    with browse(options.index) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for named in options.routes:
            name, _, route = named.partition("=")
            page = browser.new_page(viewport={"width": WIDTH, "height": options.height}, color_scheme="light")
            path = options.out / f"{name}.png"
            path.write_bytes(picture(page, address + route, options.height))
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB", flush=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
