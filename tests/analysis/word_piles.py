"""Conversations of a few words, with the planted word of `planted_suite` or without it."""

from __future__ import annotations

import random
from typing import Any

from planted_suite import PLANTED, WORDS


def chat(number: int, planted: bool, words: int = 14) -> list[dict[str, Any]]:
    """A question of some words, the planted one among them or not, and an answer."""
    choose = random.Random(number)
    asked = [choose.choice(WORDS) for _ in range(words)]
    if planted:
        asked[choose.randrange(1, words)] = PLANTED.strip()
    answer = " ".join(choose.choice(WORDS) for _ in range(4))
    return [{"role": "user", "content": " ".join(asked)}, {"role": "assistant", "content": answer}]


def rows(start: int, count: int, planted: bool, **more: Any) -> list[dict[str, Any]]:
    return [{"messages": chat(start + number, planted), **more} for number in range(count)]
