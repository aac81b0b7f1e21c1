"""The device's part of all SAEs' steps as one CUDA graph: nine times sixty small operators cost the host nothing then.

A graph holds addresses: rows are copied to where they were at its capture, results lie where they lay then. Lists of
dead latents change shapes, so that a step with new ones runs as it is (which also compiles its kernels) and the next
one is captured. Whatever keeps it from being captured is logged once; all steps run as they are from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from qwenscope.errors import reason
from qwenscope.sae.ops import Panels
from qwenscope.training.metrics import StepMetrics
from qwenscope.training.trainer import SAETrainer

logger = logging.getLogger(__name__)

Results = dict[str, tuple[dict[str, Tensor], Panels | None, Tensor]]
"""{SAE id: what `device_step` returned}."""


class GraphedSteps:
    """One step of every trainer, by a graph where that is possible.

    Args:
        trainers: by SAE id.
    """

    def __init__(self, trainers: Mapping[str, SAETrainer]) -> None:
        self._trainers = trainers
        self._possible = bool(trainers) and all(trainer.capturable for trainer in trainers.values())
        self._graph: torch.cuda.CUDAGraph | None = None
        self._current = False  # whether the graph is of the lists of dead latents as they are
        self._named: dict[str, Tensor | None] | None = None  # those lists
        self._rows: dict[str, Tensor] = {}  # what the graph reads
        self._results: Results = {}

    def __call__(self, rows: Mapping[str, Tensor]) -> dict[str, StepMetrics] | None:
        """A step on {SAE id: x_BD}; None, and nothing done, where each trainer is to make its own."""
        if not self._possible or any(rows[sae_id].shape != x_BD.shape for sae_id, x_BD in self._rows.items()):
            return None  # the last batch has another shape, say
        rates = {sae_id: trainer.before(len(rows[sae_id])) for sae_id, trainer in self._trainers.items()}
        named = {sae_id: trainer.named for sae_id, trainer in self._trainers.items()}
        if self._named is None or any(names is not self._named[sae_id] for sae_id, names in named.items()):
            self._named, self._current = named, False
            results = self._as_they_are(rows)
        else:
            if not self._current:
                self._capture(rows)
            results = self._replay(self._graph, rows) if self._graph else self._as_they_are(rows)
        return {sae_id: self._trainers[sae_id].after(rates[sae_id], *result) for sae_id, result in results.items()}

    def _capture(self, rows: Mapping[str, Tensor]) -> None:
        """Record a step on copies of `rows`; nothing of it runs."""
        self._results = {}  # the new graph may have its memory
        try:
            if not self._rows:
                copies = {id(x_BD): torch.empty_like(x_BD) for x_BD in rows.values()}  # SAEs at one site share rows
                self._rows = {sae_id: copies[id(x_BD)] for sae_id, x_BD in rows.items()}
            self._graph, self._results = record(lambda: self._as_they_are(self._rows), self._graph)
            self._current = True
        except RuntimeError as error:  # memory that is missing raises one, too
            self._possible, self._graph, self._rows = False, None, {}
            logger.warning("SAE steps run without a CUDA graph: %s", reason(error))

    def _replay(self, graph: torch.cuda.CUDAGraph, rows: Mapping[str, Tensor]) -> Results:
        for own_BD, x_BD in {id(own): (own, rows[sae_id]) for sae_id, own in self._rows.items()}.values():
            own_BD.copy_(x_BD)
        graph.replay()
        return {  # metrics outlive the step, the next of which writes to the same places
            sae_id: ({name: value.clone() for name, value in metrics.items()}, g, loss_B)
            for sae_id, (metrics, g, loss_B) in self._results.items()
        }

    @torch.no_grad()
    def _as_they_are(self, rows: Mapping[str, Tensor]) -> Results:
        return {sae_id: trainer.device_step(rows[sae_id]) for sae_id, trainer in self._trainers.items()}


def record(work: Callable[[], Results], last: torch.cuda.CUDAGraph | None) -> tuple[torch.cuda.CUDAGraph, Results]:
    """A graph of what `work` asks of the device, which does not do it yet, and what it returned.

    `torch.cuda.graph` would empty the allocator's cache each time, and let the harvest's thread spoil the capture.

    Args:
        last: the graph that this one takes the place, and the memory, of.
    """
    graph, stream = torch.cuda.CUDAGraph(), _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=None if last is None else last.pool(), capture_error_mode="thread_local")
        try:
            results = work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, results


@cache
def _side_stream() -> torch.cuda.Stream:
    """Where graphs are captured, always the same: cuBLAS keeps memory for each stream that it has seen."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
