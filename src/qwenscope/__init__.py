"""qwenscope: train, measure and release sparse autoencoders for large language models.

    from qwenscope import TopKSAE
    sae = TopKSAE.from_pretrained("release", sae_id="sae_attn_mid")
    codes = sae.encode(x_BD)

The public names, loaded when first used:

- `TopKSAE`, `Codes`, `load_suite`: an SAE, its sparse codes, a whole suite from a folder or the Hub. `SAE` is the same
  with any activation (BatchTopK, JumpReLU, ReLU).
- `SAETrainer`: one optimizer step at a time, or `fit` on rows that are there; on anyone's activations.
- `harvest`, `read`, `intervene`, `steer` and `Steering`: rows, codes and edits of any transformers model, at a `Site`.
- `open_target`: a run, a release, a foreign suite or a Hub repository, with what its SAEs were made for.
- `Recipe`, `load_recipe`: everything a run depends on.
- `train`, `evaluate`: a run and its measurements.
- `QwenscopeError`: base class of every error a user can cause and cure.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qwenscope.errors import QwenscopeError

if TYPE_CHECKING:
    from qwenscope.activations.plain import harvest, intervene
    from qwenscope.evaluation.run import evaluate
    from qwenscope.features.read import read
    from qwenscope.features.steering import Steering, steer
    from qwenscope.lm.sites import Site
    from qwenscope.opening import open_target
    from qwenscope.recipe import Recipe, load_recipe
    from qwenscope.sae.loading import load_suite
    from qwenscope.sae.sae import SAE, Codes, TopKSAE
    from qwenscope.training.run import train
    from qwenscope.training.trainer import SAETrainer

    __version__: str

__all__ = [
    "SAE",
    "Codes",
    "QwenscopeError",
    "Recipe",
    "SAETrainer",
    "Site",
    "Steering",
    "TopKSAE",
    "evaluate",
    "harvest",
    "intervene",
    "load_recipe",
    "load_suite",
    "open_target",
    "read",
    "steer",
    "train",
]

_HOMES = {
    "SAE": "sae.sae",
    "Codes": "sae.sae",
    "TopKSAE": "sae.sae",
    "load_suite": "sae.loading",
    "SAETrainer": "training.trainer",
    "Site": "lm.sites",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "train": "training.run",
    "evaluate": "evaluation.run",
    "harvest": "activations.plain",
    "intervene": "activations.plain",
    "open_target": "opening",
    "read": "features.read",
    "steer": "features.steering",
    "Steering": "features.steering",
}


def __getattr__(name: str) -> Any:
    # On first use, so that `qwenscope --help` need not wait for torch.
    if name == "__version__":
        return version("qwenscope")
    if name not in _HOMES:
        raise AttributeError(f"module 'qwenscope' has no attribute {name!r}")
    return getattr(import_module(f"qwenscope.{_HOMES[name]}"), name)
