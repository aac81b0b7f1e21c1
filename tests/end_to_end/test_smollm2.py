"""A real chat model on the whole walk: SmolLM2-135M-Instruct, which the developers' script builds from a package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.evaluation.run import evaluate
from qwenscope.features.continuation import generate, prompt_tokens
from qwenscope.features.index import build_index
from qwenscope.features.read import read
from qwenscope.features.steering import Steering, steer
from qwenscope.features.store import Index
from qwenscope.files import read_json, sha256
from qwenscope.opening import Target, open_target
from qwenscope.sae.sae import SAE

pytestmark = pytest.mark.slow
TEMPLATE = ROLES.index("template")
SCRIPT = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "smollm2.py"
SMALL = (
    'hook_points={"stream": {"layer": 6, "dict_size": 512, "k": 16, "lr": 0.003}, '
    '"mlp": {"site": "layers.7.mlp", "dict_size": 512, "k": 16, "lr": 0.003}}',
    'corpus.sources=[{"name": "chat", "weight": 0.7}, {"name": "tool_use", "weight": 0.3}]',
    "corpus.max_length=256",
    "corpus.batch_tokens=2048",
    "activations.window_tokens=2048",
    "training.tokens=6144",
    "training.batch_size=256",
    "training.warmup_steps=2",
    "training.calibration_tokens=1024",
    "checkpoint.every_tokens=1024",
    "evaluation.tokens=400",
)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not SCRIPT.is_file():
        pytest.skip("the script that builds the model stands only beside a developer's checkout")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    built = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the model's package cannot be had: {built.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="session")
def start(smollm2: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """start(run, *options) -> `qwenscope train smollm2-135m` as a process of its own."""

    def begin(run: Path, *options: str) -> subprocess.Popen[bytes]:
        settings = [part for setting in (*SMALL, f"lm.model={smollm2}") for part in ("--set", setting)]
        command = [sys.executable, "-m", "qwenscope", "train", "smollm2-135m", "--out", str(run), *settings, *options]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    return begin


@pytest.fixture(scope="session")
def run(start: Callable[..., subprocess.Popen[bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert start(folder).wait() == 0
    return folder


@pytest.fixture(scope="session")
def target(run: Path) -> Target:
    return open_target(run)


def test_a_killed_run_ends_with_the_same_bits(
    run: Path, start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    again = tmp_path / "again"
    process = start(again)
    while process.poll() is None and not any(again.glob("checkpoints/step-*")):
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start(again, "--resume").wait() == 0
    assert read_json(again / "status.json")["tokens_trained"] == 6144
    for sae_id in ("stream", "mlp"):
        name = f"saes/{sae_id}/weights.safetensors"
        assert sha256(again / name) == sha256(run / name)


def test_template_and_shared_turns_are_left_out(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    left_out = json.loads(lines[-1])["left_out"]
    assert left_out["role"] > 500


def test_evaluation_is_what_plain_hooks_compute(run: Path, target: Target) -> None:
    figures = evaluate(run)["saes"]
    lm = target.language_model()
    for split, conversations in target.splits(lm.tokenizer, 400).items():
        masks = _kept(target, conversations)
        for sae_id, sae in target.saes.items():
            layer = lm.model.model.layers[target.sites[sae_id].layer]
            want = _by_hand(lm.model, layer.mlp if sae_id == "mlp" else layer, sae, conversations, masks)
            for name, value in want.items():
                assert figures[sae_id][split][name] == pytest.approx(value, rel=1e-5), (sae_id, split, name)


def _by_hand(
    model: Any, module: torch.nn.Module, sae: SAE, conversations: list[Conversation], masks: list[torch.Tensor]
) -> dict[str, float]:
    """FVU and cross-entropies from one conversation at a time, plain forward hooks and float64."""
    rows = []
    for one, mask in zip(conversations, masks, strict=True):
        rows.append(_hooked(model, module, one, lambda x: x)[0][mask])
    x = torch.cat(rows)
    x_hat, mean = sae(x).detach().double(), x.double().mean(0)
    edits: dict[str, Callable[[torch.Tensor], Any]] = {
        "spliced": sae,
        "zero_ablation": torch.zeros_like,
        "mean_ablation": lambda kept: mean.float().expand_as(kept),
        "clean": lambda kept: kept,
    }
    found = {"fvu": float((x.double() - x_hat).square().sum() / (x.double() - mean).square().sum())}
    for name, edit in edits.items():
        losses = []
        for one, mask in zip(conversations, masks, strict=True):

            def replace(x_TD: torch.Tensor, mask: torch.Tensor = mask, edit: Any = edit) -> torch.Tensor:
                edited = x_TD.clone()
                edited[mask] = edit(x_TD[mask])
                return edited

            spread = _hooked(model, module, one, replace)[1].log_softmax(-1)
            losses.append(-spread[:-1].gather(1, torch.from_numpy(one.token_ids[1:]).long()[:, None]))
        found[f"ce_{name}"] = float(torch.cat(losses).mean())
    return found


@torch.no_grad()
def _hooked(
    model: Any, module: torch.nn.Module, one: Conversation, edit: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The module's rows [T, D] and the logits [T, V] of a pass in which `edit` replaces them."""
    rows = []

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        rows.append(first[0].clone())
        edited = edit(first[0])[None]
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = module.register_forward_hook(hook)
    spread = model(input_ids=torch.from_numpy(one.token_ids).long()[None], use_cache=False).logits[0].double()
    handle.remove()
    return rows[0], spread


def _kept(target: Target, conversations: list[Conversation]) -> list[torch.Tensor]:
    """The recipe's rule by hand, but for outliers, of which these layers have none behind the first position."""
    assert target.recipe.activations.skip_first_position
    seen: set[tuple[int, ...]] = set()
    masks = []
    for one in conversations:
        ids = one.token_ids.tolist()
        mask = [
            t > 0 and role != TEMPLATE and tuple(ids[: t + 1]) not in seen for t, role in enumerate(one.roles.tolist())
        ]
        seen.update(tuple(ids[: t + 1]) for t in range(len(ids)))
        masks.append(torch.tensor(mask))
    return masks


def test_index_read_and_steer(run: Path, target: Target, tmp_path: Path) -> None:
    build_index(run, tmp_path / "index", tokens=2000)
    index = Index(tmp_path / "index")
    latent = max(range(512), key=lambda number: index.table("stream")["density"][number])
    examples = [e for e in index.latent("stream", latent)["examples"] if e["kind"] != "negative"]
    assert all(e["roles"][e["peak"]] != TEMPLATE for e in examples), "no firing on the template"
    assert len({tuple(e["tokens"][: e["peak"] + 1]) for e in examples}) == len(examples)
    lm = target.language_model()
    reading = read(lm, lm.tokenizer, [{"role": "user", "content": "What is the capital of France?"}], target.saes)
    assert " France" in reading.tokens
    assert reading.codes["stream"].indices.shape[0] == len(reading.tokens)
    ids = prompt_tokens(lm, "What is the capital of France?")
    plain = "".join(generate(lm, ids, [], 8))
    assert "Paris" in plain
    push = Steering(site="layers.6", sae=target.saes["stream"], latent=latent, strength=0.5)
    cached = "".join(generate(lm, ids, [push], 8))
    uncached = list(ids)
    with steer(lm, push), torch.no_grad():
        for _ in range(8):
            token = int(lm.model(input_ids=torch.tensor([uncached]), use_cache=False).logits[0, -1].argmax())
            uncached.append(token)
    assert lm.tokenizer.decode(uncached[len(ids) :]).startswith(cached)
    assert cached != plain
