"""`qwenscope steer` with one and several latents, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted_suite import PLANTED_LATENT
from typer.testing import CliRunner

from qwenscope.cli.main import app
from qwenscope.errors import FormatError
from qwenscope.features.store import Index

PUSH = ["--sae", "sae_delta", "--latent", str(PLANTED_LATENT), "--strength", "3"]


def steer(release: Path, *options: str) -> str:
    arguments = ["steer", str(release), "order status", "--max-new-tokens", "3", *options]
    return CliRunner().invoke(app, arguments, catch_exceptions=False).output


def test_several_latents_at_once(release: Path, index: Index) -> None:
    one = steer(release, *PUSH)
    two = steer(release, *PUSH, "--sae", "sae_attn", "--latent", "41", "--strength", "2")
    same = steer(release, *PUSH, "--latent", "9", "--index", str(index.folder))
    for written in (one, two, same):
        for run in ("steered", "unsteered", "negative strength", "random latent", "random direction"):
            assert run in written
    assert len({one, two, same}) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sae", "sae_attn"], "--sae is given 2 times, --latent 1"),
        (["--strength", "1"], "--strength is given 2 times, --latent 1"),
        (["--latent", "256"], "no latent 256"),
    ],
)
def test_what_does_not_fit_is_named(release: Path, index: Index, options: list[str], named: str) -> None:
    with pytest.raises(FormatError, match=named):
        steer(release, *PUSH, *options)
    if "256" in options:
        with pytest.raises(FormatError, match=named):
            steer(release, *PUSH, *options, "--index", str(index.folder))


def test_an_unknown_sae_is_named(release: Path) -> None:
    with pytest.raises(FormatError, match="--sae sae_nope is not in"):
        steer(release, "--sae", "sae_nope", "--latent", "1")
