"""Train the stand-in language model that the package ships (about an hour of CPU).

    PYTHONPATH=bench python -m standin.train --out OUT [--data FOLDER] [--seed 0]

A shallow model comes first, whose blocks are then spread over twice as many and more layers (each copy's output
projections divided by the number of copies, which keeps the function roughly as it was) and trained on. All 40 layers
from the start learn next to nothing in the same time. Muon (Jordan et al. 2024) updates the matrices inside the
layers, AdamW everything else.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from standin.data import NgramTables, Rows, batches, data_entries, render_all, rows_of, train_tokenizer
from standin.model import centered_cosine, forward, grow, imbalance, measure, new_model, standin_config
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3_5MoeForCausalLM

from qwenscope.files import fsync_file, fsync_folder, write_json, write_text

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one depth."""

    layers: int
    tokens: int
    balance: float = 0.01
    """Weight of the load-balancing loss, averaged over layers."""
    contrast: float = 0.0
    """Weight of the similarity loss: how far 1 - cosine of successive residual streams falls below 0.1, in logs."""


@dataclass(frozen=True)
class StandinPlan:
    """Everything that decides the trained weights beside the data and the seed."""

    stages: tuple[Stage, ...] = (
        Stage(8, 2_600_000),
        Stage(20, 1_300_000),
        Stage(40, 2_000_000, balance=0.2, contrast=0.2),
    )
    vocab_size: int = 4096
    generated: int = 6000
    """Conversations drawn from the tool-use generator."""
    max_length: int = 512
    batch_tokens: int = 2048
    lr: float = 1e-2
    warmup: int = 20
    """Steps of linear warmup at the start of every stage."""
    decay: float = 0.35
    """Share of all tokens over which the learning rate falls linearly to zero, at the end."""
    config: dict[str, Any] = field(default_factory=dict)
    """Overrides of `standin_config`."""


