"""The notebook of a release: load an SAE, encode text, look at latents. Every code cell runs as it stands."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_CODE = re.compile(r"^```python\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def notebook(repo: str, sae_id: str, model: str) -> dict[str, Any]:
    """A Jupyter notebook (format 4.5) as a JSON-able object, from `templates/notebook.md.j2`.

    Args:
        repo: repository of the release, or `.` for the folder that the notebook lies in.
        sae_id: the SAE it looks at.
        model: the language model.
    """
    templates = Environment(loader=PackageLoader("qwenscope.release"), undefined=StrictUndefined, autoescape=False)
    text = templates.get_template("notebook.md.j2").render(repo=repo, sae_id=sae_id, model=model)
    parts = [part.strip() for part in _CODE.split(text)]  # text and code take turns
    cells = [_cell(part, code=number % 2 == 1) for number, part in enumerate(parts) if part]
    return {
        "cells": [cell | {"id": f"cell-{number}"} for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(source: str, code: bool) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "cell_type": "code" if code else "markdown",
        "metadata": {},
        "source": source.splitlines(keepends=True),
    }
    return cell | ({"execution_count": None, "outputs": []} if code else {})
