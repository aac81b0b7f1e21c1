"""Other libraries' files of tensors, read without running code from them: safetensors, pickles, NumPy's archives."""

from __future__ import annotations

import pickle
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qwenscope.errors import FormatError, reason
from qwenscope.files import atomic_path, open_safetensors
from qwenscope.sae.files import check_finite

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NOT_ARRAYS = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, OverflowError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
_DENSEST = 64
"""Bytes of arrays to one of their archive beyond which it is no file of weights: those hardly compress."""


def read_pickle(path: Path, names: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors of a `torch.save`d state dict, by torch's restricted unpickler: no code in the file can run.

    Args:
        path: the file.
        names: the floating tensors it must hold, with their numbers of dimensions; further tensors are kept.

    Raises:
        FormatError: not such a file, code in the pickle, a tensor is missing, of another rank or type, or not finite.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split(".")[0].splitlines()[0]
        raise FormatError(f"{path} is refused: its pickle asks for more than tensors ({reason})") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise FormatError(f"{path} is not a whole file of tensors ({error}); download it again") from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    _check_tensors(path, tensors, names)
    return tensors


def read_tensors(path: Path, names: Mapping[str, int], optional: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, which must be those in `names`, and may be those in `optional`.

    Raises:
        FormatError: as `read_pickle`, or a tensor that is none of them.
    """
    optional = optional or {}
    try:
        with open_safetensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a whole safetensors file ({error}); download it again") from None
    refuse_extra(path, tensors, {*names, *optional})
    _check_tensors(path, tensors, {**names, **{name: optional[name] for name in optional if name in tensors}})
    return tensors


def read_npz(path: Path, names: Mapping[str, int]) -> dict[str, Tensor]:
    """All arrays of an .npz, which must be exactly those in `names`; nothing pickled is ever loaded.

    Raises:
        FormatError: not such a file, an array that unpacks to far more than the file holds or is of Python objects, or
            as `read_tensors`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > _DENSEST * path.stat().st_size:
            raise FormatError(f"{path} unpacks to {unpacked:,} bytes; weights do not compress so far, it is refused")
        with np.load(path, allow_pickle=False) as arrays:
            refuse_extra(path, arrays.files, names)
            tensors = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except _NOT_ARRAYS as error:
        raise FormatError(f"{path} is no whole archive of plain arrays ({reason(error)}); download it again") from None
    _check_tensors(path, tensors, names)
    return tensors


def refuse_extra(path: Path, found: Iterable[str], known: Iterable[str]) -> None:
    """FormatError naming the first tensor in `found` that is not `known`."""
    if extra := sorted(set(found) - set(known)):
        raise FormatError(f"{path}: tensor {extra[0]} cannot be represented here")


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, int]) -> None:
    for name, dimensions in names.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise FormatError(f"{path}: tensor {name} is missing; it holds {', '.join(sorted(tensors)) or 'none'}")
        if tensor.dtype not in _FLOATS or tensor.dim() != dimensions or not tensor.numel() or tensor.is_sparse:
            kind = f"{list(tensor.shape)} of {tensor.dtype}"
            raise FormatError(f"{path}: {name} is {kind}, not a floating tensor of {dimensions} dimensions")
        check_finite(path, name, tensor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous float32 tensors as safetensors, whole or not at all."""
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})
