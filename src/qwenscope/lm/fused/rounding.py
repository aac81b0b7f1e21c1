"""Rounding within Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(value):  # type: ignore[no-untyped-def]
    """float32 to the nearest bfloat16, ties to even, as a float32: Triton's interpreter would cut bits off."""
    bits = value.to(tl.int32, bitcast=True)
    near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(value == value, near, value)  # bits of what is no number may run over
