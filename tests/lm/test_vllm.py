"""vLLM's rows against transformers', and whole runs on them, in an environment of vLLM's own (QWENSCOPE_PEERS).

`make peers` makes it, with vLLM's CPU build; docs/language-models.md says what could be tried on it and what could not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lm import tiny_models
from lm.padded_standin import make_padded_standin
from safetensors.torch import load_file
from tiny_run import final_hashes, status
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qwenscope.files import read_json
from qwenscope.lm.batches import make_batches
from qwenscope.lm.forward import site_rows
from qwenscope.lm.load import load_language_model
from qwenscope.lm.sites import Site
from qwenscope.lm.vllm.parity import check_parity, sample_rows
from qwenscope.recipe import LMRecipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MAX_LENGTH, BATCH_TOKENS = 200, 400  # vllm_rows.py's
KILLS_ITSELF = """
import os, signal, sys
from pathlib import Path
from qwenscope.recipe import load_recipe
from qwenscope.training.run import train

def watch(progress):
    if progress.tokens > 10_000:
        os.kill(os.getpid(), signal.SIGKILL)

train(load_recipe(sys.argv[1]), Path(sys.argv[2]), on_progress=watch)
"""
LENGTHS = (MAX_LENGTH, 150, 3, 1, 1, 77, 100, 100, 30)
DENSE = tiny_models.DENSE | {"hidden_size": 64, "num_key_value_heads": 1, "head_dim": 32}  # the CPU kernel's smallest


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**DENSE))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**DENSE))


def multimodal() -> PreTrainedModel:
    """The published model's class. All experts are routed to: rounding sends no token to other ones, as it does where a
    random router's scores are nearly equal."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "num_experts_per_tok": 8}
    linear = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 1}
    experts = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    text = tiny_models.QWEN | {"hidden_size": 128, "linear_num_value_heads": 2} | heads | linear | experts
    vision = tiny_models.VISION | {"hidden_size": 64, "num_heads": 2, "out_hidden_size": 128}
    return Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=vision))


def python() -> Path:
    folder = os.environ.get("QWENSCOPE_PEERS")
    found = Path(folder or "", "vllm/bin/python")
    if not folder or not found.exists():
        pytest.skip("QWENSCOPE_PEERS names no folder with an environment vllm; see docs/language-models.md")
    return found


def environment(home: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_padded_standin(tmp_path_factory.mktemp("padded") / "model")


def check_rows(model: Path, dtype: str, layers: list[int], vocabulary: int, tmp_path: Path) -> None:
    """Rows by vLLM are those of transformers, whole batches were one step each, and repeat to the bit."""
    random = np.random.default_rng(0)
    token_ids = [random.integers(0, vocabulary, length, dtype=np.int32) for length in LENGTHS]
    (tmp_path / "conversations.json").write_text(json.dumps([ids.tolist() for ids in token_ids]))
    command = [python(), Path(__file__).with_name("vllm_rows.py"), model, dtype, json.dumps(layers)]
    command += [tmp_path / "conversations.json", tmp_path / "rows.safetensors"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = {int(layer): rows_RD for layer, rows_RD in load_file(tmp_path / "rows.safetensors").items()}

    lm = load_language_model(LMRecipe.model_validate({"model": str(model), "dtype": dtype, "device": "cpu"}))
    assert lm.dtype == next(iter(found.values())).dtype
    reference = sample_rows(lm, token_ids, [Site.of(layer) for layer in layers], BATCH_TOKENS)
    check_parity(reference, found, lm.dtype, {Site.of(layer): f"layer_{layer}" for layer in layers}, "vllm")
    batches = make_batches(LENGTHS, token_ids, BATCH_TOKENS, 0, torch.device("cpu"))
    steps = [step for step in json.loads((tmp_path / "rows.json").read_text()) if step]
    assert steps == 2 * [sum(batch.lengths_C) for batch in batches]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(llama, "float32"), (llama, "bfloat16"), (qwen3, "float32"), (qwen3, "bfloat16"), (multimodal, "bfloat16")],
)
def test_rows_of_tiny_models(family: Callable[[], PreTrainedModel], dtype: str, tmp_path: Path) -> None:
    python()
    torch.manual_seed(2)
    family().to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    tiny_models.save_tokenizer(tmp_path / "model")
    check_rows(tmp_path / "model", dtype, [0, 2, 3], tiny_models.VOCABULARY, tmp_path)


