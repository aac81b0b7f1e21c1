"""The one intervention seam: splicing, ablation and steering edit the residual stream after a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwenscope.errors import ModelError
from qwenscope.lm.forward import layer_output
from qwenscope.lm.load import LanguageModel

Edit = Callable[[Tensor], Tensor]


@contextmanager
def intervene(lm: LanguageModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Replace the residual stream after each layer of `edits` by what its edit returns, while the block lasts.

    An edit maps x_CTD, on `lm.device`, to a tensor of the same shape (cast back to the model's dtype); in `generate` it
    sees the whole prompt once and then one position per step. Blocks nest: an inner edit of the same layer receives the
    outer one's result. Hooks are removed however the block ends.

    Raises:
        ModelError: a layer that was not built, or an edit that changes the shape.
    """
    with ExitStack() as stack:
        for layer, edit in edits.items():
            if not 0 <= layer < len(lm.layers):
                raise ModelError(f"layer {layer} of {lm.name} was not built; layers 0 to {len(lm.layers) - 1} were")
            handle = lm.layers[layer].register_forward_hook(_edited(layer, edit, lm.device))
            stack.callback(handle.remove)
        yield


def _edited(layer: int, edit: Edit, device: torch.device) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        x_CTD = layer_output(output)
        edited_CTD = edit(x_CTD.to(device))
        if edited_CTD.shape != x_CTD.shape:
            raise ModelError(f"the edit at layer {layer} made {tuple(edited_CTD.shape)} of {tuple(x_CTD.shape)}")
        edited_CTD = edited_CTD.to(dtype=x_CTD.dtype, device=x_CTD.device)
        return (edited_CTD, *output[1:]) if isinstance(output, tuple) else edited_CTD

    return hook
