"""Who computes a run's rows (`lm.backend`): transformers, or an engine that has just been compared with it.

The engine is compared in every session, on the first conversations of the run's own corpus: a resumed run may meet
another version of it. transformers goes first and is let go, so the two never need memory together.
"""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qwenscope.corpus.stream import CorpusStream
from qwenscope.errors import CorpusError, RecipeError
from qwenscope.limits import check_cache, check_memory, check_workers
from qwenscope.lm.load import load_config, load_language_model, load_tokenizer
from qwenscope.lm.model import RowSource
from qwenscope.lm.sites import site_names, sites_of
from qwenscope.lm.vllm.engine import VllmModel, check_vllm
from qwenscope.lm.vllm.parity import check_parity, sample_rows
from qwenscope.recipe import LMRecipe, Recipe
from qwenscope.training.closing import check_closing

logger = logging.getLogger(__name__)

PARITY_TOKENS = 4096
"""At least so many tokens are compared, of whole conversations."""


def open_source(
    lm: LMRecipe, recipe: Recipe, revisions: dict[str, str] | None, ranks: int, closing: ExitStack
) -> tuple[RowSource, dict[str, Any] | None]:
    """The language model of a run, and how an engine other than transformers compared with it (`check_parity`).

    Args:
        lm: The model, at the run's revision.
        recipe: Its corpus, seed and hook points.
        revisions: Of the corpus's data sets, where the run has resolved them.
        ranks: Processes of the run.
        closing: Ends an engine's life.

    Raises:
        ModelError: vLLM is missing, cannot run the model, or computes other rows.
        RecipeError: vLLM in several processes, or too much asked of this machine.
        CorpusError: the corpus holds no conversation.
        ResourceError: windows or SAEs that no memory here holds.
    """
    sites, corpus = sites_of(recipe), recipe.corpus
    check_workers(corpus.workers)  # before minutes of loading
    check_cache(recipe)
    check_closing(recipe, ranks)
    check_memory(recipe, int(load_config(lm).hidden_size), ranks)
    if recipe.training.closes:
        return load_language_model(lm, lm_head=True), None
    if lm.backend == "transformers":
        return load_language_model(lm, last_layer=recipe.last_layer), None
    if ranks > 1:
        raise RecipeError(f"lm.backend vllm works in one process, not in {ranks}; set it to transformers")
    who = check_vllm(lm, corpus.max_length, sites)  # before minutes of loading
    token_ids = _first_conversations(lm, recipe, revisions)
    reference = load_language_model(lm, last_layer=recipe.last_layer)
    expected = sample_rows(reference, token_ids, sites, corpus.batch_tokens)
    weights = reference.digest(recipe.last_layer)
    del reference
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    engine = VllmModel(lm, sites, max_length=corpus.max_length, batch_tokens=corpus.batch_tokens, weights=weights)
    closing.callback(engine.close)
    found = sample_rows(engine, token_ids, sites, corpus.batch_tokens)
    verdict = check_parity(expected, found, engine.dtype, site_names(recipe), who)
    logger.info("%s computes the rows of transformers on %s tokens", who, f"{verdict['tokens']:,}")
    return engine, verdict


def _first_conversations(lm: LMRecipe, recipe: Recipe, revisions: dict[str, str] | None) -> list[NDArray[np.int32]]:
    stream = CorpusStream(recipe.corpus, load_tokenizer(lm), seed=recipe.seed, revisions=revisions)
    try:
        drawn: list[NDArray[np.int32]] = []
        while sum(map(len, drawn)) < PARITY_TOKENS and (conversation := next(stream, None)) is not None:
            drawn.append(conversation.token_ids)
    finally:
        stream.close()
    if not drawn:
        raise CorpusError("the corpus holds no conversation; look at corpus.sources and its privacy report")
    return drawn
