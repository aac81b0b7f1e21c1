"""What the next evaluation need not compute again: which rows of a corpus are measured, and what ablation does to them.

Kept in the folder that QWENSCOPE_CACHE names (empty: nothing is kept), else in `qwenscope/evaluation` of the user's
cache folder, a file of kilobytes each. A file's name is a digest of whatever its numbers depend on, down to the
versions of torch and transformers: what is found is what would be computed. One whose checksum does not fit is computed
again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qwenscope.corpus.conversation import Conversation
from qwenscope.errors import ResourceError
from qwenscope.files import atomic_path
from qwenscope.lm.model import LanguageModel
from qwenscope.recipe import Recipe

logger = logging.getLogger(__name__)

VERSION = 1
VARIABLE = "QWENSCOPE_CACHE"
_DIGEST = 64  # hex digits of a sha256


class Kept:
    """Named tensors by what they depend on, for one language model and the settings of one recipe."""

    def __init__(self, lm: LanguageModel, recipe: Recipe) -> None:
        self._folder = _folder()
        self._model = {
            "version": VERSION,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "model": [lm.digest(), str(lm.dtype), lm.device.type],
            "batch_tokens": recipe.corpus.batch_tokens,
        }

    def get(self, conversations: Sequence[Conversation], what: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The tensors kept of `conversations` under `what`, on the CPU; None where there are none, or damaged ones."""
        path = self._path(conversations, what)
        if path is None or not path.is_file():
            return None
        raw = path.read_bytes()
        if hashlib.sha256(raw[_DIGEST:]).hexdigest().encode() != raw[:_DIGEST]:
            logger.warning("%s is damaged and computed again", path)
            return None
        return safetensors.torch.load(raw[_DIGEST:])

    def put(
        self, conversations: Sequence[Conversation], what: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Keep them; a disk that refuses costs nothing but the time of the next evaluation."""
        path = self._path(conversations, what)
        if path is None:
            return
        data = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_bytes(hashlib.sha256(data).hexdigest().encode() + data)
        except (OSError, ResourceError) as error:
            logger.warning("%s is not kept: %s", path, error)

    def _path(self, conversations: Sequence[Conversation], what: Mapping[str, Any]) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(json.dumps({**self._model, **what}, sort_keys=True).encode())
        for conversation in conversations:
            digest.update(len(conversation.token_ids).to_bytes(8, "little"))
            digest.update(conversation.token_ids.tobytes() + conversation.roles.tobytes())
        return self._folder / f"{digest.hexdigest()[:32]}.kept"


def _folder() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwenscope" / "evaluation"
    except RuntimeError:  # a user without a home
        return None
