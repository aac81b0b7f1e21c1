"""The gate for rows that another engine than transformers computes: the same tokens, compared row by row.

An engine can be wrong in ways that no error tells: rows of zeros, of the layer before or behind, of the next position,
behind the final norm. Each leaves a row about as far from the right one as its own norm, or at least one layer's step
(7 to 24 % at the stand-in's hook points). Rounding leaves far less, so tolerances lie between:

| transformers against itself, stand-in, nine hook points | median | 99th percentile | FVU |
|---|---|---|---|
| float32, one row at a time or batched | 0 | 6e-7 | 2e-14 |
| bfloat16 against float32 | 1.4e-2 | 8e-2 | 6e-4 |
| one layer's step (what a shifted numbering leaves) | 7e-2 and more | | 0.19 and more |

The tail is wide because a rounded router sends single tokens to other experts. All three numbers must hold: the median
sees what is wrong everywhere, the percentile what is wrong at some positions, and FVU weighs rows as training does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenscope.errors import ModelError
from qwenscope.lm.batches import make_batches
from qwenscope.lm.model import RowSource
from qwenscope.lm.sites import Site


@dataclass(frozen=True)
class Distance:
    """How far rows b_RD are from the reference a_RD."""

    median: float
    """Of the relative error |a - b| / |a| over the rows."""
    p99: float
    """Its 99th percentile."""
    fvu: float
    """sum |a - b|^2 / sum |a - mean(a)|^2."""

    def within(self, limit: Distance) -> bool:
        """Whether no number exceeds the limit's; nan does."""
        return self.median <= limit.median and self.p99 <= limit.p99 and self.fvu <= limit.fvu


FLOAT32 = Distance(median=1e-3, p99=1e-2, fvu=1e-5)
HALF = Distance(median=4e-2, p99=0.25, fvu=1e-2)
"""Largest distances admitted, by the dtype of the forward pass; HALF for bfloat16 and float16."""


def sample_rows(
    lm: RowSource, token_ids: Sequence[NDArray[np.int32]], sites: Sequence[Site], batch_tokens: int
) -> dict[Site, Tensor]:
    """Rows of every token, in the batches that a harvest would make of these conversations.

    Returns:
        {site: x_RD} in the model's dtype, on the CPU; by conversation, then by position.
    """
    rows: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(token_ids) for site in sites}
    pad_id = lm.tokenizer.pad_token_id or 0
    for batch in make_batches([len(ids) for ids in token_ids], token_ids, batch_tokens, pad_id, lm.device):
        for site, x_CTD in lm.streams(batch.input_ids_CT, batch.lengths_C, sites).items():
            for c, (member, length) in enumerate(zip(batch.members, batch.lengths_C, strict=True)):
                rows[site][member] = x_CTD[c, :length].cpu()
    return {site: torch.cat(parts) for site, parts in rows.items()}


def distance(reference_RD: Tensor, rows_RD: Tensor) -> Distance:
    """How far `rows_RD` are from `reference_RD`, computed in float64."""
    a_RD, b_RD = reference_RD.double(), rows_RD.double()
    error_R = (a_RD - b_RD).norm(dim=-1)
    relative_R = error_R / a_RD.norm(dim=-1)
    variance = (a_RD - a_RD.mean(dim=0)).square().sum()
    fvu = error_R.square().sum() / variance
    return Distance(float(relative_R.median()), float(relative_R.quantile(0.99)), float(fvu))


def check_parity(
    reference: Mapping[Site, Tensor],
    rows: Mapping[Site, Tensor],
    dtype: torch.dtype,
    names: Mapping[Site, str],
    who: str,
) -> dict[str, Any]:
    """Admit the rows of engine `who`, or refuse them.

    Args:
        reference: {site: x_RD} as transformers computes them.
        rows: The same tokens' rows by `who`.
        dtype: Of the forward pass; chooses the tolerance.
        names: {site: hook point} for messages and the verdict.
        who: Engine and version.

    Returns:
        The verdict, for the record: engine, tokens, largest distances admitted, and those found per hook point.

    Raises:
        ModelError: one hook point's rows are too far off; names it, its distance and the cure.
    """
    limit = FLOAT32 if dtype == torch.float32 else HALF
    found: dict[str, Distance] = {}
    for site, reference_RD in reference.items():
        name, rows_RD = names[site], rows[site]
        if rows_RD.shape != reference_RD.shape:
            raise ModelError(
                f"{who} gives {tuple(rows_RD.shape)} rows at hook point {name}, transformers "
                f"{tuple(reference_RD.shape)}; set lm.backend to transformers"
            )
        found[name] = off = distance(reference_RD, rows_RD)
        if not off.within(limit):
            raise ModelError(
                f"{who} computes other rows than transformers at hook point {name} ({site}): relative error "
                f"{off.median:.2g} in the median (at most {limit.median:g}), {off.p99:.2g} at the 99th percentile (at "
                f"most {limit.p99:g}), FVU {off.fvu:.2g} (at most {limit.fvu:g}); set lm.backend to transformers, or "
                "try another version of the engine"
            )
    return {
        "engine": who,
        "tokens": len(next(iter(reference.values()))),
        "limit": asdict(limit),
        "hook_points": {name: asdict(off) for name, off in found.items()},
    }
