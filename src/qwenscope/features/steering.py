"""Steer a language model along SAE latents or any direction: a context manager around any forward pass or `generate`.

    with steer(model, Steering(site="layers.23", sae=sae, latent=7, strength=2.0, unit=12.5)):
        model.generate(...)

At each chosen position the rows x at a site (the residual stream after layer 23, say) become x + c(x) d, where d is the
latent's unit decoder direction:

    add     c = strength * unit
    clamp   c = strength * unit - a(x)      the latent's activation a becomes strength * unit
    ablate  c = -a(x)

`unit` is the latent's largest activation (an index knows it), or "norm": the norm of each row itself. Several
steerings at one site all look at the unsteered x and add up.

Legend: C rows of a batch, T positions, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import InitVar, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwenscope.errors import FormatError, ModelError
from qwenscope.lm.hooks import intervene
from qwenscope.lm.model import LanguageModel, as_language_model
from qwenscope.lm.sites import Site
from qwenscope.lm.sites import Where as At
from qwenscope.sae.sae import SAE
from qwenscope.seeds import generator

Mode = Literal["add", "clamp", "ablate"]
Where = Literal["all", "prefill", "decode"] | Sequence[int] | slice
_KEPT = ("state", "rnn_state", "cache_params", "cache", "past_key_values", "mems")  # what decoders take a cache as


@dataclass(frozen=True)
class Steering:
    """One push. Either `sae` and `latent`, or `along` alone with mode add.

    Raises:
        FormatError: no site or two, no direction, a latent that does not exist, a mode without latent, a strength that
            is no finite number, or an unknown word.
        ModelError: the site's name is none.
    """

    site: At | None = None
    """Where; a name or a layer's number becomes a `Site`."""
    strength: float = 1.0
    sae: SAE | None = None
    latent: int | None = None
    mode: Mode = "add"
    unit: float | Literal["norm"] = "norm"
    where: Where = "all"
    """all positions; prefill: those of the pass that finds an empty cache; decode: all later ones; or positions of the
    (padded) rows by number, slice(9, None) those from 9 on. Without a cache every pass is a prefill."""
    along: Tensor | None = None
    """[D], any length: push along this direction; with a latent, by the amount that the latent would be pushed."""
    layer: InitVar[int | None] = None
    """Instead of a site: the residual stream after this layer."""

    def __post_init__(self, layer: int | None) -> None:
        where = self.site if layer is None else layer
        if where is None or None not in (self.site, layer):
            raise FormatError("steering needs a site, such as layers.23 or layers.23.mlp, or a layer, and not both")
        object.__setattr__(self, "site", Site.of(where))
        if not math.isfinite(self.strength):
            raise FormatError(f"a strength is a finite number, not {self.strength}")
        if self.mode not in ("add", "clamp", "ablate"):
            raise FormatError(f"steering mode is add, clamp or ablate, not {self.mode!r}")
        if isinstance(self.where, str) and self.where not in ("all", "prefill", "decode"):
            raise FormatError(f"steering where is all, prefill, decode or positions, not {self.where!r}")
        if self.sae is None or self.latent is None:
            if self.along is None or self.mode != "add":
                raise FormatError("steering needs an SAE and a latent, or a direction with mode add")
        elif not 0 <= self.latent < self.sae.dict_size:
            raise FormatError(f"there is no latent {self.latent}; the SAE has 0 to {self.sae.dict_size - 1}")
        elif "target" in self.sae.config and self.mode != "add":
            raise FormatError(
                f"a transcoder's latent is only added where it predicts; {self.mode} would need its input"
            )

    @property
    def direction_D(self) -> Tensor:  # noqa: N802
        """Unit direction, float32 [D]."""
        if self.along is not None:
            return nn.functional.normalize(self.along.detach().float(), dim=0)
        assert self.sae is not None
        return nn.functional.normalize(self.sae.decoder.weight.detach()[:, self.latent].float(), dim=0)

    def push(self, x_CTD: Tensor) -> Tensor:
        """What is added to the rows at steered positions: float32 [C, T, D]."""
        x_CTD = x_CTD.float()
        unit_CT = (
            x_CTD.norm(dim=-1) if self.unit == "norm" else torch.full(x_CTD.shape[:-1], self.unit, dtype=torch.float32)
        )
        amount_CT = self.strength * unit_CT.to(x_CTD.device)
        if self.mode != "add":
            assert self.sae is not None
            codes = self.sae.encode(x_CTD.to(self.sae.pre_bias.device))
            norm = self.sae.decoder.weight.detach()[:, self.latent].norm()  # not 1 in some SAEs of others
            active_CT = ((codes.values * (codes.indices == self.latent)).sum(-1) * norm).to(x_CTD.device)
            amount_CT = (amount_CT if self.mode == "clamp" else 0.0) - active_CT
        return amount_CT.unsqueeze(-1) * self.direction_D.to(x_CTD.device)

    def mask(self, start: int, length: int) -> Tensor | None:
        """bool [T] of steered positions among start .. start + length - 1; None for all."""
        if self.where == "all" or self.where == ("prefill" if start == 0 else "decode"):
            return None
        if isinstance(self.where, str):
            return torch.zeros(length, dtype=torch.bool)
        where = range(start + length)[self.where] if isinstance(self.where, slice) else self.where
        return torch.isin(torch.arange(start, start + length), torch.tensor(list(where), dtype=torch.int64))


