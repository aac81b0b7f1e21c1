"""The release folder and its card: complete, true to the measured numbers, runnable, free of the owner's traces."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from damage import damaged
from exact_saes import exact_rows, exact_sae, same
from huggingface_hub import ModelCard
from made_run import POINTS, make_run, number, recipe

from qwenscope import TopKSAE, load_recipe, load_suite
from qwenscope.checksums import verify_folder
from qwenscope.errors import FormatError
from qwenscope.evaluation.compare import NUMBERS
from qwenscope.recipe import Recipe
from qwenscope.release.card import COLUMNS, plain
from qwenscope.release.notebook import notebook
from qwenscope.release.package import bind, release
from qwenscope.sae.formats import import_suite

FILES = {
    "README.md",
    "SHA256SUMS",
    "config.json",
    "evaluation.json",
    "evaluation.parquet",
    "metrics.parquet",
    "notebook.ipynb",
    "privacy_report.json",
    "quality.svg",
    "recipe.yaml",
    "run.json",
}


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def metadata(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card(folder).split("---\n")[1])
    return found


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after `heading`, header row first."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def test_the_folder_is_the_contracts(built: Path) -> None:
    assert {path.name for path in built.iterdir() if path.is_file()} == FILES
    for sae_id in POINTS:
        assert {path.name for path in (built / sae_id).iterdir()} == {"config.json", "weights.safetensors"}
        assert {path.name for path in (built / "saelens" / sae_id).iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    verify_folder(built)
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=built, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_every_flipped_bit_and_truncation_is_found(built: Path, tmp_path: Path) -> None:
    release_folder = tmp_path / "release"
    shutil.copytree(built, release_folder)
    files = [path for path in release_folder.rglob("*") if path.is_file()]
    for victim in damaged(files, flips=300, truncations=30, seed=11):
        # A changed list of checksums names a file that it no longer vouches for, or itself.
        named = release_folder if victim.name == "SHA256SUMS" else victim
        with pytest.raises(FormatError, match=re.escape(str(named))):
            verify_folder(release_folder)
    verify_folder(release_folder)


def test_saes_are_the_runs_to_the_bit_in_both_layouts(built: Path, tmp_path: Path) -> None:
    import_suite(built / "saelens", "saelens", tmp_path / "back")
    for seed, sae_id in enumerate(POINTS):
        sae = TopKSAE.from_pretrained(built, sae_id=sae_id)
        assert same(sae, exact_sae(seed), exact_rows())
        assert same(TopKSAE.from_pretrained(tmp_path / "back", sae_id=sae_id), sae, exact_rows())
        assert sae.config["layer"] == POINTS[sae_id][0]
    assert list(load_suite(built)) == sorted(POINTS)


def test_the_index_lists_the_suite(built: Path) -> None:
    index = json.loads((built / "config.json").read_text())
    assert [entry["sae_id"] for entry in index["saes"]] == list(POINTS)
    assert index["saes"][0] == {
        "sae_id": "sae_delta_mid_pos1",
        "layer": 21,
        "kind": "deltanet",
        "hidden_dim": 16,
        "dict_size": 64,
        "k": 6,
    }
    assert index["language_model"] == {"name": "Qwen/Qwen3.5-35B-A3B", "revision": "f" * 40}
    assert index["commit"] == "c" * 40


def test_every_number_in_the_card_is_the_measured_one(built: Path) -> None:
    for j, (heading, tokens) in enumerate((("**Chat**", "100,000"), ("**Tool use**", "100,001"))):
        assert f"{heading}, {tokens} tokens" in card(built)
        after = card(built)[card(built).index(heading) :]
        first, second = table(after, heading), table(after[after.index("| CE clean") - len("| SAE ") :], "| SAE")
        assert max(len(row) for row in (*first, *second)) <= 8, "as wide as a page shows"
        header, *rows = [[*fidelity, *effect[1:]] for fidelity, effect in zip(first, second, strict=True)]
        assert header == ["SAE", *(column.heading for column in COLUMNS)]
        for i, (sae_id, row) in enumerate(zip(POINTS, rows, strict=True)):
            assert row[0] == f"`{sae_id}`"
            for column, cell in zip(COLUMNS, row[1:], strict=True):
                if column.key == "mse_special_tokens":
                    assert cell == ("none seen" if j else "0.5")
                else:
                    assert cell == format(number(i, j, NUMBERS.index(column.key)), column.form)


def test_the_figure_shows_every_sae_and_split(built: Path) -> None:
    assert "](quality.svg)" in card(built)
    drawn = ElementTree.fromstring((built / "quality.svg").read_text())
    tips = [title.text or "" for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert len(tips) == 3 * 2 * len(POINTS)  # FVU, CE recovered and KL; chat and tool use
    fvu = number(0, 0, NUMBERS.index("fvu"))
    assert f"sae_delta_mid_pos1, layer 21: {fvu:.4g}" in tips


def test_the_overview_is_the_published_cards(built: Path) -> None:
    header, *rows = table(card(built), "## Overview")
    assert header == ["SAE ID", "layer", "type", "block", "pos", "dict size", "k", "LR"]
    assert rows == [
        ["`sae_delta_mid_pos1`", "21", "DeltaNet", "5", "1", "64", "6", "1e-05"],
        ["`sae_delta_mid`", "22", "DeltaNet", "5", "2", "64", "6", "1e-05"],
        ["`sae_attn_mid`", "23", "attention", "5", "3", "64", "6", "1e-05"],
    ]


def test_deltanet_against_attention_and_the_position_control(built: Path) -> None:
    rows = table(card(built), "### DeltaNet against attention")[1:]
    assert [row[:3] for row in rows] == [
        ["sae_delta_mid_pos1 → sae_delta_mid", "position control", "chat"],
        ["sae_delta_mid_pos1 → sae_delta_mid", "position control", "tool use"],
        ["sae_delta_mid → sae_attn_mid", "attention − DeltaNet", "chat"],
        ["sae_delta_mid → sae_attn_mid", "attention − DeltaNet", "tool use"],
    ]
    assert {cell for row in rows for cell in row[3:]} == {"+0.0001"}


def test_hub_metadata_parse_and_hold_the_results(built: Path) -> None:
    data = ModelCard(card(built)).data
    assert data.license == "mit"
    assert data.library_name == "qwenscope"
    assert data.base_model == "Qwen/Qwen3.5-35B-A3B"
    assert data.datasets == ["HuggingFaceH4/ultrachat_200k", "allenai/WildChat-1M"]
    assert {"sparse-autoencoder", "interpretability", "saelens"} <= set(data.tags)
    results = {(r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    assert results[("chat", "sae_attn_mid: explained variance")] == number(2, 0, NUMBERS.index("explained_variance"))
    assert len(results) == 2 * 3 * 4


def test_data_and_privacy_are_told_with_their_counts(built: Path) -> None:
    header, *rows = table(card(built), "## Training data and privacy")
    wildchat = dict(zip(header, rows[1], strict=True))
    assert wildchat["from"] == "allenai/WildChat-1M"
    assert wildchat["revision"] == "b" * 12
    assert wildchat["weight"] == "35 %"
    assert wildchat["conversations"] == "900"
    assert wildchat["dropped"] == "country: 77, toxic: 23"
    assert rows[2][1] == "packaged generator"
    for text in (
        "email 41",
        "not detected",
        "no claim of legal compliance",
        "2 × NVIDIA H200 (150 GiB)",
        "200,000,000",
    ):
        assert text in card(built)


@pytest.mark.parametrize("words", ["N/A", "None", "nan", "undefined", "{{", "{%", "not recorded"])
def test_the_card_has_no_holes(built: Path, words: str) -> None:
    assert words not in card(built)


def test_tables_of_the_card_are_whole(built: Path) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", card(built), flags=re.M):
        widths = {line.count("|") for line in block.splitlines()}
        assert len(widths) == 1, block


def test_no_trace_of_the_owner_goes_out(tmp_path: Path) -> None:
    model = tmp_path / "private" / "my-model"
    changed = recipe(model=str(model), revision=None)
    tree = changed.model_dump(mode="json")
    tree["corpus"]["sources"] = [{"name": "files", "weight": 1.0, "path": str(tmp_path / "private" / "chats.jsonl")}]
    release(make_run(tmp_path / "run", Recipe.model_validate(tree)), tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for secret in (str(tmp_path), str(Path.home()), "my-secret-host", socket.gethostname() + ".", "4242"):
                assert secret.encode() not in data, (path, secret)
    assert "base_model" not in metadata(tmp_path / "out")
    assert "my-model" in card(tmp_path / "out")
    assert load_recipe(tmp_path / "out/recipe.yaml").lm.model == "my-model"


def without(run: Path, key: str, value: Any = None) -> None:
    """Drop (or replace) one dotted key of the run's evaluation.json."""
    path = run / "evaluation.json"
    tree = json.loads(path.read_text())
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("key", [*NUMBERS, "mse_special_tokens"])
def test_a_missing_number_is_an_error_that_names_it(tmp_path: Path, key: str) -> None:
    run = make_run(tmp_path / "run")
    without(run, f"saes.sae_attn_mid.tool_use.{key}")
    with pytest.raises(FormatError, match=rf"saes\.sae_attn_mid\.tool_use\.{key} is missing; run `qwenscope evaluate`"):
        release(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("saes.sae_attn_mid", None, "saes.sae_attn_mid is missing"),
        ("saes.sae_attn_mid", {}, "saes.sae_attn_mid is missing"),
        ("saes", None, "saes is missing"),
        ("saes.sae_attn_mid.chat.fvu", "0.1", "fvu is '0.1', no number"),
        ("saes.sae_attn_mid.chat.l0", float("nan"), "l0 is nan, no number"),
        ("saes.sae_attn_mid.chat.kl", True, "kl is True, no number"),
        ("saes.sae_new", {}, "saes.sae_new is none of the recipe's SAEs"),
    ],
)
def test_a_wrong_evaluation_is_refused(tmp_path: Path, key: str, value: Any, complaint: str) -> None:
    run = make_run(tmp_path / "run")
    without(run, key, value)
    with pytest.raises(FormatError, match=re.escape(complaint)):
        release(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def usefulness() -> dict[str, Any]:
    few = {k: {"auroc": 0.5 + int(k) / 100, "std": 0.01} for k in ("1", "4", "16")}
    probing = {"latents": few, "frozen decoder": {k: {"auroc": 0.5} for k in few}, "rows": {"all": {"auroc": 0.9}}}
    absorption = {"latents": {"absorbed": {"share": 0.125}}, "frozen decoder": {"absorbed": {"share": None}}}
    measured = {"probing": probing, "absorption": absorption, "mean_over_std": 1.5}
    saes = {sae_id: measured if number else {"probing": probing} for number, sae_id in enumerate(POINTS)}
    return {"conversations": 60, "seeds": 3, "labels": {"role": 5, "tool": 2}, "tokens": {"auroc": 0.75}, "saes": saes}


def test_usefulness_is_in_the_card_where_it_was_measured(built: Path, tmp_path: Path) -> None:
    assert "What a few latents know" not in card(built)
    run = make_run(tmp_path / "run")
    without(run, "usefulness", usefulness())
    release(run, tmp_path / "out")
    text = card(tmp_path / "out")
    header, *rows = table(text, "### What a few latents know")
    names = ["1", "4", "16", "1 frozen", "4 frozen", "16 frozen", "rows", "absorbed", "absorbed, frozen", "mean / std"]
    assert header[1:] == names
    probed = ["0.510", "0.540", "0.660", "0.500", "0.500", "0.500", "0.900"]
    assert rows[0][1:] == [*probed, "–", "–", "–"]  # measured before absorption was
    assert [row[1:] for row in rows[1:]] == [[*probed, "12.5%", "–", "1.50"]] * (len(POINTS) - 1)
    assert "The token alone reaches 0.750" in text
    assert "(role, tool)" in text


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("usefulness", 3, "usefulness: Input should be a valid dictionary"),
        ("usefulness.labels", None, "usefulness.labels: Field required"),
        ("usefulness.saes.sae_attn_mid", None, "usefulness.saes.sae_attn_mid is missing"),
        ("usefulness.tokens.auroc", float("inf"), "usefulness.tokens.auroc: Input should be a finite number"),
    ],
)
def test_a_wrong_usefulness_is_refused(tmp_path: Path, key: str, value: Any, complaint: str) -> None:
    run = make_run(tmp_path / "run")
    without(run, "usefulness", usefulness())
    without(run, key, value)
    with pytest.raises(FormatError, match=re.escape(complaint)):
        release(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_complete_evaluated_runs_are_released(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "status.json").write_text('{"state": "stopped"}')
    with pytest.raises(FormatError, match="is 'stopped', not complete; go on with `qwenscope train --resume`"):
        release(run, tmp_path / "out")
    (run / "status.json").write_text('{"state": "complete"}')
    (run / "evaluation.json").unlink()
    with pytest.raises(FormatError, match=r"has no evaluation.json; run `qwenscope evaluate"):
        release(run, tmp_path / "out")
    with pytest.raises(FormatError, match=r"holds no recipe.yaml"):
        release(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saes_are_verified_before_they_are_released(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    sae = exact_sae(2)
    with torch.no_grad():
        sae.decoder.weight[:, 5] *= 1.01
    sae.save(run / "saes/sae_attn_mid")
    with pytest.raises(FormatError, match=r"sae_attn_mid: a decoder column's norm is off 1 by 0.01"):
        release(run, tmp_path / "out")
    shutil.rmtree(run / "saes/sae_attn_mid")
    with pytest.raises(FormatError, match="sae_attn_mid is missing"):
        release(run, tmp_path / "out")
    exact_sae(2).save(run / "saes/sae_attn_mid")
    exact_sae(2).save(run / "saes/sae_other")
    with pytest.raises(FormatError, match="sae_other is none of the recipe's SAEs"):
        release(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(FormatError, match="exists and is not empty"):
        release(run, tmp_path / "out")
    assert (tmp_path / "out/mine").read_text() == "mine"


def test_binding_is_a_function_of_folder_and_name(released: Path) -> None:
    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in released.rglob("*") if path.is_file()}

    before = state()
    bind(released, "org/saes")
    bound = state()
    bind(released, "org/saes")
    assert state() == bound
    changed = {Path(name).name for name in bound if bound[name] != before[name]}
    assert changed == {"README.md", "SHA256SUMS", "config.json", "notebook.ipynb"}
    bind(released, None)
    assert state() == before
    with pytest.raises(FormatError, match="neither an existing folder nor a Hub repository"):
        bind(released, "../escape")


def test_releasing_again_into_the_same_folder_changes_nothing(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    release(run, out)
    digest = (out / "SHA256SUMS").read_text()
    release(run, out)
    assert (out / "SHA256SUMS").read_text() == digest
    release(run, out, repo="org/saes")  # a push that is tried again
    release(run, out)
    assert json.loads((out / "config.json").read_text())["repo"] == "org/saes"
    without(run, "saes.sae_attn_mid.chat.fvu", 0.5)
    with pytest.raises(FormatError, match="holds another release than"):
        release(run, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_the_example_is_the_notebook_of_a_release() -> None:
    example = Path(__file__).parents[2] / "examples/first-look.ipynb"
    assert json.loads(example.read_text()) == notebook("../runs/demo-release", "sae_attn_mid", "standin")


def test_metrics_as_parquet(built: Path) -> None:
    rows = pq.read_table(built / "evaluation.parquet").to_pylist()
    assert len(rows) == 6
    assert rows[0]["sae_id"] == "sae_delta_mid_pos1"
    assert rows[0]["fvu"] == number(0, 0, NUMBERS.index("fvu"))
    assert pq.read_table(built / "metrics.parquet").to_pylist()[-1] == {
        "step": 2,
        "tokens": 20,
        "sae_id": "sae_attn_mid",
        "fvu": 0.5,
    }


def test_text_from_outside_cannot_break_the_cards_markup() -> None:
    shown = plain("a | b <script>`x`</script>\n# [link](http://x) &")
    assert not set("|<>`\n[") & set(shown)


@pytest.fixture(scope="module")
def standin_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release whose SAEs fit the packaged stand-in model (hidden size 64)."""
    folder = tmp_path_factory.mktemp("standin")
    run = make_run(folder / "run", recipe(model="standin", revision=None, dtype="float32"))
    for sae_id, (layer, kind) in POINTS.items():
        sae = TopKSAE(64, 64, 6, seed=layer)
        sae.config |= {"layer": layer, "kind": kind}
        sae.save(run / "saes" / sae_id)
    release(run, folder / "release")
    return folder / "release"


def run_python(code: str, folder: Path) -> str:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cards_usage_runs_and_encodes(standin_release: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", card(standin_release), flags=re.S)
    assert len(blocks) == 2
    folder = shutil.copytree(standin_release, tmp_path / "release")
    shown = run_python("\n".join(blocks), folder)
    assert re.search(r"strongest latent of the last token: \d+", shown)
    assert re.search(r"fraction of variance unexplained here: \d\.\d{3}", shown)
    assert "torch.Size([4, 64]) torch.Size([4, 64])" in shown


def test_card_and_notebook_install_from_a_checkout(built: Path) -> None:
    """No index of packages holds qwenscope, so that `pip install qwenscope` would fail, or fetch something else."""
    texts = [card(built), (built / "notebook.ipynb").read_text()]
    assert all("pip install ." in text and "pip install qwenscope" not in text for text in texts)


def test_a_revision_is_named_where_it_can_be_given(built: Path, tmp_path: Path) -> None:
    """SAELens' from_pretrained takes none."""
    folder = shutil.copytree(built, tmp_path / "release")
    bind(folder, "org/saes")
    shown = card(folder)
    assert "revision" in inspect.signature(TopKSAE.from_pretrained).parameters
    assert shown.count('revision="v1"') == shown.count('`TopKSAE.from_pretrained(..., revision="v1")`') == 1
    assert shown.index('revision="v1"') < shown.index("With SAELens")


def test_the_notebook_is_well_formed(built: Path) -> None:
    notebook = json.loads((built / "notebook.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(standin_release: Path, tmp_path: Path) -> None:
    notebook = json.loads((standin_release / "notebook.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    folder = shutil.copytree(standin_release, tmp_path / "release")
    shown = run_python("\n".join(code), folder)
    assert re.search(r"^sae_attn_mid +layers\.23 +64 latents  k = 6$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("run.json", "machine", 5),
        ("run.json", "machine.devices", [{}]),
        ("run.json", "machine.devices", [{"name": "\ud800", "memory_bytes": 1}]),
        ("run.json", "machine.versions", "x"),
        ("run.json", "revisions", []),
        ("run.json", "revisions.corpus", []),
        ("privacy_report.json", "sources", []),
        ("privacy_report.json", "sources.ultrachat", 1),
        ("privacy_report.json", "sources.ultrachat.truncated", "x"),
        ("privacy_report.json", "sources.ultrachat.dropped", "x"),
        ("privacy_report.json", "scrubbed", {"email": None}),
        ("status.json", "", [1]),
    ],
)
def test_an_odd_record_of_a_run_is_named(name: str, key: str, value: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    tree = json.loads((run / name).read_text())
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node[part]
    node[last] = value
    (run / name).write_text(json.dumps(tree if key else value))
    with pytest.raises(FormatError, match=name) as caught:
        release(run, tmp_path / "out")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()
