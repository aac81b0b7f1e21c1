"""A steering file: latents chosen once, by a contrast or by hand, and how far to push along each.

{"pushes": [{"sae": "sae_attn_mid", "latent": 40, "strength": 0.3}]}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwenscope.errors import FormatError
from qwenscope.files import read_object, write_json
from qwenscope.sae.formats.directions import Push


def write_pushes(path: Path, pushes: Sequence[Push]) -> None:
    """Write a steering file in one step."""
    listed = [{"sae": push.sae_id, "latent": push.latent, "strength": push.strength} for push in pushes]
    write_json(path, {"pushes": listed})


def read_pushes(path: Path) -> list[Push]:
    """What a steering file says; whether the latents are there is for its user to see.

    Raises:
        FormatError: it cannot be read, or a push lacks something or has a value of another kind.
    """
    listed = read_object(path).get("pushes")
    if not isinstance(listed, list) or not listed:
        raise FormatError(f"{path} has no pushes; it is no steering file")
    pushes = []
    for number, each in enumerate(listed):
        push = each if isinstance(each, dict) else {}
        id, latent, strength = push.get("sae"), push.get("latent"), push.get("strength")
        numbers = isinstance(latent, int) and isinstance(strength, int | float)
        if not isinstance(id, str) or not numbers or isinstance(latent, bool) or isinstance(strength, bool):
            raise FormatError(f"{path}: push {number} needs sae (a name), latent (a number) and strength (a number)")
        assert isinstance(latent, int)
        assert isinstance(strength, int | float)
        pushes.append(Push(id, latent, float(strength)))
    return pushes
