"""Find, verify and load SAEs: a local folder or a Hub repository in, checked `TopKSAE`s out.

A suite is a folder of SAE folders, `<sae_id>/{config.json, weights.safetensors}`: a release, a complete run (below
`saes/`), or a repository in the published layout, whose `config.json` holds `hidden_dim`, `dict_size` and `k` alone.
Nothing here runs code from a file, and nothing outside the given folder is read.

Legend: D hidden, N latents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwenscope.checksums import CHECKSUMS_FILE, verify_listed
from qwenscope.errors import FormatError
from qwenscope.hub import check_repo_id, download, repo_files

if TYPE_CHECKING:
    from qwenscope.sae.topk import TopKSAE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"
_SAE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_CONFIG_LIMIT = 1 << 20


def check_sae_id(sae_id: str) -> str:
    """`sae_id` itself if it is a plain folder name: ASCII letters, digits, `_`, `-`, `.`, at most 64, no dot in front.

    Raises:
        FormatError: anything else, such as `..`, an absolute path, a separator or a control character.
    """
    if not isinstance(sae_id, str) or not _SAE_ID.fullmatch(sae_id):
        raise FormatError(
            f"{sae_id!r} is not an SAE id: at most 64 ASCII letters, digits, '_', '-' and '.', no sign in front"
        )
    return sae_id


def load_sae(
    path_or_repo: str | Path,
    sae_id: str | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
) -> TopKSAE:
    """One verified SAE; see `TopKSAE.from_pretrained`.

    Args:
        path_or_repo: a suite's folder, one SAE's folder (then `sae_id` is None), or `org/name` on the Hub.
        sae_id: which SAE of the suite.
        revision: commit, branch or tag on the Hub; meaningless for a folder.
        device: where the weights go.

    Raises:
        FormatError: no such suite, SAE, file or revision; a checksum, shape, dtype or non-finite value is wrong.
    """
    if sae_id is not None:
        check_sae_id(sae_id)
    root = _local_root(path_or_repo, revision)
    if root is None:
        wanted = [f"{sae_id}/{CONFIG_FILE}", f"{sae_id}/{WEIGHTS_FILE}"] if sae_id else [CONFIG_FILE, WEIGHTS_FILE]
        repo = check_repo_id(str(path_or_repo))
        root = download(repo, revision, [*wanted, CHECKSUMS_FILE])
        if not all((root / name).is_file() for name in wanted):
            _explain_missing(f"{repo} at {revision or 'main'}", sae_id, repo_files(repo, revision))
    folder = _sae_folder(root, sae_id, str(path_or_repo))
    return _read(folder, root, device)


def load_suite(
    path_or_repo: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu"
) -> dict[str, TopKSAE]:
    """Every SAE of a suite by id, in the order of the ids; see `iterate_suite` where one at a time is enough."""
    return dict(iterate_suite(path_or_repo, revision=revision, device=device))


def iterate_suite(
    path_or_repo: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, TopKSAE]]:
    """(sae_id, SAE) pairs of a suite, verified and loaded one at a time.

    A folder that is itself one SAE yields that one, under its own name.

    Raises:
        FormatError: as `load_sae`, or the folder or repository holds no SAE at all.
    """
    root = suite_folder(path_or_repo, revision)
    if (root / WEIGHTS_FILE).is_file():
        sae = _read(root, root, device)
        yield str(sae.config.get("sae_id", root.name)), sae
        return
    for sae_id in suite_ids(root):
        yield sae_id, _read(_sae_folder(root, sae_id, str(path_or_repo)), root, device)


def suite_folder(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder whose sub-folders are the SAEs, downloaded first if `path_or_repo` is a repository."""
    root = _local_root(path_or_repo, revision)
    if root is not None:
        return root
    patterns = [CONFIG_FILE, WEIGHTS_FILE, CHECKSUMS_FILE, f"*/{CONFIG_FILE}", f"*/{WEIGHTS_FILE}"]
    return download(check_repo_id(str(path_or_repo)), revision, patterns)


