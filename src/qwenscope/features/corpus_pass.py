"""The corpus pass of an index: every chunk of conversations through the language model once, all SAEs at once.

The pass is resumable: text is written per chunk, the statistics of all SAEs together now and then, each file whole or
absent and listed with its checksum. A resumed pass gives the same index as an uninterrupted one.

Legend: R rows, T tokens of a chunk, E experts, F context columns.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwenscope.activations.harvest import harvest
from qwenscope.corpus.conversation import ROLES, Conversation
from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import FormatError
from qwenscope.features.reservoirs import context_keys
from qwenscope.features.statistics import BEFORE, Chunk, LatentStatistics
from qwenscope.files import atomic_path, below, read_json, sha256, whole_folder, write_json
from qwenscope.lm.batches import cut
from qwenscope.lm.hooks import find_routers, watch_routers
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site, site_names, sites_of
from qwenscope.opening import SPLITS, Target

logger = logging.getLogger(__name__)

SAVE_SECONDS = 120.0
CONTEXT_COLUMNS = len(SPLITS) + len(ROLES)
OnProgress = Callable[[str, int, int], None]
"""Called with (phase, done, total)."""


@dataclass
class CorpusPass:
    """Reads conversations until enough tokens were seen; what it leaves is in `statistics` and in `work`."""

    target: Target
    lm: LanguageModel
    data: Path | None
    tokens: int
    work: Path

    def __post_init__(self) -> None:
        recipe = self.target.recipe
        self.sites = sites_of(recipe)
        hooked = {site.layer for site in self.sites}  # an index pass ends at the last site, maybe before its router
        self.routers = {
            layer: router
            for layer, router in find_routers(self.lm).items()
            if layer in hooked and Site(f"layers.{layer}.mlp") <= self.sites[-1]
        }
        self.activations = recipe.activations.model_copy(update={"skip_first_position": True})
        self.statistics: dict[str, LatentStatistics] = {}
        for sae_id, sae in self.target.saes.items():
            layer = recipe.hook_points[sae_id].layer
            experts = len(self.routers[layer].weight) if layer in self.routers else 0  # type: ignore[arg-type]
            self.statistics[sae_id] = LatentStatistics(sae, CONTEXT_COLUMNS + experts, recipe.seed, sae_id)
        self.chunks = 0
        self.read = 0
        self.left_out: dict[str, int] = {}

    def run(self, on_progress: OnProgress) -> None:
        """Read to the end, from where an earlier pass stopped.

        Raises:
            FormatError: `work` is of another target, corpus or length, or damaged.
            CorpusError: there are no conversations.
        """
        with self.target.conversations(self.lm.tokenizer, self.data) as stream:
            self._restore(stream)
            saved = time.monotonic()
            on_progress("reading", self.read, self.tokens)  # a CPU may read minutes at the first chunk
            while self.read < self.tokens and (conversations := self._next_chunk(stream)):
                self._add(conversations)
                on_progress("reading", min(self.read, self.tokens), self.tokens)
                if time.monotonic() - saved > SAVE_SECONDS and self.read < self.tokens:
                    self._save(stream)
                    saved = time.monotonic()
            self._save(stream)
        if not self.read:
            raise self.target.nothing_to_read(self.data)

    def texts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(address, {ids, sources, splits, lengths, tokens [T], roles [T]}) of each chunk, in order."""
        start = 0
        for number in range(self.chunks):
            with np.load(self._text_file(number), allow_pickle=False) as arrays:
                text = {name: arrays[name] for name in arrays.files}
            yield start, text
            start += len(text["tokens"])

    def _next_chunk(self, stream: CorpusStream) -> list[Conversation]:
        conversations: list[Conversation] = []
        room = min(self.target.recipe.activations.window_tokens, self.tokens - self.read)
        for conversation in stream:
            conversations.append(conversation)
            room -= len(conversation.token_ids)
            if room <= 0:
                break
        return conversations

    def _add(self, conversations: Sequence[Conversation]) -> None:
        """One chunk: language model, text file, every SAE's statistics."""
        recipe = self.target.recipe
        lengths = [len(conversation.token_ids) for conversation in conversations]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        chosen: dict[int, list[Tensor]] = {
            layer: [] for layer in self.routers
        }  # [positions, experts per token] per pass

        def see(layer: int, logits_PE: Tensor) -> None:
            k = int(self.routers[layer].top_k)  # type: ignore[arg-type]
            chosen[layer].append(logits_PE.topk(k, dim=1).indices.cpu())

        with watch_routers(self.routers, see):
            rows = harvest(
                self.lm, conversations, self.sites, self.activations, recipe.corpus.batch_tokens, site_names(recipe)
            )
        token_R = torch.from_numpy(starts)[rows.conversation_R.long()] + rows.position_R.long()
        row_T = torch.full((int(starts[-1]),), -1, dtype=torch.int64)
        row_T[token_R] = torch.arange(len(token_R))
        conversation_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        tokens_T = torch.from_numpy(np.concatenate([each.token_ids for each in conversations]).astype(np.int64))
        context_T = context_keys(tokens_T, conversation_T, BEFORE + 1)
        chunk = Chunk(self.chunks, self.read, token_R, row_T, conversation_T, context_T)
        context_RF = _context(conversations, token_R, rows.conversation_R.long())
        batches = cut(lengths, recipe.corpus.batch_tokens, self.lm.device)
        for sae_id, statistics in self.statistics.items() if len(token_R) else ():
            site = self.target.sites[sae_id]
            columns, layer = [context_RF], site.layer
            if layer in self.routers:
                columns.append(_experts(chosen[layer], batches, lengths, starts, self.routers[layer])[token_R])
            statistics.update(rows.rows[site], chunk, torch.cat(columns, dim=1))
        self._write_text(conversations, lengths)
        for reason, count in rows.left_out.items():
            self.left_out[reason] = self.left_out.get(reason, 0) + count
        self.chunks += 1
        self.read += int(starts[-1])

    def _text_file(self, number: int) -> Path:
        return self.work / f"text-{number:06d}.npz"

    def _write_text(self, conversations: Sequence[Conversation], lengths: list[int]) -> None:
        with atomic_path(self._text_file(self.chunks)) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                ids=np.array([conversation.id for conversation in conversations]),
                sources=np.array([conversation.source for conversation in conversations]),
                splits=np.array([conversation.split for conversation in conversations]),
                lengths=np.array(lengths, dtype=np.int64),
                tokens=np.concatenate([conversation.token_ids for conversation in conversations]).astype(np.int32),
                roles=np.concatenate([conversation.roles for conversation in conversations]).astype(np.uint8),
            )

    def _plan(self) -> dict[str, Any]:
        """What a resumed pass must have in common with the one that began."""
        return {
            "recipe": self.target.recipe.fingerprint(),
            "data": None if self.data is None else str(self.data.resolve()),
            "tokens": self.tokens,
            "saes": {sae_id: _fingerprint(sae.encoder.weight) for sae_id, sae in self.target.saes.items()},
        }

    def _save(self, stream: CorpusStream) -> None:
        """Write the state of this moment beside the last one, then remove that one."""
        older = sorted(self.work.glob("state-*"))
        folder = self.work / f"state-{self.chunks:06d}"
        if folder in older:
            return
        with whole_folder(folder) as temporary:
            for sae_id, statistics in self.statistics.items():
                tensors = {name: tensor.contiguous() for name, tensor in statistics.state().items()}
                save_file(tensors, temporary / f"{sae_id}.safetensors")
            files = {path.name: sha256(path) for path in sorted(below(temporary))}
            files |= {self._text_file(n).name: sha256(self._text_file(n)) for n in range(self.chunks)}
            state = {
                "plan": self._plan(),
                "chunks": self.chunks,
                "read": self.read,
                "left_out": self.left_out,
                "stream": stream.state(),
                "files": files,
            }
            write_json(temporary / "state.json", state)
        for path in older:
            shutil.rmtree(path)

    def _restore(self, stream: CorpusStream) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        folders = sorted(self.work.glob("state-*"))
        if not folders:
            return
        folder = folders[-1]
        state = read_json(folder / "state.json")
        if state["plan"] != self._plan():
            changed = [key for key, value in self._plan().items() if state["plan"].get(key) != value]
            raise FormatError(
                f"{self.work.parent} was begun with another {', '.join(changed)}; remove the folder to start afresh"
            )
        for name, digest in state["files"].items():
            path = (self.work if name.startswith("text-") else folder) / name
            if not path.is_file() or sha256(path) != digest:
                raise FormatError(f"{path} is missing or damaged; remove {self.work.parent} to start afresh")
        for sae_id, statistics in self.statistics.items():
            try:
                statistics.load(load_file(folder / f"{sae_id}.safetensors"))
            except (SafetensorError, KeyError) as error:
                raise FormatError(f"{folder / sae_id}.safetensors cannot be read ({error})") from None
        self.chunks, self.read, self.left_out = state["chunks"], state["read"], state["left_out"]
        stream.restore(state["stream"])
        logger.info("going on after %d tokens of %d", self.read, self.tokens)


