"""`bench/gallery.py`: picks by its rules, counts recomputed from what it wrote, text that Markdown takes literally."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gallery
import pytest

from qwenscope.features.clients import OfflineClient
from qwenscope.features.label import chosen, explain
from qwenscope.features.store import Index


@pytest.fixture(scope="module")
def labelled(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Index:
    copy = Index(shutil.copytree(index.folder, tmp_path_factory.mktemp("labelled") / "index"))
    for _ in explain(copy, OfflineClient(), chosen(copy)):
        pass
    return copy


def test_picks_are_by_rule_and_no_latent_is_picked_twice(labelled: Index, index: Index) -> None:
    saes = list(labelled.saes)
    found = list(gallery.picks(labelled, saes))
    assert found == list(gallery.picks(labelled, saes))
    places = [(sae, latent) for sae, latent, *_ in found]
    assert len(set(places)) == len(places)
    assert sum(shown for _, _, group, shown, _ in found if group == "lot") == gallery.SHOWN
    assert sum(group == "lot" for _, _, group, *_ in found) == gallery.DRAWN
    for _, _, group, shown, score in found:
        if group == "clear":
            assert shown
            assert min(score.detection, score.fuzzing) >= 0.8
            assert len({word for word in score.words if len(word) >= 3}) == 3
        if group == "nothing":
            assert max(score.detection, score.fuzzing) <= 0.5
    page = {"examples": [
        {"kind": "top", "tokens": ["a"], "activations": [9.0]},
        {"kind": "0-25", "tokens": [" Law", "s", "x"], "activations": [3.0, 0.0, 1.0]},
    ]}  # fmt: skip
    assert gallery._share_on(page, ["law"]) == 0.75
    assert gallery._share_on({"examples": page["examples"][:1]}, ["a"]) is None
    with pytest.raises(SystemExit, match="have no scores; run: qwenscope explain"):
        list(gallery.picks(index, saes))


def test_the_page_says_what_was_measured(
    release: Path, labelled: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("DRAWN", 2), ("SHOWN", 2), ("RANDOM", 2), ("PROMPTS", gallery.PROMPTS[:1])):
        monkeypatch.setattr(gallery, name, value)
    page, figures = tmp_path / "gallery.md", tmp_path / "gallery.json"
    monkeypatch.setattr(
        "sys.argv",
        ["gallery", str(release), str(labelled.folder), "--out", str(page), "--json", str(figures), "--tokens", "4"],
    )
    gallery.main()
    written, latents = page.read_text(encoding="utf-8"), json.loads(figures.read_text())
    for latent in latents:
        assert (f"### {latent['sae']}/{latent['latent']}" in written) == latent["shown"]
        if latent["steered"]:
            assert len(latent["random"]) == 2
            assert 0 <= latent["beaten"] <= 2
    named = sum((latent["score"]["detection"] or 0) >= 0.8 for latent in latents if latent["group"] == "lot")
    assert f"balanced accuracy 0.8 or more | {named} |" in written


def test_text_is_taken_literally() -> None:
    assert gallery._safe("a | <b> *c*\n_d_ \\ [e](f)") == r"a \| &lt;b&gt; \*c\* \_d\_ \\ \[e\](f)"
    assert gallery._safe(" word ", " ") == " word "
    assert [gallery._safe(text) for text in ("3. Last", "- x", "3.5", "-x")] == [r"3\. Last", r"\- x", "3.5", "-x"]
    assert gallery._safe("\x1b[0m \U0001f600") == r"·\[0m ·"
    assert gallery.dealt(10, 3) == [3, 3, 4]
