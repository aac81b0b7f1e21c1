"""SAEBench runs on our SAEs and, where definitions coincide, measures what we measure (QWENSCOPE_PEERS).

docs/evaluation.md says how to make the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import conversation_of

from qwenscope.corpus.tool_use import tool_use_conversation
from qwenscope.evaluation.measure import SplitMeter
from qwenscope.lm.load import load_language_model
from qwenscope.lm.sites import Site
from qwenscope.lm.standin import STANDIN_FOLDER
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import TopKSAE

BENCH = Path(__file__).parents[2] / "bench"
SAE_ID, LAYER, CONTEXT, BATCHES, PROMPTS = "sae_delta_mid", 22, 64, 2, 4

# Runs the adapter as it is, and keeps the contexts that SAEBench cut the texts into.
CODE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import saebench

seen, theirs = [], saebench.ActivationsStore.get_batch_tokens

def kept(self, *args, **kwargs):
    seen.append(theirs(self, *args, **kwargs))
    return seen[-1]

saebench.ActivationsStore.get_batch_tokens = kept
saebench.main(sys.argv[3:])
torch.save(seen, sys.argv[2])
"""


def texts() -> list[tuple[str, str]]:
    """(label, text): what users say and what tools answer in generated conversations."""
    found = []
    for index in range(60):
        for message in tool_use_conversation(5, index)["messages"]:
            if message["role"] in ("user", "tool") and message.get("content"):
                found.append((message["role"], str(message["content"])))
    return found


def write_jsonl(path: Path, rows: list[Mapping[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TopKSAE, list[torch.Tensor]]:
    """SAEBench's result files, the SAE, and the contexts that core measured on."""
    folder = os.environ.get("QWENSCOPE_PEERS")
    python = Path(folder or "", "saebench/bin/python")
    if not folder or not python.exists():
        pytest.skip("QWENSCOPE_PEERS names no folder with an environment saebench; see docs/evaluation.md")
    place = tmp_path_factory.mktemp("saebench")
    sae = TopKSAE(64, 256, 8, seed=1)
    sae.config |= {"layer": LAYER}
    sae.save(place / "suite" / SAE_ID)
    labelled = texts()
    text = write_jsonl(place / "texts.jsonl", [{"text": text} for _, text in labelled])
    probe = write_jsonl(place / "roles.jsonl", [{"label": label, "text": text} for label, text in labelled])
    arguments = [place / "suite", "--model", STANDIN_FOLDER, "--out", place / "out", "--text", text]
    arguments += ["--probe", f"roles={probe}", "--context", CONTEXT, "--batches", BATCHES, "--batch-prompts", PROMPTS]
    done = subprocess.run(
        [python, "-c", CODE, BENCH, place / "tokens.pt", *map(str, arguments), "--device", "cpu"],
        env={"PATH": os.environ["PATH"], "HOME": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return place / "out", sae, torch.load(place / "tokens.pt", weights_only=True)


def ours(sae: TopKSAE, batches: list[torch.Tensor]) -> dict[str, Any]:
    """Our figures on the same contexts, each one conversation."""
    recipe = load_recipe("standin")
    conversations = [
        conversation_of(row.numpy().astype(np.int32), number) for number, row in enumerate(torch.cat(batches))
    ]
    meter = SplitMeter(
        load_language_model(recipe.lm, lm_head=True), {SAE_ID: sae}, {SAE_ID: Site.of(LAYER)}, conversations, recipe
    )
    return meter.run().figures[SAE_ID]


@pytest.mark.slow
def test_core_equals_our_figures(measured: tuple[Path, TopKSAE, list[torch.Tensor]]) -> None:
    out, sae, batches = measured
    assert [list(batch.shape) for batch in batches] == [[PROMPTS, CONTEXT]] * 2 * BATCHES
    effect, fidelity = ours(sae, batches[:BATCHES]), ours(sae, batches[BATCHES:])  # it reads on between the two
    assert effect["tokens"] == fidelity["tokens"] == BATCHES * PROMPTS * CONTEXT, "no row left out"
    theirs = json.loads((out / f"core-{SAE_ID}.json").read_text(encoding="utf-8"))["eval_result_metrics"]
    performance, behaviour = theirs["model_performance_preservation"], theirs["model_behavior_preservation"]
    for figures, name, value in (
        (effect, "ce_clean", performance["ce_loss_without_sae"]),
        (effect, "ce_spliced", performance["ce_loss_with_sae"]),
        (effect, "ce_zero_ablation", performance["ce_loss_with_ablation"]),
        (effect, "ce_recovered_zero", performance["ce_loss_score"]),
        (fidelity, "cosine", theirs["reconstruction_quality"]["cossim"]),
        (fidelity, "norm_ratio", theirs["shrinkage"]["l2_ratio"]),
        (fidelity, "l0", theirs["sparsity"]["l0"]),
        (fidelity, "dead_fraction", 1 - theirs["misc_metrics"]["frac_alive"]),
    ):
        assert figures[name] == pytest.approx(value, rel=1e-4), name
    # Theirs also counts each context's last token, which predicts nothing here.
    assert effect["kl"] == pytest.approx(behaviour["kl_div_with_sae"], rel=0.1)


@pytest.mark.slow
def test_sparse_probing_runs_on_local_texts(measured: tuple[Path, TopKSAE, list[torch.Tensor]]) -> None:
    results = json.loads((measured[0] / f"sparse_probing-{SAE_ID}.json").read_text(encoding="utf-8"))["results"]
    assert {"llm_test_accuracy", "sae_test_accuracy", "sae_top_1_test_accuracy"} <= set(results)
    assert set(results["roles_results"]) <= set(results)
    assert results["sae_test_accuracy"] > 0.8, "users and tools are told apart"
