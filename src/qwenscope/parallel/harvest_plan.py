"""How several ranks harvest one window: who runs which batch of the language model, and which rows travel to whom.

Every rank runs some of the batches, at all hook points; a rank needs the rows of the hook points whose SAEs it owns. So
norms go to all (four bytes per token and hook point: the rule that leaves rows out sees the whole window everywhere),
then the kept rows go to their owners. The batches are those of a single process, so the rows are too, to the bit.

Legend: T tokens of the window in canonical order, R those kept, L hook points, D hidden dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from qwenscope.parallel.group import ALONE, Group

S = TypeVar("S")  # a hooked site


@dataclass(frozen=True)
class HarvestPlan(Generic[S]):
    """Who does what in a window."""

    group: Group
    sites: tuple[tuple[S, ...], ...]
    """Per rank, the hooked sites whose rows it needs, ascending."""
    busy: tuple[float, ...]
    """Per rank, what it does in a window besides harvesting, in positions of a language-model batch."""
    in_turn: bool = False
    """Whether a window may only be harvested between SAE steps, whatever `activations.overlap` says."""

    @classmethod
    def alone(cls, sites: Sequence[S]) -> HarvestPlan[S]:
        """One process does everything."""
        return cls(ALONE, (tuple(sites),), (0.0,))

    @property
    def own_sites(self) -> tuple[S, ...]:
        """The hooked sites whose rows this rank needs."""
        return self.sites[self.group.rank]

    @property
    def first_sites(self) -> tuple[S, ...]:
        """Of the own sites, those that no rank before this one needs: what is done once per site is done here."""
        before = {site for sites in self.sites[: self.group.rank] for site in sites}
        return tuple(site for site in self.own_sites if site not in before)

    def deal(self, positions: Sequence[int]) -> list[int]:
        """Batches of that many positions each -> the rank that runs each: the largest first, to who is free first.

        What a rank is busy with counts for half of an even share at most, lest a wrong guess at it leave others idle.
        """
        most = sum(positions) / len(self.busy) / 2
        loads = [min(busy - min(self.busy), most) for busy in self.busy]
        ranks = [0] * len(positions)
        for batch in sorted(range(len(positions)), key=lambda batch: -positions[batch]):
            ranks[batch] = loads.index(min(loads))
            loads[ranks[batch]] += positions[batch]
        return ranks

    def norms_of_all(self, norms: Mapping[S, Tensor], rank_T: Tensor) -> dict[S, Tensor]:
        """{site: norms of this rank's tokens} and the rank of each token -> {site: norm_T of all tokens}."""
        group = self.group
        if group.size == 1:
            return dict(norms)
        counts = torch.bincount(rank_T, minlength=group.size).tolist()
        own = torch.stack(list(norms.values()), dim=1)
        arrived_TL = group.all_to_all(own.repeat(group.size, 1), [len(own)] * group.size, counts)
        placed_TL = torch.empty_like(arrived_TL)
        placed_TL[rank_T.argsort(stable=True).to(own.device)] = arrived_TL
        return {site: placed_TL[:, column] for column, site in enumerate(norms)}

    def rows_to_owners(self, rows: dict[S, Tensor], rank_R: Tensor) -> dict[S, Tensor]:
        """{site: this rank's kept rows} and the rank of each kept token -> {own site: x_RD of all kept tokens}.

        `rows` is emptied on the way: its memory is wanted for what arrives.
        """
        group = self.group
        if group.size == 1:
            return rows
        counts = torch.bincount(rank_R, minlength=group.size).tolist()
        count, widths = counts[group.rank], {site: x_RD.shape[1] for site, x_RD in rows.items()}
        widest = max(rows.values(), key=lambda x_RD: x_RD.shape[1])
        outgoing = torch.cat([widest[:0], *(_padded(rows[site], widest) for sites in self.sites for site in sites)])
        del widest
        rows.clear()
        own = self.own_sites
        arrived = group.all_to_all(
            outgoing, [count * len(sites) for sites in self.sites], [other * len(own) for other in counts]
        )
        del outgoing  # as much again as arrives, where every rank needs every site
        pieces = [
            piece.view(len(own), other, arrived.shape[1])
            for piece, other in zip(torch.split(arrived, [other * len(own) for other in counts]), counts, strict=True)
        ]
        order_R = rank_R.argsort(stable=True).to(arrived.device)
        placed = {}
        for position, site in enumerate(own):
            x_RD = arrived.new_empty(len(rank_R), widths[site])
            x_RD[order_R] = torch.cat([piece[position, :, : widths[site]] for piece in pieces])
            placed[site] = x_RD
        return placed


def _padded(x_RD: Tensor, to: Tensor) -> Tensor:
    """Rows as wide as those of `to`."""
    missing = to.shape[1] - x_RD.shape[1]
    return torch.nn.functional.pad(x_RD, (0, missing)) if missing else x_RD