def _context(conversations: Sequence[Conversation], token_R: Tensor, conversation_R: Tensor) -> Tensor:
    """One-hot split and role of each row: float32 [R, len(SPLITS) + len(ROLES)]."""
    split_C = torch.tensor([SPLITS.index(conversation.split) for conversation in conversations])
    role_T = torch.from_numpy(np.concatenate([conversation.roles for conversation in conversations]).astype(np.int64))
    columns_RF = torch.zeros(len(token_R), CONTEXT_COLUMNS, dtype=torch.float32)
    columns_RF.scatter_(1, split_C[conversation_R].unsqueeze(1), 1.0)
    return columns_RF.scatter_(1, len(SPLITS) + role_T[token_R].unsqueeze(1), 1.0)


def _experts(
    passes: Sequence[Tensor],
    batches: Sequence[Sequence[int]],
    lengths: Sequence[int],
    starts: Any,
    router: nn.Module,
) -> Tensor:
    """float32 [T, E]: 1 where the router chose the expert; `batches` are the members of each pass, as harvest cuts."""
    chosen_TE = torch.zeros(int(starts[-1]), len(router.weight), dtype=torch.float32)  # type: ignore[arg-type]
    for members, indices in zip(batches, passes, strict=True):
        indices_CTk = indices.view(len(members), -1, indices.shape[-1])
        for c, member in enumerate(members):
            length = lengths[member]
            chosen_TE[starts[member] : starts[member] + length].scatter_(1, indices_CTk[c, :length], 1.0)
    return chosen_TE


def _fingerprint(weight: Tensor) -> str:
    values = weight.detach().flatten()[:: max(1, weight.numel() // 1024)]
    return json.dumps([round(float(values.double().sum()), 9), round(float(values.double().abs().max()), 9)])
