"""A language model in one GGUF file: what llama.cpp and its kin run, opened as far as transformers can dequantise it.

Weights, config, tokenizer and chat template come from the file. Its revision is its sha256, which a run records and
which is compared when the run's SAEs are used again.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from qwenscope.errors import ModelError
from qwenscope.files import sha256

_NEEDED = ("gguf", "accelerate")


def is_gguf(model: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return Path(model).suffix.lower() == ".gguf" and Path(model).is_file()


def where(path: Path) -> dict[str, Any]:
    """How transformers' `from_pretrained` is told of a checkpoint: its folder, or a GGUF file within one."""
    if not is_gguf(path):
        return {"pretrained_model_name_or_path": path}
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


def checked_revision(path: Path, revision: str | None) -> str:
    """The file's revision, `sha256:` and 64 hex digits.

    Raises:
        ModelError: it is not `revision`, the packages that read the file are missing, or it is no GGUF file.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is no GGUF file, or damaged; fetch it again")
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ModelError(f"{path} needs the package {' and '.join(missing)}; pip install {' '.join(missing)}")
    if too_old():
        raise ModelError(
            f"{path} needs transformers 5.23 or newer, not {transformers.__version__}, to read its tokenizer"
        )
    found = _revision(path, path.stat().st_mtime_ns, path.stat().st_size)
    if revision not in (None, found):
        raise ModelError(
            f"{path} is another file than it was ({found}, not {revision}); restore it, or leave out revision"
        )
    return found


def too_old() -> bool:
    """Whether this transformers stumbles over tokenizers in GGUF files."""
    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)


@lru_cache(maxsize=4)
def _revision(path: Path, _changed: int, _size: int) -> str:
    return f"sha256:{sha256(path)}"


def tensors(path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of the file by transformers' names, dequantised; while a model is built they exist twice."""
    whole = AutoModelForCausalLM.from_pretrained(**where(path), dtype=dtype)
    return dict(whole.state_dict())
