"""The notebook of a release: load an SAE, encode text, look at latents. Every code cell runs as it stands."""

from __future__ import annotations

from typing import Any


def notebook(repo: str, sae_id: str, model: str) -> dict[str, Any]:
    """A Jupyter notebook (format 4.5) as a JSON-able object.

    Args:
        repo: repository of the release, or `.` for the folder that the notebook lies in.
        sae_id: the SAE it looks at.
        model: the language model.
    """
    cells = [
        _text(f"# A first look at `{sae_id}`\nEncode a text, see which latents fire where, and what they reconstruct."),
        _text("`pip install qwenscope matplotlib`"),
        _code(
            "import torch\n"
            "\n"
            "from qwenscope import TopKSAE, load_suite\n"
            "from qwenscope.lm.forward import site_rows\n"
            "from qwenscope.lm.load import load_language_model\n"
            "from qwenscope.lm.sites import Site\n"
            "from qwenscope.recipe import LMRecipe\n"
            "\n"
            f'sae = TopKSAE.from_pretrained("{repo}", sae_id="{sae_id}")\n'
            "sae.config"
        ),
        _text("Only the layers up to the SAE's own are built; their weights are all that is read."),
        _code(
            'site = Site.of(sae.config.get("site", sae.config["layer"]))\n'
            f'lm = load_language_model(LMRecipe(model="{model}"), last_layer=site.layer)\n'
            "sae = sae.to(lm.device)\n"
            'text = "What is the weather in Paris tomorrow, and should I take an umbrella?"\n'
            'ids = lm.tokenizer(text, return_tensors="pt").input_ids.to(lm.device)\n'
            "x = site_rows(lm, ids, [site])[site][0].float()\n"
            "with torch.no_grad():\n"
            "    codes = sae.encode(x)\n"
            "    x_hat = sae.decode(codes)\n"
            "fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()\n"
            'print(f"{len(x)} tokens, fraction of variance unexplained on this text: {fvu:.3f}")'
        ),
        _text("The three strongest latents of each token:"),
        _code(
            "values, places = codes.values.topk(3, dim=1)\n"
            "latents = codes.indices.gather(1, places)\n"
            "rows = zip(ids[0].tolist(), latents.tolist(), values.tolist(), strict=True)\n"
            "for token, ids_of_token, strengths in rows:\n"
            '    shown = "  ".join(f"{j}: {v:.2f}" for j, v in zip(ids_of_token, strengths, strict=True))\n'
            '    print(f"{lm.tokenizer.decode([token])!r:>16}  {shown}")'
        ),
        _text("Where the latents that fire most here are active:"),
        _code(
            "import matplotlib.pyplot as plt\n"
            "\n"
            "dense = codes.dense().cpu()\n"
            "top = dense.sum(0).topk(20).indices\n"
            "plt.figure(figsize=(10, 4))\n"
            'plt.imshow(dense[:, top].T, aspect="auto", cmap="viridis")\n'
            "plt.yticks(range(len(top)), top.tolist())\n"
            "plt.xticks(range(len(x)), [lm.tokenizer.decode([t]) for t in ids[0].tolist()], rotation=90)\n"
            'plt.ylabel("latent")\n'
            'plt.colorbar(label="activation")\n'
            "plt.tight_layout()"
        ),
        _text("All SAEs of the suite:"),
        _code(
            f'for name, other in load_suite("{repo}").items():\n'
            "    print(f\"{name:24} layer {other.config['layer']:>3}  {other.dict_size:>6} latents  k = {other.k}\")"
        ),
    ]
    return {
        "cells": [cell | {"id": f"cell-{number}"} for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source.splitlines(keepends=True)}


def _code(source: str) -> dict[str, Any]:
    lines = source.splitlines(keepends=True)
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": lines}
