"""The notebooks of examples/ run as they stand, from top to bottom, and were kept with their outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from qwenscope.files import write_text
from qwenscope.recipe import load_recipe
from qwenscope.sae.sae import TopKSAE

EXAMPLES = Path(__file__).parents[2] / "examples"
EXECUTED = ["train-on-your-rows", "read-features", "monitor"]  # first-look.ipynb: tests/release runs it


@pytest.mark.parametrize("name", EXECUTED)
def test_outputs_are_kept_and_none_is_an_error(name: str) -> None:
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {"stream", "display_data"} <= {output.output_type for output in outputs}
    assert "error" not in {output.output_type for output in outputs}
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("name", EXECUTED)
def test_the_notebook_runs(name: str, tmp_path: Path) -> None:
    run, recipe = tmp_path / "runs" / "demo", load_recipe("standin")
    for sae_id, point in recipe.hook_points.items():
        sae = TopKSAE(64, point.dict_size, point.k, seed=point.layer)
        sae.config["layer"] = point.layer
        sae.save(run / "saes" / sae_id)
    write_text(run / "recipe.yaml", recipe.to_yaml())
    (tmp_path / "examples").mkdir()
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path / "examples")}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
