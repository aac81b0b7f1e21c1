"""The whole walk on the packaged stand-in in small: conversations in; trained, measured, released SAEs out.

Every recipe key must be read by some code on the way: the test that proves it watches attribute access on the tree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from qwenscope import TopKSAE, load_recipe
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import HubError
from qwenscope.evaluation.run import evaluate
from qwenscope.lm.load import load_tokenizer
from qwenscope.recipe import Recipe
from qwenscope.recipe_nodes import Node
from qwenscope.release.package import release
from qwenscope.training.run import train

SMALL = (
    "training.tokens=6000",
    "training.batch_size=256",
    "training.warmup_steps=2",
    "training.calibration_tokens=1024",
    "training.resample_every_steps=10",
    "activations.window_tokens=2048",
    "corpus.max_length=128",
    "corpus.batch_tokens=2048",
    "checkpoint.every_tokens=3000",
    "evaluation.tokens=1500",
)
COMMON = {"tokens", "mse", "fvu", "explained_variance", "explained_variance_per_dim", "cosine", "l0", "dead_fraction"}
SPLICED = {
    "ce_clean",
    "ce_spliced",
    "ce_zero_ablation",
    "ce_mean_ablation",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "kl",
}


@pytest.fixture(scope="module")
def reads() -> Iterator[set[tuple[str, str]]]:
    """(class, field) of every recipe value that any code reads while the module's fixtures run."""
    seen: set[tuple[str, str]] = set()
    patch = pytest.MonkeyPatch()
    plain = Node.__getattribute__

    def watched(self: Node, name: str) -> Any:
        if name in type(self).__pydantic_fields__:
            seen.add((type(self).__name__, name))
        return plain(self, name)

    patch.setattr(Node, "__getattribute__", watched)
    yield seen
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, reads: set[tuple[str, str]]) -> Path:
    folder = tmp_path_factory.mktemp("walk") / "run"
    recipe = load_recipe("standin", SMALL)
    reads.clear()  # what validation itself reads does not count
    train(recipe, folder)
    evaluate(folder)
    return folder


def _fields(node: type[Node]) -> Iterator[tuple[str, str]]:
    for name, field in node.__pydantic_fields__.items():
        yield node.__name__, name
        for child in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(child, type) and issubclass(child, Node):
                yield from _fields(child)


def test_the_run_folder_is_complete(run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "complete"
    assert status["tokens_trained"] == status["tokens_target"] == 6000
    assert load_recipe(run / "recipe.yaml") == load_recipe("standin", SMALL)
    for name in ("metrics.jsonl", "report.html", "evaluation.json", "run.json", "privacy_report.json", "checkpoints"):
        assert (run / name).exists(), name


def test_the_published_usage_loads_every_sae(run: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    assert {folder.name for folder in (run / "saes").iterdir()} == set(recipe.hook_points)
    for sae_id, point in recipe.hook_points.items():
        config = json.loads((run / "saes" / sae_id / "config.json").read_text())
        weights = load_file(run / "saes" / sae_id / "weights.safetensors")
        d, n = config["hidden_dim"], config["dict_size"]
        assert (d, n, config["k"]) == (64, point.dict_size, point.k)
        shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "pre_bias": (d,)}
        assert {key: tuple(value.shape) for key, value in weights.items()} == shapes
        assert all(value.dtype == torch.float32 for value in weights.values())
        torch.testing.assert_close(weights["decoder.weight"].norm(dim=0), torch.ones(n), atol=1e-5, rtol=0)

        sae = TopKSAE.from_pretrained(run / "saes", sae_id=sae_id)
        x_BD = torch.randn(5, d, generator=torch.Generator().manual_seed(0))
        pre = (x_BD - weights["pre_bias"]) @ weights["encoder.weight"].T + weights["encoder.bias"]
        values, indices = pre.relu().topk(point.k, dim=1)
        dense = torch.zeros(5, n).scatter_(1, indices, values)
        torch.testing.assert_close(sae.encode(x_BD).dense(), dense, atol=1e-5, rtol=1e-5)
        expected = dense @ weights["decoder.weight"].T + weights["pre_bias"]
        torch.testing.assert_close(sae(x_BD), expected, atol=1e-4, rtol=1e-4)


def test_the_evaluation_holds_the_contracts_keys(run: Path) -> None:
    saes = json.loads((run / "evaluation.json").read_text())["saes"]
    assert len(saes) == 9
    for splits in saes.values():
        assert set(splits) == {"chat", "tool_use"}
        cell = splits["tool_use"]
        assert set(cell) >= COMMON | SPLICED | {"mse_special_tokens"}
        assert 0 < cell["l0"] <= 16
        assert cell["explained_variance"] == pytest.approx(1 - cell["fvu"])


def test_every_key_of_the_recipe_is_read(run: Path, reads: set[tuple[str, str]], tmp_path: Path) -> None:
    """The stand-in's walk reads most keys; those of sources and models that it does not have are read here."""
    turn = {"role": "user", "content": "mail me@firm.com", "country": "Japan", "redacted": False, "toxic": False}
    answer = {**turn, "role": "assistant", "content": "done", "country": None}
    row = {"conversation": [turn, answer], "country": "Japan", "redacted": False, "toxic": False}
    pq.write_table(pa.Table.from_pylist([row] * 20), tmp_path / "wild.parquet")
    local = load_recipe("standin", [f"corpus.sources=[{{name: wildchat, path: {tmp_path}, weight: 1}}]"])
    stream = CorpusStream(local.corpus, load_tokenizer(local.lm), seed=0)
    assert "me@firm.com" not in next(stream).text
    offline = load_recipe("standin", ["corpus.sources=[{name: ultrachat, revision: main, weight: 1}]"])
    with pytest.raises(HubError, match="ultrachat"):
        CorpusStream(offline.corpus, load_tokenizer(offline.lm), seed=0)
    assert local.lm.model_copy(update={"model_b": "tuned", "revision_b": "main"}).second.revision == "main"
    assert set(_fields(Recipe)) - reads == set()


def test_a_release_comes_out_of_the_run(run: Path, tmp_path: Path) -> None:
    release(run, tmp_path / "release")
    card = (tmp_path / "release" / "README.md").read_text()
    for sae_id in load_recipe(run / "recipe.yaml").hook_points:
        assert sae_id in card
        TopKSAE.from_pretrained(tmp_path / "release", sae_id=sae_id)
    assert "N/A" not in card