def train_standin(
    data: Path | None, out: Path, *, seed: int = 0, plan: StandinPlan | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Train the stand-in and write it to `out`; the same arguments give the same model on the same machine.

    Args:
        data: folder of the conversation files (`data.FILES`); None trains on generated conversations only.
        out: folder to write; the weights there are renewed as training goes on, the description comes last.
        progress: called with (tokens trained, tokens in all, loss in nats per token) after each step.

    Returns:
        The content of DESCRIPTION.json.

    Raises:
        CorpusError: the data folder is not what the manifest says.
    """
    plan = plan or StandinPlan()
    entries = data_entries(data) if data is not None else []
    texts = render_all(data, plan.generated, seed)
    tokenizer = train_tokenizer([text for group in texts["train"].values() for text in group], plan.vocab_size)
    rows = [row for group in texts["train"].values() for row in rows_of(tokenizer, group, plan.max_length)]
    held_out = {name: rows_of(tokenizer, group, plan.max_length) for name, group in texts["held_out"].items()}
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    torch.manual_seed(seed)
    started = time.process_time()
    trained = _train_stages(plan, rows, tokenizer, out, seed, progress)
    description = {
        "command": "PYTHONPATH=bench python -m standin.train "
        f"{'--data FOLDER ' if data else ''}--out OUT --seed {seed}",
        "seed": seed,
        "plan": asdict(plan),
        "cpu_minutes": round((time.process_time() - started) / 60, 1),
        "data": entries,
        "conversations": {split: {name: len(group) for name, group in texts[split].items()} for split in texts},
        "generated_sha256": hashlib.sha256("".join(texts["train"]["generated"]).encode()).hexdigest(),
        "train_tokens": sum(map(len, rows)),
        "trained_tokens": trained,
    }
    description |= measure(out, held_out, NgramTables(rows, plan.vocab_size))
    write_json(out / "DESCRIPTION.json", description)
    write_text(out / "README.md", _readme(description))
    return description


def _train_stages(
    plan: StandinPlan, rows: Rows, tokenizer: PreTrainedTokenizerBase, out: Path, seed: int, progress: Progress | None
) -> int:
    """Train all stages, saving the model (grown to its final depth) after each; returns the tokens trained on."""
    stream = batches(rows, plan.batch_tokens, tokenizer.pad_token_id, Random(seed))
    model = new_model(standin_config(plan.vocab_size, **_ids(tokenizer), **plan.config), plan.stages[0].layers)
    done = 0
    for stage in plan.stages:
        logger.info("stand-in: %d layers, %d tokens done", stage.layers, done)
        if stage.layers != model.config.num_hidden_layers:
            model = grow(model, stage.layers)
        done = _train_stage(model, stage, plan, stream, done, progress)
        _save(grow(model, plan.stages[-1].layers), out)
    return done


def _train_stage(
    model: Qwen3_5MoeForCausalLM,
    stage: Stage,
    plan: StandinPlan,
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]],
    done: int,
    progress: Progress | None,
) -> int:
    """Train in place with a fresh optimizer; `done` tokens were trained on before, returns those after."""
    total = sum(stage.tokens for stage in plan.stages)
    optimizer = Optimizer(model)
    end, step = done + stage.tokens, 0
    while done < end:
        ids, mask = next(stream)
        rate = min(1.0, (step + 1) / plan.warmup, (total - done) / (plan.decay * total))
        loss, cross_entropy = _loss(model, ids, mask, stage)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(plan.lr * rate * math.sqrt(plan.stages[0].layers / stage.layers))
        done, step = done + int(mask.sum()), step + 1
        if progress is not None:
            progress(done, total, cross_entropy.item())
    return done


def _ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}


def _loss(
    model: Qwen3_5MoeForCausalLM, ids: torch.Tensor, mask: torch.Tensor, stage: Stage
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss and its cross-entropy part in nats per token."""
    losses, output = forward(model, ids, mask)
    cross_entropy = losses.mean()
    loss = cross_entropy + stage.balance * imbalance(output.router_logits, mask, model.config.num_experts_per_tok)
    if stage.contrast:
        streams = torch.stack([stream[mask] for stream in output.hidden_states[:-1]])
        difference = 1 - centered_cosine(streams[:-1], streams[1:])
        loss = loss + stage.contrast * F.relu(math.log(0.1) - (difference + 1e-6).log()).mean()
    return loss, cross_entropy.detach()


class Optimizer:
    """Muon for matrices at least 32 wide and high, except the embedding; AdamW without decay for the rest.

    Muon's updates have the size of an Adam step (0.2 per entry, root mean square; Liu et al. 2025, "Muon is scalable").
    torch's Muon takes matrices only, so the experts, which lie in one tensor each, are updated one by one as views.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        chosen = [p for name, p in named if min(p.shape[-2:]) >= 32 and p.dim() > 1 and "embed" not in name]
        ids = {id(parameter) for parameter in chosen}
        others = [parameter for _, parameter in named if id(parameter) not in ids]
        self.pairs = [(p, [nn.Parameter(m) for m in p.detach().view(-1, *p.shape[-2:])]) for p in chosen]
        matrices = [matrix for _, views in self.pairs for matrix in views]
        self.muon = torch.optim.Muon(matrices, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.parameters = [*chosen, *others]

    def step(self, lr: float) -> None:
        """One update at learning rate `lr` from the gradients (clipped to norm 1), which are then dropped."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for parameter, views in self.pairs:
            assert parameter.grad is not None
            for matrix, gradient in zip(views, parameter.grad.view(-1, *parameter.shape[-2:]), strict=True):
                matrix.grad = gradient
        for optimizer in (self.adam, self.muon):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None


def _save(model: Qwen3_5MoeForCausalLM, out: Path) -> None:
    """Write bf16 weights, the tied head only once, and a config that computes in float32 unless told otherwise."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(out, state_dict=state)
    fsync_file(out / "model.safetensors")
    fsync_folder(out)


def _readme(description: dict[str, Any]) -> str:
    """A model card for people: what it is, what it was trained on, what it reaches."""
    loss = description["loss"]
    lines = [
        "# Stand-in language model",
        "",
        f"A Qwen3.5-MoE text model of {description['parameters']:,} parameters with the hybrid pattern of 40 layers "
        "(three Gated DeltaNet, one attention). It exists so that qwenscope can be tried and tested without a "
        "download; it chats badly. Made by",
        "",
        f"    {description['command']}",
        "",
        f"on {description['trained_tokens']:,} tokens in {description['cpu_minutes']} CPU minutes; all settings and "
        "figures are in `DESCRIPTION.json`. Licence MIT; tokenizer and chat template are our own.",
        "",
        "| held-out text | tokens | model | bigram table | unigram table |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {row['tokens']:,} | {row['model']:.3f} | {row['bigram']:.3f} | {row['unigram']:.3f} |"
            for name, row in loss.items()
        ),
        "",
        f"Cross-entropy in nats per token. Experts receive {description['expert_use']['smallest']:.1%} to "
        f"{description['expert_use']['largest']:.1%} of their layer's routed tokens. "
        "Centred cosine of the residual streams after neighbouring layers: "
        + ", ".join(f"{pair} {value:.3f}" for pair, value in description["centred_cosine"].items())
        + " (a term of the training loss keeps them apart).",
        "",
        "Training text: conversations of `qwenscope.corpus.tool_use` (the SHA-256 of "
        "their rendering is in the description: another version of the generator trains another model), and",
        "",
        "| file | repository | commit | licence |",
        "|---|---|---|---|",
        *(f"| {e['file']} | {e['repo']} | {e['commit']} | {e['licence']} |" for e in description["data"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the arguments, train, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--data", type=Path, help="folder of chat and tool-use files to add")
    parser.add_argument("--seed", type=int, default=0, help="governs data order and initialization")
    arguments = parser.parse_args()
    description = train_standin(
        arguments.data,
        arguments.out,
        seed=arguments.seed,
        progress=lambda done, total, loss: print(f"{done:,} of {total:,} tokens, loss {loss:.3f}", flush=True),
    )
    print(f"{arguments.out}: loss {description['loss']['all']['model']:.3f} nats per token")


if __name__ == "__main__":
    main()
