"""All hooks on a language model: capture rows, replace them, go on from replaced ones, and watch routers.

Capture takes the place of `output_hidden_states` (whose last entry has passed the final norm), and `intervene` is the
one seam of splicing, ablation and steering. Both work at any site.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from qwenscope.errors import ModelError
from qwenscope.lm.sites import KINDS, NORMS, HasLayers, Norm, Site, Where, ends_layer, last_layer, module_at

Edit = Callable[[Tensor], Tensor]
See = Callable[[Tensor], Tensor | None]
"""What is done with the rows x_CTD at a site; rows that it returns take their place."""
Hook = Callable[[nn.Module, Any, Any], Any]
W = TypeVar("W", bound=Where)

_CATCHING = threading.RLock()  # a pass's hooks are the module's, and would catch another thread's pass too


class _StopForward(Exception):  # noqa: N818 - it is no error
    """Leaves the model's forward once all sites have spoken; never escapes this module."""


@contextmanager
def capture(lm: HasLayers, sites: Iterable[Site], *, stop: bool = False) -> Iterator[dict[Site, Tensor]]:
    """Collect the rows at `sites` of a pass inside the block: {site: x_CTD} on `lm.device`.

    Args:
        lm: built up to the last of them.
        sites: in any order.
        stop: end that pass, and the block, at the last of them: no module behind it runs.

    Raises:
        ModelError: a site that is not there, did not run, or ran twice, or whose output is not rows.
    """
    rows: dict[Site, Tensor] = {}
    wanted, reached = set(sites), _StopForward()

    def catch(site: Site) -> See:
        def see(x_CTD: Tensor) -> None:
            if site in rows:
                raise ModelError(
                    f"{site} of {lm.name} ran twice in a pass: it reads long texts in parts; take shorter ones"
                )
            rows[site] = x_CTD.to(lm.device, copy=True)  # some models go on to write into it
            if stop and len(rows) == len(wanted):
                raise reached

        return see

    with _CATCHING, _seeing(lm, {site: catch(site) for site in wanted}):
        try:
            yield rows
        except _StopForward as signal:
            if signal is not reached:
                raise
        finally:
            reached.__traceback__ = None  # it holds the callers' frames, and so the rows of earlier windows
    if silent := wanted - rows.keys():
        raise ModelError(f"{min(silent)} of {lm.name} did not run; was the model compiled, or the layer skipped?")


@contextmanager
def intervene(lm: HasLayers, edits: Mapping[W, Edit]) -> Iterator[None]:
    """Replace the rows at each site of `edits` by what its edit returns, while the block lasts.

    An edit maps x_CTD, on `lm.device`, to a tensor of the same shape (cast back to the model's dtype); in `generate` it
    sees the whole prompt once and then one position per step. Blocks nest: an inner edit of the same site receives the
    outer one's result. Hooks are removed however the block ends.

    Raises:
        ModelError: a site that is not there, an edit that changes the shape, or one that no pass in the block called
            (a compiled model ignores hooks that were set later).
    """
    placed = {Site.of(where): edit for where, edit in edits.items()}
    idle = set(placed)

    def replace(site: Site, edit: Edit) -> See:
        def see(x_CTD: Tensor) -> Tensor:
            idle.discard(site)
            edited_CTD = edit(x_CTD.to(lm.device))
            if edited_CTD.shape != x_CTD.shape:
                raise ModelError(f"the edit at {site} made {tuple(edited_CTD.shape)} of {tuple(x_CTD.shape)}")
            return edited_CTD.to(dtype=x_CTD.dtype, device=x_CTD.device)

        return see

    with _seeing(lm, {site: replace(site, edit) for site, edit in placed.items()}):
        yield
    if idle:
        raise ModelError(
            f"the edit at {min(idle)} of {lm.name} was never called; no pass reached it, or the model is compiled and "
            "ignores hooks: steer and splice the model that torch.compile was given"
        )


@dataclass
class Recording:
    """What a pass leaves behind so that others can go on from the middle of it."""

    rows: dict[Site, Tensor]
    """{site: x_CTD}."""
    outputs: dict[int, Any]
    """{layer: what it returned} of the layers that a restart skips; the rows in it only where one begins behind it."""
    linked: bool = False
    """Layers hand one another more than they return (keys and values in a dict, in Gemma 4): none can be skipped."""


