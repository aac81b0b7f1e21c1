"""What every result begins with: of which kind it is, and of which SAEs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwenscope.opening import Target


def head(kind: str, target: Target, ids: Iterable[str]) -> dict[str, Any]:
    """{"kind", "target", "saes": {sae_id: digest of its weights}}, by which another suite's result is refused."""
    return {"kind": kind, "target": target.name, "saes": {id: target.saes[id].digest() for id in ids}}