def suite_ids(root: Path) -> list[str]:
    """Ids of the SAEs in a suite's folder, sorted.

    Raises:
        FormatError: there is none.
    """
    ids = sorted(path.parent.name for path in root.glob(f"*/{WEIGHTS_FILE}") if _SAE_ID.fullmatch(path.parent.name))
    if not ids:
        raise FormatError(f"{root} holds no SAE: no folder with {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    return ids


def _local_root(path_or_repo: str | Path, revision: str | None) -> Path | None:
    """The suite's folder if `path_or_repo` names a local one, None if it is for the Hub."""
    root = Path(path_or_repo)
    if not root.is_dir():
        return None
    if revision is not None:
        raise FormatError(f"{path_or_repo} is a local folder, which has no revision {revision!r}; leave it out")
    if (root / "status.json").is_file() and not (root / "saes").is_dir():
        raise FormatError(f"{path_or_repo} is a run without saes/: it is not complete; go on with --resume")
    return root / "saes" if (root / "saes").is_dir() else root


def _sae_folder(root: Path, sae_id: str | None, shown: str) -> Path:
    """The checked folder of one SAE below `root`; the error names what is missing and which ids exist."""
    folder = root / sae_id if sae_id else root
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        files = [str(path.relative_to(root)) for path in (*root.glob("*/*"), *root.glob("*")) if path.is_file()]
        _explain_missing(shown, sae_id, files)
    return folder


def _explain_missing(shown: str, sae_id: str | None, files: list[str]) -> None:
    """Raise the FormatError that says which file of `sae_id` is missing among `files`, and which SAEs there are."""
    prefix = f"{sae_id}/" if sae_id else ""
    ids = sorted(name.split("/")[0] for name in files if name.count("/") == 1 and name.endswith(f"/{WEIGHTS_FILE}"))
    known = f"it has {', '.join(ids)}" if ids else "it has none"
    missing = [prefix + name for name in (CONFIG_FILE, WEIGHTS_FILE) if prefix + name not in files]
    if sae_id is None and ids:
        raise FormatError(f"{shown} is a suite; say which SAE with sae_id ({known})")
    if len(missing) == 2:
        raise FormatError(f"{shown} has no SAE {sae_id!r} ({known})" if sae_id else f"{shown} holds no SAE")
    raise FormatError(f"{shown}: {missing[0]} is missing; the SAE is incomplete")


def check_inside(paths: Iterable[Path], root: Path) -> None:
    """Refuse symbolic links out of `root`, other than into the blobs of the Hub cache that holds it.

    Raises:
        FormatError: names the link.
    """
    real_root = root.resolve()
    homes = [real_root if real_root.is_dir() else real_root.parent]
    for parent in real_root.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            homes.append(parent.parent / "blobs")
    for path in paths:
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise FormatError(f"{path} is a symbolic link that leaves {root}; replace it by the file itself")


def _read(folder: Path, root: Path, device: str | torch.device) -> TopKSAE:
    """The SAE in `folder`, after checksums, configuration, header and values have been verified."""
    from qwenscope.sae.topk import TopKSAE

    check_inside((folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE), root)
    for listing in {root, folder}:  # a suite lists all its files, a run's SAE its own
        verify_listed(listing, [folder / CONFIG_FILE, folder / WEIGHTS_FILE])
    config = read_config(folder / CONFIG_FILE)
    shapes = weight_shapes(config["hidden_dim"], config["dict_size"])
    weights = read_safetensors(folder / WEIGHTS_FILE, shapes)
    # In memory a latent's decoder direction is one contiguous row, as the sparse decode wants it.
    weights["decoder.weight"] = weights["decoder.weight"].T.contiguous().T
    return TopKSAE.of(config, weights).to(device)


def weight_shapes(hidden_dim: int, dict_size: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the four tensors of `weights.safetensors`."""
    return {
        "encoder.weight": (dict_size, hidden_dim),
        "encoder.bias": (dict_size,),
        "decoder.weight": (hidden_dim, dict_size),
        "pre_bias": (hidden_dim,),
    }


def read_config(path: Path) -> dict[str, Any]:
    """A `config.json`: an object with `hidden_dim`, `dict_size` and `k` as whole numbers, and any further keys.

    Raises:
        FormatError: not JSON, too large, or one of the three is missing, no whole number or impossible.
    """
    if path.stat().st_size > _CONFIG_LIMIT:
        raise FormatError(f"{path} is larger than {_CONFIG_LIMIT:,} bytes; it is no SAE's configuration")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error}); restore it or download it again") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object")
    for key in ("hidden_dim", "dict_size", "k"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"{path}: {key} must be a whole number above 0, not {value!r}")
    if config["k"] > config["dict_size"]:
        raise FormatError(f"{path}: k {config['k']} exceeds dict_size {config['dict_size']}")
    return config


def read_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: tuple[str, ...] = ("F32",)
) -> dict[str, Tensor]:
    """Exactly the tensors named in `shapes`, as float32, after the header was checked and before any value is used.

    Raises:
        FormatError: not a safetensors file, truncated, a tensor is missing or extra, has another shape or a dtype
            outside `dtypes` (safetensors' names), or holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name, shape in shapes.items():
                if name not in names:
                    raise FormatError(
                        f"{path}: tensor {name} is missing; it holds {', '.join(sorted(names)) or 'none'}"
                    )
                found = file.get_slice(name)
                if tuple(found.get_shape()) != shape:
                    raise FormatError(f"{path}: {name} has shape {list(found.get_shape())}, not {list(shape)}")
                if found.get_dtype() not in dtypes:
                    raise FormatError(
                        f"{path}: {name} is {found.get_dtype()}, not {' or '.join(dtypes)}; "
                        "`qwenscope import --from qwenscope` converts it"
                    )
            if extra := sorted(names - set(shapes)):
                raise FormatError(f"{path}: tensor {extra[0]} does not belong to a TopK SAE")
            tensors = {name: file.get_tensor(name).float() for name in shapes}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a whole safetensors file ({error}); download it again") from None
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """FormatError naming file and tensor if a value is NaN or infinite."""
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise FormatError(f"{path}: {name} holds {bad:,} NaN or infinite values; the SAE is unusable")
