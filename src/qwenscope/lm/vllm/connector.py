"""Rows out of vLLM's cache, in memory: what vLLM itself imports by name (`kv_connector_module_path`), and nobody else.

With the method `extract_hidden_states`, vLLM keeps the residual stream of a request's tokens in blocks of its cache.
Its own connector copies them to one file per request (36.9 KB per token at nine hook points), with CUDA calls that a
CPU lacks, and in the step that follows, which in one process may never come. This one reads the blocks when the request
ends. It needs engine and caller in one process (VLLM_ENABLE_V1_MULTIPROCESSING=0) and one device.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)


class RowsConnector(ExampleHiddenStatesConnector):  # type: ignore[misc] # vLLM may not be installed
    """Keeps each finished request's rows until `take`."""

    cache: ClassVar[Tensor | None] = None
    rows: ClassVar[dict[str, Tensor]] = {}

    @classmethod
    def take(cls, request: str) -> Tensor:
        """[T, hook points, D] of a request, once, by what its output says under kv_transfer_params["request"]."""
        return cls.rows.pop(request)

    @classmethod
    def forget(cls) -> None:
        """Let go of the engine's memory."""
        cls.cache = None
        cls.rows.clear()

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Worker's side: remember the cache."""
        super().register_kv_caches(kv_caches)
        type(self).cache = self._kv_cache

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Scheduler's side, after the step and before the blocks are used again: copy the prompt's rows."""
        assert self.cache is not None
        block = torch.arange(self._block_size)
        slots = (torch.tensor(block_ids)[:, None] * self._block_size + block).flatten().to(self.cache.device)
        self.rows[request.request_id] = extract_from_kv_cache(self.cache, slots, request.num_prompt_tokens)
        return False, {"request": request.request_id}

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Nothing to tell the worker."""
        return KVConnectorMetadata()

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, None]:
        """No request's blocks are held back."""
        return None, None