@contextmanager
def steer(model: PreTrainedModel | LanguageModel, *steerings: Steering) -> Iterator[None]:
    """Steer every pass of `model` while the block lasts, cached and batched ones alike.

    Raises:
        ModelError: a site that the model does not have; FormatError: a direction that does not fit its width.
    """
    with steer_rows(as_language_model(model), [(None, steerings)]):
        yield


@contextmanager
def steer_rows(lm: LanguageModel, by_row: Iterable[tuple[int | None, Sequence[Steering]]]) -> Iterator[None]:
    """As `steer`, each row of the batch by its own steerings; those of row None steer every row."""
    seen = Seen()
    by_site: dict[Site, list[tuple[int | None, Steering]]] = {}
    for row, steerings in by_row:
        for steering in steerings:
            site = Site.of(steering.site)  # type: ignore[arg-type] # it is one by now
            if len(steering.direction_D) != (width := lm.width(site)):
                raise FormatError(
                    f"a direction of {len(steering.direction_D)} cannot steer {lm.name}, {width} wide there"
                )
            by_site.setdefault(site, []).append((row, steering))
    by_phase = any(steering.where != "all" for group in by_site.values() for _, steering in group)
    edits = {site: _edit(group, seen) for site, group in by_site.items()}
    with seen.watching(lm) if by_phase else nullcontext(), intervene(lm, edits):
        yield


class Seen:
    """How many positions the cache held before the current pass: a pre-hook of the decoder.

    The cache is known by what it can do, not by the name it is passed under, which differs between versions.
    """

    positions = 0

    @contextmanager
    def watching(self, lm: LanguageModel) -> Iterator[None]:
        """Know it while the block lasts."""
        handle = lm.decoder.register_forward_pre_hook(self, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def __call__(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> None:
        for cache in (*inputs, *kwargs.values()):
            if hasattr(cache, "get_seq_length"):
                with suppress(ValueError):  # a cache of states alone does not count what it read
                    self.positions = int(cache.get_seq_length())
                    return
        if held := [name for name in _KEPT if kwargs.get(name) is not None]:
            raise ModelError(
                f"{type(module).__name__} keeps what it has read in {held[0]}, which does not say how much that is; "
                "steer all positions (where all)"
            )
        self.positions = 0


def _edit(group: Sequence[tuple[int | None, Steering]], seen: Seen) -> Callable[[Tensor], Tensor]:
    def edit(x_CTD: Tensor) -> Tensor:
        edited_CTD = x_CTD.float()
        for row, steering in group:
            mask_T = steering.mask(seen.positions, x_CTD.shape[1])
            if mask_T is not None and not bool(mask_T.any()):
                continue
            rows = slice(None) if row is None else slice(row, row + 1)
            with torch.no_grad():  # gradients pass the site as if the push were a constant
                push_CTD = steering.push(x_CTD[rows])
            if mask_T is not None:
                push_CTD = push_CTD * mask_T.to(x_CTD.device).view(1, -1, 1)
            if row is not None:
                push_CTD = nn.functional.pad(push_CTD, (0, 0, 0, 0, row, len(x_CTD) - row - 1))
            edited_CTD = edited_CTD + push_CTD
        return edited_CTD

    return edit


def controls(
    steerings: Sequence[Steering], seed: int = 0, alive: Sequence[Sequence[int]] | None = None
) -> dict[str, list[Steering]]:
    """What honest steering is compared with, by name: without any push, negative strength, another latent at random,
    a random direction of the same norm. A steering without a latent has no other latent; ablation has no sign.

    Args:
        steerings: the real ones.
        seed: of the random choices.
        alive: per steering, the latents to choose another from; None means all of its SAE.
    """
    random = generator(seed, "steering controls")
    found: dict[str, list[Steering]] = {"unsteered": []}
    if any(steering.mode != "ablate" for steering in steerings):
        found["negative strength"] = [replace(steering, strength=-steering.strength) for steering in steerings]
    if all(steering.sae is not None for steering in steerings):
        pools = alive or [range(steering.sae.dict_size) for steering in steerings if steering.sae is not None]
        found["random latent"] = [_other(*pair, random) for pair in zip(steerings, pools, strict=True)]
    found["random direction"] = [
        replace(steering, along=torch.randn(len(steering.direction_D), generator=random, dtype=torch.float32))
        for steering in steerings
    ]
    return found


def _other(steering: Steering, alive: Sequence[int], random: torch.Generator) -> Steering:
    pool = [latent for latent in alive if latent != steering.latent]
    if not pool:
        raise FormatError("there is no other latent to compare with")
    return replace(steering, latent=pool[int(torch.randint(len(pool), (1,), generator=random))])
