"""`qwenscope steer` with one and several latents, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
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


def test_the_range_is_shown_and_its_end_is_taken(release: Path) -> None:
    written = steer(release, "--sae", "sae_delta", "--latent", "40", "--range")
    assert "0.000  as it is" in written
    assert "text up to strength" in written
    with pytest.raises(FormatError, match="--range tries strengths of one latent"):
        steer(release, *PUSH, "--latent", "9", "--range")


def test_the_answer_is_steered_from_its_beginning_by_default(release: Path) -> None:
    assert (
        steer(release, *PUSH) == steer(release, *PUSH, "--where", "answer") != steer(release, *PUSH, "--where", "all")
    )


def test_warnings_of_other_libraries_stay_out_of_the_text() -> None:
    for debug in (False, True):
        code = (
            "import warnings; from qwenscope.cli.options import set_up_output; "
            f"set_up_output({debug}); warnings.warn('cache is called otherwise', FutureWarning)"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ("called otherwise" in ran.stderr) == debug


def test_an_unknown_sae_is_named(release: Path) -> None:
    with pytest.raises(FormatError, match="--sae sae_nope is not in"):
        steer(release, "--sae", "sae_nope", "--latent", "1")
