"""The Neuronpedia export of an indexed suite says what the index says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_language_model, make_suite

from qwenscope.errors import FormatError
from qwenscope.features.index import build_index
from qwenscope.features.store import Index, explaining
from qwenscope.release.neuronpedia import export_with_index


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("indexed")
    run = make_suite(folder / "run", make_language_model(folder / "model"), 1)
    build_index(run, folder / "index", tokens=1500)
    return run, folder / "index"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("batch-*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).decode().splitlines()
    ]


def test_features_activations_and_explanations_are_the_indexs(indexed: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = indexed
    index = Index(folder)
    with explaining(index) as add:
        add("sae_attn", 7, {"label": "the word seven"})
    for sae_id in ("sae_attn", "sae_delta"):  # random weights carry no model name of their own
        path = run / "saes" / sae_id / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "org/Tiny"}))
    export_with_index(run, folder, tmp_path / "out")
    (source,) = (tmp_path / "out/v1/tiny").glob("3-run-sae_attn-*")
    model = json.loads((source / "model.jsonl").read_text())
    assert model["layers"] == len(index.meta["language_model"]["layers"]) > 3
    features, activations = lines(source / "features"), lines(source / "activations")
    assert [feature["index"] for feature in features] == [str(latent) for latent in range(192)]
    for latent in (0, 7, 150):
        page = index.latent("sae_attn", latent)
        assert features[latent]["frac_nonzero"] == page["density"]
        assert features[latent]["pos_str"] == [token for token, _ in page["promoted"]]
        assert features[latent]["pos_values"] == [score * page["logit_spread"] for _, score in page["promoted"]]
        bars = [features[latent][f"freq_hist_data_bar_{what}"] for what in ("heights", "values")]
        assert len(bars[0]) == len(bars[1])
        assert sum(bars[0]) == page["fired"]
        assert all(low < page["max"] * 1.2 for low in bars[1])
        mine = [row for row in activations if row["index"] == str(latent)]
        firing = [example for example in page["examples"] if any(example["activations"])]
        assert [(row["tokens"], row["values"]) for row in mine] == [(e["tokens"], e["activations"]) for e in firing]
        for row in mine:
            assert len(row["tokens"]) == len(row["values"])
            assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]] > 0
    assert len({row["id"] for row in activations}) == len(activations)
    (explanation,) = lines(source / "explanations")
    assert all(row["id"].startswith(f"tiny-{source.name}-") for row in [*activations, explanation])
    assert (explanation["index"], explanation["description"]) == ("7", "the word seven")


def test_an_index_of_another_suite_is_refused(indexed: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = indexed
    (tmp_path / "saes").mkdir()
    (run / "saes/sae_attn").rename(tmp_path / "saes/sae_other")
    with pytest.raises(FormatError, match="does not know sae_other; build it"):
        export_with_index(tmp_path / "saes", folder, tmp_path / "out")
    (tmp_path / "saes/sae_other").rename(run / "saes/sae_attn")
    assert not (tmp_path / "out").exists()
