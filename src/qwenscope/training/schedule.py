"""The learning rate as a function of tokens: linear warmup, constant, linear decay to zero."""

from __future__ import annotations


def learning_rate(
    peak: float, done: int, batch: int, *, tokens: int | None, warmup_tokens: int = 0, decay_share: float = 0.2
) -> float:
    """Learning rate of the step that takes the run from `done` to `done + batch` tokens.

    Warmup looks at the step's end (the first step is not wasted on zero), the decay at its start (nor is the last);
    a step at or beyond the run's end has rate 0. Counting tokens keeps the schedule right when batches differ in size.

    Args:
        tokens: length of the whole run; None means that it has no planned end, so no decay.
        warmup_tokens: tokens of linear warmup.
        decay_share: share of `tokens`, at the end, over which the rate falls linearly to zero.
    """
    factor = min(1.0, (done + batch) / warmup_tokens) if warmup_tokens else 1.0
    if tokens is None:
        return peak * factor
    left = max(0, tokens - done)
    if left == 0:
        return 0.0
    return peak * min(factor, left / (decay_share * tokens) if decay_share else 1.0)