def test_rows_of_a_hybrid_model(padded: Path, tmp_path: Path) -> None:
    """Gated DeltaNet, attention and experts, 40 layers, at the published hook points; the CPU kernel knows bfloat16."""
    check_rows(padded, "bfloat16", [6, 7, 14, 15, 21, 22, 23, 34, 35], 2048, tmp_path)


def test_the_padded_standin_computes_what_the_standin_does(padded: Path) -> None:
    ids_CT = torch.arange(200).reshape(2, 100)
    wide, narrow = (
        load_language_model(LMRecipe(model=name, dtype="float32", device="cpu"), last_layer=35)
        for name in (str(padded), "standin")
    )
    for layer, x_CTD in site_rows(wide, ids_CT, [6, 21, 35]).items():
        want_CTD = site_rows(narrow, ids_CT, [layer])[layer]
        assert float((x_CTD - want_CTD).norm() / want_CTD.norm()) < 1e-4


def train(model: Path, run: Path, *arguments: str) -> list[str | Path]:
    keys = {
        "lm.model": model,
        "lm.backend": "vllm",
        "lm.dtype": "bfloat16",
        "corpus.max_length": 512,
        "corpus.batch_tokens": 2048,
        "activations.window_tokens": 4096,
        "training.tokens": 16384,
        "training.warmup_steps": 4,
        "training.calibration_tokens": 2048,
        "checkpoint.every_tokens": 2048,
    }
    sets = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    return [python(), "-m", "qwenscope", "train", "standin", "--out", run, *sets, *arguments]


def test_a_run_ends_complete_with_its_verdict_and_resumes_to_the_bit(padded: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = subprocess.run(train(padded, whole), env=environment(tmp_path), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert status(whole)["state"] == "complete"
    assert status(whole)["tokens_trained"] == 16384
    verdict = read_json(whole / "run.json")["parity"]
    assert verdict["engine"].startswith("vllm")
    assert verdict["tokens"] >= 4096
    assert len(verdict["hook_points"]) == 9
    for off in verdict["hook_points"].values():
        assert 0 < off["median"] < 0.025
        assert off["p99"] < 0.15
        assert off["fvu"] < 2e-3

    (tmp_path / "recipe.yaml").write_text((whole / "recipe.yaml").read_text())
    command = [python(), "-c", KILLS_ITSELF, tmp_path / "recipe.yaml", cut]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=900)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((cut / "checkpoints").glob("step-*"))
    done = subprocess.run(
        train(padded, cut, "--resume"), env=environment(tmp_path), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert final_hashes(cut) == final_hashes(whole)


def test_a_model_that_vllm_cannot_run_is_refused_by_name(tmp_path: Path) -> None:
    """The stand-in as it is: heads of 32 values."""
    command = train(Path("standin"), tmp_path / "run")
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=600)
    assert done.returncode == 4, done.stderr
    assert "vLLM cannot run standin" in done.stderr
    assert "set lm.backend to transformers" in done.stderr
    assert status(tmp_path / "run")["state"] == "failed"


def test_conversations_as_long_as_the_model_are_refused_before_it_is_loaded(padded: Path, tmp_path: Path) -> None:
    long = ["--set", "corpus.max_length=32768", "--set", "corpus.batch_tokens=32768"]
    command = train(padded, tmp_path / "run", *long)
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=600)
    assert done.returncode == 3, done.stderr
    assert "corpus.max_length 32768 leaves vLLM no room" in done.stderr
    assert "lower it to 32767" in done.stderr
