"""What a recipe may ask of the machine it runs on: checked before the work, from below, and named by its key."""

from __future__ import annotations

import os

import psutil
import torch

from qwenscope.errors import RecipeError, ResourceError, reason
from qwenscope.recipe import Recipe
from qwenscope.recipe_nodes import file_systems, schemes_of

WORKERS_PER_CORE = 4


def check_workers(workers: int) -> None:
    """Refuse more processes than the machine can have any use for.

    Raises:
        RecipeError: `workers` exceeds WORKERS_PER_CORE per core.
    """
    cores = os.cpu_count() or 1
    if workers > WORKERS_PER_CORE * cores:
        raise RecipeError(
            f"corpus.workers {workers} is more than {WORKERS_PER_CORE} for each of this machine's {cores} cores; "
            f"set it to {cores}"
        )


def check_memory(recipe: Recipe, hidden_dim: int, ranks: int = 1) -> None:
    """Refuse what cannot fit into the memory of `ranks` machines like this one, however it is spread; `qwenscope plan`
    says what is needed in truth.

    Raises:
        ResourceError: one window's rows (2 bytes a value) or the SAEs with their moments (8 bytes) are larger than host
            and GPU memory together; names the key and the bytes.
    """
    present = psutil.virtual_memory().total
    present += sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    window = 2 * hidden_dim * len(recipe.sites) * recipe.activations.window_tokens
    latents = {sae_id: point.dict_size for sae_id, point in recipe.hook_points.items()}
    largest = max(latents, key=lambda sae_id: latents[sae_id])
    needs = {
        f"activations.window_tokens {recipe.activations.window_tokens:,}": window,
        f"hook_points.{largest}.dict_size {latents[largest]:,}": 8 * 2 * hidden_dim * sum(latents.values()),
    }
    for key, needed in needs.items():
        if needed > ranks * present:
            raise ResourceError(
                f"{key} needs {needed:,} bytes of memory at least, {ranks * present:,} are there; lower it"
            )


def check_cache(recipe: Recipe) -> None:
    """Refuse a cache whose file system needs a package that this machine lacks; one that only reads a run needs none.

    Raises:
        RecipeError: names the address' scheme and the package.
    """
    for scheme in schemes_of(recipe.activations.cache or ""):
        try:
            file_systems().get_filesystem_class(scheme)
        except ImportError as error:
            raise RecipeError(f"activations.cache: {scheme}:// cannot be used here ({reason(error)})") from None