@contextmanager
def record(lm: HasLayers, sites: Iterable[Site]) -> Iterator[Recording]:
    """Like `capture`, of a whole pass from which `restart` can go on at each of `sites`."""
    wanted = set(sites)
    starts = {site.layer - 1 for site in wanted if not ends_layer(lm, site)}
    outputs: dict[int, Any] = {}

    def keep(layer: int) -> Hook:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[layer] = _with_rows(output, _first(output).clone() if layer in starts else None)

        return hook

    def look(_module: nn.Module, _inputs: Any, kwargs: dict[str, Any]) -> None:
        recording.linked = any(isinstance(value, Mapping) for value in kwargs.values())

    depth = last_layer(list(wanted)) + 1 if wanted else 0
    with capture(lm, wanted) as rows, _hooked((lm.layers[layer], keep(layer)) for layer in range(depth)):
        recording = Recording(rows, outputs)
        handle = lm.layers[0].register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield recording
        finally:
            handle.remove()


@contextmanager
def restart(lm: HasLayers, recording: Recording, site: Site, x_CTD: Tensor) -> Iterator[None]:
    """While the block lasts, a forward pass goes on from `x_CTD` at `site` and computes as little before it as it can.

    No layer up to the residual stream of `site`, or before the layer that a site lies in, is computed. The passes
    inside must be of the batch that was recorded. What follows is bit-identical to a whole pass with that edit.
    """
    ends = ends_layer(lm, site) and not recording.linked
    depth = 0 if recording.linked else site.layer + ends
    stream: Any = None
    if depth:
        stream = (x_CTD if ends else _first(recording.outputs[depth - 1])).clone()
    with ExitStack() as stack:
        for layer in range(depth):
            stack.enter_context(_returning(lm.layers[layer], _with_rows(recording.outputs[layer], stream)))
        if not ends:
            stack.enter_context(intervene(lm, {site: lambda _: x_CTD.clone()}))
        yield


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """While the block lasts, `module` computes nothing and returns `output`."""
    own = module.__dict__.get("forward")
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def find_routers(lm: HasLayers) -> dict[int, nn.Module]:
    """{layer: router} of the layers that choose `top_k` of several experts; empty for dense models."""
    routers = {}
    for layer, block in enumerate(lm.layers):
        for module in block.modules():
            weight = getattr(module, "weight", None)
            if isinstance(getattr(module, "top_k", None), int) and isinstance(weight, Tensor) and weight.ndim == 2:
                routers[layer] = module
    return routers


@contextmanager
def watch_routers(routers: Mapping[int, nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call see(layer, logits [C * T, E]) whenever a router of {layer: router} runs inside the block."""

    def watch(layer: int) -> Hook:
        def hook(router: nn.Module, inputs: Any, _output: Any) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            see(layer, nn.functional.linear(rows, router.weight))  # type: ignore[arg-type]

        return hook

    with _hooked((router, watch(layer)) for layer, router in routers.items()):
        yield


@contextmanager
def _seeing(lm: HasLayers, seen: Mapping[Site, See]) -> Iterator[None]:
    """While the block lasts, the rows at each site pass through its function."""
    with ExitStack() as stack:
        for site, see in seen.items():
            module = module_at(lm, site)
            if site.is_difference:
                raise ModelError(
                    f"{site} is a difference of two models' rows: no model has it to splice, steer or watch"
                )
            if site.norm is not None:
                see = _normalised(NORMS[site.norm], see)
            if KINDS[site.part].entering:
                handle = module.register_forward_pre_hook(_on_entry(site, see), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_on_return(site, see))
            stack.callback(handle.remove)
        yield


def _normalised(norm: Norm, see: See) -> See:
    def seen(x_CTD: Tensor) -> Tensor | None:
        y_CTD, back = norm(x_CTD)
        rows = see(y_CTD)
        return None if rows is None else back(rows)

    return seen


def _on_return(site: Site, see: See) -> Hook:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        rows = see(_rows(site, output))
        return None if rows is None else _with_rows(output, rows)

    return hook


def _on_entry(site: Site, see: See) -> Hook:
    """Of a module that takes its rows first, by position or by name."""

    def hook(_module: nn.Module, inputs: Any, named: Any) -> Any:
        x_CTD = _rows(site, inputs or list(named.values()))
        rows = see(x_CTD)
        if rows is None:
            return None
        if KINDS[site.part].shared:
            x_CTD.copy_(rows)
            return None
        if inputs:
            return _with_rows(inputs, rows), named
        return inputs, {**named, next(iter(named)): rows}

    return hook


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _first(output: Any) -> Any:
    """The rows in a module's inputs or output: the output itself, or the first of several in some families."""
    return output[0] if isinstance(output, tuple | list) else output


def _with_rows(output: Any, rows: Any) -> Any:
    """A module's output with other rows; whatever else it returned is kept."""
    return type(output)((rows, *output[1:])) if isinstance(output, tuple | list) else rows


def _rows(site: Site, output: Any) -> Tensor:
    rows: Tensor = _first(output)
    if rows.ndim != 3:
        raise ModelError(
            f"{site} gives a tensor of shape {tuple(rows.shape)}, not [conversations, positions, width]; hook "
            "another part of the layer"
        )
    return rows
