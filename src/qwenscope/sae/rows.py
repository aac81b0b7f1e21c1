"""Rows as people have them: tensors, or whatever numpy reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenscope.errors import FormatError

Rows = Any
"""A tensor, or what `numpy.asarray` takes (an array, a memmap, nested lists), of floating-point numbers."""


def as_rows(rows: Rows) -> Tensor:
    """`rows` as a tensor of the same values: a tensor as it is, anything else copied from numpy.

    Raises:
        FormatError: not numbers with a fraction.
    """
    if isinstance(rows, Tensor):
        tensor = rows
    else:
        try:
            tensor = torch.from_numpy(np.array(rows))  # a copy: torch warns of memory that it may not write to
        except (TypeError, ValueError):
            tensor = torch.empty(0, dtype=torch.bool)
    if not tensor.is_floating_point():
        raise FormatError(f"rows are floating-point numbers, not {getattr(rows, 'dtype', type(rows).__name__)}")
    return tensor
