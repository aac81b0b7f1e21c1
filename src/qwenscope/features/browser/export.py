"""The browser as a static site: the same page, its data as files; for any web server, no language model behind it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from qwenscope.errors import FormatError
from qwenscope.features.browser.notes import Notes, named
from qwenscope.features.browser.server import CONVERSATION_SHOWN, page_files
from qwenscope.features.form import pack
from qwenscope.features.output_score import kept_scores
from qwenscope.features.store import Index
from qwenscope.files import whole_folder

CONVERSATIONS = 1 << 15
"""Addresses whose conversations stand in one file, by where they begin: some 32,768 tokens."""
SHARD = 16
"""Latents per data file: few enough to load at once, many enough to keep the number of files reasonable."""


def export_site(index: Path, out: Path, *, on_progress: Callable[[str, int, int], None] | None = None) -> None:
    """Write the site to the new folder `out`, whole or not at all.

    Explanations and named lists of latents go along; notes and bookmarks stay at home.

    Raises:
        FormatError: no index, `out` is not empty, or the index holds text that the privacy filter did not scrub.
        ResourceError: the disk is full.
    """
    opened = Index(index)
    if not opened.meta["privacy"]["scrub"]:
        raise FormatError(f"{index} holds text that was not scrubbed; index again with corpus.privacy.scrub on")
    report = on_progress or (lambda phase, done, total: None)
    total = sum(sae["dict_size"] for sae in opened.saes.values())
    done = 0
    with whole_folder(out) as site:
        (site / "page").mkdir()
        for name, content in page_files().items():
            if name.endswith(".html"):
                (site / name).write_bytes(content.replace(b'content="live"', b'content="static"'))
            else:
                (site / "page" / name).write_bytes(content)
        (site / ".nojekyll").touch()
        data = site / "data"
        data.mkdir()
        _write(data / "suite", {**opened.suite(), "live": False, "shard": SHARD, "conversations": CONVERSATIONS})
        _write(data / "lists", lists_of(named(Notes(index).all(), opened)))
        _write_conversations(data / "conversations", opened)
        for sae_id, sae in opened.saes.items():
            folder = data / sae_id
            folder.mkdir()
            _write(folder / "table", opened.table(sae_id))
            _write(folder / "labels", opened.labels(sae_id))
            _write(folder / "output", kept_scores(opened, sae_id))
            for start in range(0, sae["dict_size"], SHARD):
                stop = min(start + SHARD, sae["dict_size"])
                shard = [opened.latent(sae_id, latent) for latent in range(start, stop)]
                _write(folder / str(start // SHARD), shard)
                done += len(shard)
                report("exporting", done, total)


def lists_of(notes: list[dict[str, Any]]) -> dict[str, list[tuple[str, int, str, list[str]]]]:
    """The latents on each named list: {name: [(SAE id, latent, label, peak tokens)]}."""
    lists: dict[str, list[tuple[str, int, str, list[str]]]] = {}
    for kept in notes:
        for name in kept["lists"]:
            lists.setdefault(name, []).append((kept["sae"], kept["latent"], kept["label"], kept["peaks"]))
    return {name: sorted(lists[name]) for name in sorted(lists)}


def _write_conversations(folder: Path, index: Index) -> None:
    """{address: conversation} of each range of addresses in which one begins."""
    folder.mkdir()
    for part, starts in groupby(index.conversation_starts(), lambda start: start // CONVERSATIONS):
        kept = {start: index.conversation(start) for start in starts}
        _write(
            folder / str(part),
            {start: {name: each[name] for name in CONVERSATION_SHOWN} for start, each in kept.items()},
        )


def _write(path: Path, value: Any) -> None:
    """Compressed here, so that a site is small whether or not its server compresses."""
    path.with_name(f"{path.name}.json.z").write_bytes(pack(value))
