"""Directions of chosen latents: control vectors as the gguf package reads them, safetensors, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from qwenscope import SAE
from qwenscope.cli.main import app
from qwenscope.errors import FormatError
from qwenscope.sae.formats import export_latents
from qwenscope.sae.formats.directions import Push

HIDDEN, LATENTS = 24, 60


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    places: dict[str, dict[str, Any]] = {
        "early": {"layer": 3},
        "late": {"layer": 5},
        "again": {"layer": 5, "site": "layers.5"},
        "mlp": {"layer": 5, "site": "layers.5.mlp"},
        "first": {"layer": 0},
        "nowhere": {"hook_name": "hook_embed"},
        "other": {"layer": 4, "model": "org/other"},
    }
    for seed, (sae_id, config) in enumerate(places.items()):
        sae = SAE(HIDDEN, LATENTS, 4, "jumprelu", seed=seed)
        with torch.no_grad():
            sae.decoder.weight *= 1 + seed  # directions are of length 1 whatever the decoder's norm
        sae.config |= {"model": "org/model", "sae_id": sae_id} | config
        sae.save(tmp_path / "suite" / sae_id)
    return tmp_path / "suite"


def direction(suite: Path, sae_id: str, latent: int) -> np.ndarray:
    column = SAE.from_pretrained(suite, sae_id).decoder.weight.detach()[:, latent].double().numpy()
    return column / np.sqrt((column**2).sum())


def test_the_gguf_package_reads_the_values_that_were_chosen(suite: Path, tmp_path: Path) -> None:
    pushes = [Push("late", 7, 2.5), Push("early", 0, -1.0), Push("again", 59, 4.0), Push("late", 8, 0.5)]
    export_latents(suite, "control-vector", pushes, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out/control-vector.gguf")
    fields = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "org/model"
    assert fields["controlvector.layer_count"] == 2
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert set(found) == {"direction.3", "direction.5"}
    wanted = {
        "direction.3": -direction(suite, "early", 0),
        "direction.5": 2.5 * direction(suite, "late", 7)
        + 4.0 * direction(suite, "again", 59)
        + 0.5 * direction(suite, "late", 8),
    }
    for name, tensor in found.items():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(tensor.shape) == [HIDDEN]
        np.testing.assert_allclose(tensor.data, wanted[name], rtol=0, atol=1e-6)


def test_plain_directions_say_what_they_are_of(suite: Path, tmp_path: Path) -> None:
    command = ["export", str(suite), "--to", "directions", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--sae", "mlp", "--latent", "3", "--latent", "9", "--strength", "2"])
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "out/directions.safetensors", framework="np") as file:
        assert set(file.keys()) == {"mlp.3", "mlp.9"}
        for latent in (3, 9):
            wanted = 2 * direction(suite, "mlp", latent)
            np.testing.assert_allclose(file.get_tensor(f"mlp.{latent}"), wanted, rtol=0, atol=1e-6)
        about = json.loads(file.metadata()["directions"])
    told = {"model": "org/model", "layer": 5, "site": "layers.5.mlp"}
    assert about["mlp.9"] == {"sae_id": "mlp", "latent": 9, "strength": 2.0} | told


@pytest.mark.parametrize(
    ("pushes", "complaint"),
    [
        ([], "name them by --sae and --latent"),
        ([Push("missing", 0, 1.0)], "has no SAE missing"),
        ([Push("late", LATENTS, 1.0)], "late has no latent 60; it has 0 to 59"),
        ([Push("late", 1, float("nan"))], "a strength of nan"),
        ([Push("mlp", 1, 1.0)], r"mlp reads layers.5.mlp; a control vector is added to the residual stream alone"),
        ([Push("nowhere", 1, 1.0)], "nowhere reads hook_embed"),
        ([Push("first", 1, 1.0)], "llama.cpp adds no control vector"),
        ([Push("late", 1, 1.0), Push("other", 1, 1.0)], "late, other are not of one language model"),
    ],
)
def test_what_no_control_vector_can_hold_is_named(
    suite: Path, tmp_path: Path, pushes: list[Push], complaint: str
) -> None:
    with pytest.raises(FormatError, match=complaint):
        export_latents(suite, "control-vector", pushes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_tells_latents_from_suites(suite: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    for options, complaint in (
        (["--to", "saelens", "--sae", "late", "--latent", "3"], "saelens holds whole SAEs"),
        (["--to", "control-vector"], "name them by --sae and --latent"),
        (["--to", "directions", "--sae", "late", "--latent", "3", "--latent", "3"], "is named twice"),
    ):
        result = CliRunner().invoke(app, ["export", str(suite), *options, *out])
        assert isinstance(result.exception, FormatError), result.output
        assert complaint in str(result.exception)
