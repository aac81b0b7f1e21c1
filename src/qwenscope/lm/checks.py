"""What is checked of a language model once it is loaded."""

from __future__ import annotations

import torch

from qwenscope.errors import ModelError, reason
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site


def check_tokenizer(lm: LanguageModel) -> None:
    """Refuse a tokenizer whose text gets ids that the embedding has no row for.

    Special tokens that no template writes may lie beyond: placeholders of images, or defaults of the tokenizer's class.
    """
    rows, tokenizer = lm.known_tokens, lm.tokenizer
    unused = {token for token in tokenizer.all_special_tokens if token not in str(tokenizer.chat_template)}
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    if wanted := beyond.keys() - unused:
        token = min(wanted, key=beyond.__getitem__)
        raise ModelError(
            f"the tokenizer of {lm.name} has {len(wanted)} tokens beyond the model's {rows}, such as {token!r} "
            f"({beyond[token]}); it belongs to another model, or the embedding was not resized"
        )


@torch.no_grad()
def check_looks_back(lm: LanguageModel) -> None:
    """Refuse a model in which a token reaches the ones before it: padding would reach them too."""
    ids = torch.ones((2, 4), dtype=torch.int64, device=lm.device)
    ids[1, -1] = 2
    end = Site.of(len(lm.layers) - 1)
    try:
        first, second = lm.streams(ids, [4, 4], [end])[end].double()
    except ModelError:
        return  # its layers do not return rows; a hook point there is refused by name
    except TypeError as error:  # an encoder, whose layers are called otherwise
        raise ModelError(
            f"{lm.name} ({type(lm.model).__name__}) is no causal decoder, and not supported: {reason(error)}"
        ) from error
    apart = ((first - second).norm(dim=-1) / first.norm(dim=-1).clamp(min=1e-30))[:-1].median()
    if apart > (1e-4 if lm.dtype == torch.float32 else 3e-2):
        raise ModelError(
            f"{lm.name} ({type(lm.model).__name__}) looks ahead: it is no causal decoder, and not supported"
        )


def check_second(lm: LanguageModel, other: LanguageModel) -> None:
    """Refuse a second model whose rows cannot be compared: of another width, or that means other tokens."""
    if lm.hidden_dim != other.hidden_dim:
        raise ModelError(
            f"{other.name} is {other.hidden_dim} wide and {lm.name} {lm.hidden_dim}: rows have no difference"
        )
    here, there = lm.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if unlike := {token for token, number in here.items() ^ there.items() if number < lm.known_tokens}:
        token = min(unlike)
        raise ModelError(
            f"token {token!r} is {here.get(token)} to {lm.name} and {there.get(token)} to {other.name}; a difference "
            "of rows takes one tokenizer"
        )
