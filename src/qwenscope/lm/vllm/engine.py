"""vLLM as the source of rows (`lm.backend: vllm`), through its own interface for hidden states.

One batch of a harvest is one call and, as long as the cache holds it, one step of the engine with its conversations
whole: no prefix caching, no chunks, no compilation. So what is computed together is a function of the batch alone, as
with transformers. vLLM counts a layer's output from one (its id 7 is our layer 6) and computes all layers.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwenscope.errors import ModelError, RecipeError, ResourceError
from qwenscope.lm.load import layer_kinds, load_config, load_tokenizer, pick_dtype, resolve
from qwenscope.lm.model import config_number
from qwenscope.lm.placement import pick_devices
from qwenscope.lm.sites import Site
from qwenscope.recipe import LMRecipe

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # rows stay in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainers' threads run in this process too
}
_FAILURES = (ValueError, RuntimeError, AssertionError, LookupError, AttributeError, TypeError, OSError, ImportError)
_SEQUENCES = 256  # conversations in one step
_OPTIONS: dict[str, Any] = {
    "language_model_only": True,  # no vision tower
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": False,
    "async_scheduling": False,
    "max_num_seqs": _SEQUENCES,
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
}
_SPARE_CACHE = 2 << 30  # bytes for attention, recurrent states, and blocks half used, beside the rows of two batches


def vllm_version() -> str:
    """Name and version of the installed engine; it comes in packages of several names.

    Raises:
        ModelError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ModelError("lm.backend is vllm, which is not installed: pip install vllm")
    for package in packages_distributions().get("vllm", ()):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "vllm"


def check_vllm(lm: LMRecipe, max_length: int, sites: Sequence[Site]) -> str:
    """Refuse, before anything is loaded, what vLLM cannot do here -> its name and version.

    Raises:
        ModelError: vLLM is missing, or built for another device than `lm.device`.
        RecipeError: `max_length` leaves no room for the one token that vLLM insists on generating, or a site is not the
            residual stream.
    """
    if inner := [site.name for site in sites if site.part is not None]:
        raise RecipeError(f"lm.backend vllm gives the residual stream alone, not {inner[0]}; set it to transformers")
    who = vllm_version()
    longest = config_number(load_config(lm), "max_position_embeddings", default=max_length + 1)
    if max_length >= longest:
        raise RecipeError(
            f"corpus.max_length {max_length} leaves vLLM no room for a token behind it: the model has {longest} "
            f"positions; lower it to {longest - 1}"
        )
    os.environ.update(_ENVIRONMENT)
    with _vllm_errors(lm.model):
        from vllm.platforms import current_platform
    built_for, device = current_platform.device_type, pick_devices(lm.device)[0].type
    if built_for != device:
        raise ModelError(
            f"lm.device is {lm.device}, here {device}, and {who} is built for {built_for or 'another device'}"
            "; set lm.device to that, or install the other build"
        )
    return who


class VllmModel:
    """A `RowSource` whose rows vLLM computes, in this process; `close` it to have its memory back."""

    def __init__(
        self, lm: LMRecipe, sites: Sequence[Site], *, max_length: int, batch_tokens: int, weights: str
    ) -> None:
        """
        Args:
            lm: Which model, revision, dtype and device.
            sites: The hooked sites; `streams` gives these and no others.
            max_length: Longest conversation.
            batch_tokens: Token budget of one batch.
            weights: Digest of the model's weights, as transformers read them.

        Raises:
            ModelError, RecipeError: as `check_vllm`; or vLLM cannot run this model.
            ResourceError: not enough memory.
        """
        self._digest = f"{weights} by {check_vllm(lm, max_length, sites)}"
        config = load_config(lm)
        folder, self.revision = resolve(lm)
        self.tokenizer = load_tokenizer(lm)
        self.layer_kinds = layer_kinds(config)
        self.hidden_dim: int = config.hidden_size
        self.device = pick_devices(lm.device)[0]
        self.dtype = pick_dtype(lm, config)
        self.name = lm.model
        self._sites = sorted(set(sites))
        row_bytes = len(self._sites) * self.hidden_dim * self.dtype.itemsize
        with _vllm_errors(lm.model):
            import vllm

            from qwenscope.lm.vllm.connector import RowsConnector

            self._connector = RowsConnector
            self._sampling = vllm.SamplingParams(max_tokens=1, temperature=0, detokenize=False)
            self._engine: Any = vllm.LLM(
                model=lm.model if self.revision else str(folder),
                revision=self.revision,
                dtype=str(self.dtype).removeprefix("torch."),
                max_model_len=max_length + 1,
                max_num_batched_tokens=batch_tokens + 2 * _SEQUENCES,  # beside the tokens, room for speculated ones
                kv_cache_memory_bytes=2 * batch_tokens * row_bytes + _SPARE_CACHE,
                speculative_config=_extraction([site.layer for site in self._sites]),
                kv_transfer_config={
                    "kv_connector": RowsConnector.__name__,
                    "kv_connector_module_path": RowsConnector.__module__,
                    "kv_role": "kv_producer",
                },
                **_OPTIONS,
            )

    def streams(self, input_ids_CT: Tensor, lengths_C: Sequence[int], sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Residual stream at each of `sites`: {site: x_CTD}, zero at the padding.

        Raises:
            ModelError: vLLM fails on it.
        """
        rows = zip(input_ids_CT.tolist(), lengths_C, strict=True)
        prompts = [{"prompt_token_ids": ids_T[:length]} for ids_T, length in rows]
        with _vllm_errors(self.name):
            outputs = self._engine.generate(prompts, self._sampling, use_tqdm=False)
        taken = [self._connector.take(output.kv_transfer_params["request"]) for output in outputs]
        x_CTLD = pad_sequence(taken, batch_first=True)
        return {site: x_CTLD[:, :, self._sites.index(site)] for site in sites}

    def digest(self, last_layer: int) -> str:
        """Of the weights as transformers read them, and of who computes."""
        return self._digest

    def close(self) -> None:
        """End the engine."""
        self._engine.llm_engine.engine_core.shutdown()
        del self._engine
        self._connector.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _extraction(layers: Sequence[int]) -> dict[str, Any]:
    ids = [layer + 1 for layer in layers]
    return {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}},
    }


@contextmanager
def _vllm_errors(name: str) -> Iterator[None]:
    """Turn what vLLM raises, assertions included, into one line."""
    try:
        yield
    except ModelError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(f"not enough memory for {name} in vLLM: {_line(error)}") from error
    except _FAILURES as error:
        raise ModelError(f"vLLM cannot run {name}: {_line(error)}; set lm.backend to transformers") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
