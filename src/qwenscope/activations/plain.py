"""Rows of anyone's transformers model, and edits of them, without a recipe.

from transformers import AutoModelForCausalLM, AutoTokenizer
import qwenscope

rows = qwenscope.harvest(model, tokenizer, texts, ["layers.6", "layers.6.mlp"]).rows    # {site: [R, D]}
with qwenscope.intervene(model, {"layers.6": lambda x_CTD: x_CTD * 0}):
    model.generate(...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwenscope.activations.harvest import Harvest
from qwenscope.activations.harvest import harvest as harvest_conversations
from qwenscope.corpus.anything import Messages, render_given
from qwenscope.errors import CorpusError
from qwenscope.lm import hooks
from qwenscope.lm.hooks import Edit
from qwenscope.lm.model import LanguageModel, as_language_model
from qwenscope.lm.sites import Site, Where
from qwenscope.recipe import ActivationsRecipe

EVERY_ROW = ActivationsRecipe(outlier_factor=None)


def harvest(
    model: PreTrainedModel | LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Messages],
    sites: Sequence[Where],
    *,
    max_length: int = 1024,
    batch_tokens: int = 8192,
    activations: ActivationsRecipe = EVERY_ROW,
) -> Harvest:
    """Rows of every token of `texts` at each of `sites`, from one pass per batch that stops at the last site.

    Args:
        model: a transformers causal language model, or a loaded `LanguageModel`.
        tokenizer: its tokenizer.
        texts: documents, or conversations as lists of messages; one row of a batch each, nothing leaks between them.
        sites: names such as "layers.6", "layers.6.mlp", "layers.6.mixer", or layers by number.
        max_length: tokens of a text; what is beyond is cut off.
        batch_tokens: tokens of a batch, padding included.
        activations: which rows are left out; by default none, but those that are not finite.

    Raises:
        CorpusError: no texts, one without tokens, or one that the chat template refuses.
        ModelError: a site that the model does not have.
        TrainingError: more than 1 % of the rows are not finite.
    """
    if isinstance(texts, str) or not texts:
        raise CorpusError("harvest takes a list of texts or conversations, of at least one")
    lm = as_language_model(model, tokenizer)
    rendered = [render_given(tokenizer, text, max_length=max_length) for text in texts]
    return harvest_conversations(lm, rendered, sorted(set(map(Site.of, sites))), activations, batch_tokens)


@contextmanager
def intervene(model: PreTrainedModel | LanguageModel, edits: Mapping[Where, Edit]) -> Iterator[None]:
    """Replace the rows at each site of `edits` while the block lasts; see `lm.hooks.intervene`.

    Raises:
        ModelError: a site that is not there, an edit that changes the shape, or one that no pass in the block called.
    """
    with hooks.intervene(as_language_model(model), edits):
        yield
