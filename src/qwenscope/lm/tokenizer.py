"""A language model's tokenizer as it is used here: whole texts, the same ids every time, none that the model lacks."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwenscope.errors import ModelError, reason
from qwenscope.lm.gguf import where


def read_tokenizer(name: str, folder: Path) -> Tokenizer:
    """A checkpoint's tokenizer. Never asks for, nor runs, code of the checkpoint; truncation, padding, a longest length
    and dropout that it was saved with are off.

    Raises:
        ModelError: there is none that transformers reads, or it has no vocabulary.
    """
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(**where(folder), trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, transformers whatever a foreign file leads to
        raise ModelError(f"the tokenizer of {name} cannot be loaded: {reason(error)}") from error
    tokenizer.model_max_length = sys.maxsize
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):  # of merges, for training: the same text, other ids
            backend.model.dropout = None
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():  # transformers makes one of nothing
        raise ModelError(f"the tokenizer of {name} has no vocabulary; fetch its tokenizer.json again")
    return tokenizer
