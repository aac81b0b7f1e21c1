"""Forward passes: the residual stream at hook points, and what turns it into logits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwenscope.errors import ModelError

if TYPE_CHECKING:
    from qwenscope.lm.load import LanguageModel


class RowSource(Protocol):
    """What harvest and training ask of a language model: a `LanguageModel`, or an engine of another kind."""

    tokenizer: Tokenizer
    layer_kinds: tuple[str | None, ...]
    hidden_dim: int
    device: torch.device
    dtype: torch.dtype
    name: str
    revision: str | None

    def streams(self, input_ids_CT: Tensor, lengths_C: Sequence[int], layers: Sequence[int]) -> dict[int, Tensor]:
        """Residual stream after each of `layers`, of right-padded conversations of `lengths_C` tokens.

        Returns:
            {layer: x_CTD} in `dtype`, on `device`; what stands at the padding means nothing.
        """

    def digest(self, last_layer: int) -> str:
        """Hex digits that tell models whose rows differ apart: weights up to `last_layer`, and who computes."""


_CATCHING = threading.RLock()  # a pass's hooks are the module's, and would catch another thread's pass too


class _StopForward(Exception):  # noqa: N818 - it is no error
    """Leaves the model's forward once the last hooked layer has spoken; never escapes this module."""


def layer_output(output: Any) -> Tensor:
    """The residual stream in a decoder layer's output: the tensor itself, or the first of a tuple in some families."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def residual_streams(lm: LanguageModel, input_ids_CT: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Residual stream after each of `layers`, from one pass that stops after the highest of them.

    Rows are right-padded conversations. No attention mask is passed: both attention and Gated DeltaNet look back only,
    so padding cannot reach the tokens before it, and its own outputs are for the caller to drop. Values are
    bit-identical to what the full model computes for the same rows.

    Args:
        lm: The language model; its layers must reach `max(layers)`.
        input_ids_CT: int64 [C, T] token ids.
        layers: Layer indices, any order.

    Returns:
        {layer: x_CTD} in the model's dtype, on `lm.device`.
    """
    caught: dict[int, Tensor] = {}
    last = max(layers)
    handles: list[RemovableHandle] = []
    with _CATCHING:
        try:
            for layer in set(layers):
                handles.append(_built(lm, layer).register_forward_hook(_catch(caught, layer, lm.device, layer == last)))
            lm.decoder(input_ids=input_ids_CT.to(lm.device), use_cache=False)
        except _StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
    return {layer: caught[layer] for layer in layers}


@torch.no_grad()
def final_hidden(lm: LanguageModel, input_ids_CT: Tensor) -> Tensor:
    """Residual stream after all layers and the final norm, ready for the LM head: h_CTD. Interventions apply.

    Raises:
        ModelError: the model was loaded truncated.
    """
    _refuse_truncated(lm)
    output = lm.decoder(input_ids=input_ids_CT.to(lm.device), use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def final_norm(lm: LanguageModel) -> nn.Module:
    """The norm between the last layer and the LM head.

    Raises:
        ModelError: the family keeps it under a name we do not know.
    """
    decoder = lm.decoder
    for name in ("norm", "final_layer_norm", "ln_f", "final_layernorm"):
        if isinstance(norm := getattr(decoder, name, None), nn.Module):
            return norm
    raise ModelError(f"{type(decoder).__name__} has no final norm under a known name")


def unembedding(lm: LanguageModel) -> Tensor:
    """Weight of the LM head [V, D], in the model's dtype; a view, not a copy.

    Raises:
        ModelError: the model was loaded without LM head.
    """
    weight: Tensor = _head(lm).weight
    return weight


def logits(lm: LanguageModel, h_XD: Tensor) -> Tensor:
    """LM head on rows of `final_hidden`: [..., D] -> float32 [..., V].

    V is 248,320 for the published model, 1 MB per row: pass a chunk of rows at a time.

    Raises:
        ModelError: the model was loaded truncated or without LM head.
    """
    _refuse_truncated(lm)
    scores: Tensor = _head(lm)(h_XD).float()
    cap = getattr(lm.model.config, "final_logit_softcapping", None)  # Gemma
    return scores if cap is None else torch.tanh(scores / cap) * cap


def _head(lm: LanguageModel) -> Any:
    head = lm.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise ModelError(f"{lm.name} was loaded without its LM head; load it with lm_head=True")
    return head


def _catch(
    caught: dict[int, Tensor], layer: int, device: torch.device, stop: bool
) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        caught[layer] = layer_output(output).to(device)
        if stop:
            raise _StopForward

    return hook


def _built(lm: LanguageModel, layer: int) -> nn.Module:
    if not 0 <= layer < len(lm.layers):
        raise ModelError(f"layer {layer} of {lm.name} was not built; layers 0 to {len(lm.layers) - 1} were")
    return lm.layers[layer]


def _refuse_truncated(lm: LanguageModel) -> None:
    if lm.truncated:
        raise ModelError(f"{lm.name} was loaded up to layer {len(lm.layers) - 1}; logits need all layers")
