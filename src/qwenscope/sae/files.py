"""The files of one SAE, `config.json` and `weights.safetensors`: found, verified, read and written.

A suite is a folder of SAE folders, `<sae_id>/{config.json, weights.safetensors}`: a release, a complete run (below
`saes/`), or a repository in the published layout, whose `config.json` holds `hidden_dim`, `dict_size` and `k` alone.
Nothing here runs code from a file, and nothing outside the given folder is read. Where a configuration is read it is
validated, once: whatever uses it afterwards may rely on `check_config`.

Legend: D hidden, N latents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qwenscope.checksums import CHECKSUMS_FILE, verify_listed
from qwenscope.errors import FormatError
from qwenscope.files import atomic_path, open_safetensors, refused, write_json
from qwenscope.hub import check_repo_id, download, repo_files
from qwenscope.sae.activation import ACTIVATIONS, TopK, activation_of

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"
_SAE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,199}")
_SITE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_CONFIG_LIMIT = 1 << 20
_LARGEST = (1 << 31) - 1
_TEXTS = ("activation", "hook_name", "kind", "model", "model_revision", "sae_id", "site")
_NUMBERS = ("layer", "tokens")


def is_sae_id(name: str) -> bool:
    """Whether `name` is a plain folder name, as `check_sae_id` has it."""
    return _SAE_ID.fullmatch(name) is not None


def check_sae_id(sae_id: str) -> str:
    """`sae_id` itself if it is a plain folder name: ASCII letters, digits, `_`, `-`, `.`, at most 64, no dot in front.

    Raises:
        FormatError: anything else, such as `..`, an absolute path, a separator or a control character.
    """
    if not isinstance(sae_id, str) or not is_sae_id(sae_id):
        raise FormatError(
            f"{sae_id!r} is not an SAE id: at most 64 ASCII letters, digits, '_', '-' and '.', no sign in front"
        )
    return sae_id


def find_sae(path_or_repo: str | Path, sae_id: str | None = None, revision: str | None = None) -> tuple[Path, Path]:
    """The folder of one SAE, downloaded first if it is on the Hub, and the folder of its suite.

    Raises:
        FormatError: no such suite, SAE, file or revision.
        HubError: the Hub stays out of reach.
    """
    if sae_id is not None:
        check_sae_id(sae_id)
    root = local_suite(path_or_repo, revision)
    if root is None:
        wanted = [f"{sae_id}/{CONFIG_FILE}", f"{sae_id}/{WEIGHTS_FILE}"] if sae_id else [CONFIG_FILE, WEIGHTS_FILE]
        repo = check_repo_id(str(path_or_repo))
        root = download(repo, revision, [*wanted, CHECKSUMS_FILE])
        if not all((root / name).is_file() for name in wanted):
            _explain_missing(f"{repo} at {revision or 'main'}", sae_id, repo_files(repo, revision))
    return sae_folder(root, sae_id, str(path_or_repo)), root


def local_suite(path_or_repo: str | Path, revision: str | None) -> Path | None:
    """The suite's folder if `path_or_repo` names a local one, None if it is for the Hub."""
    root = Path(path_or_repo)
    if not root.is_dir():
        return None
    if revision is not None:
        raise FormatError(f"{path_or_repo} is a local folder, which has no revision {revision!r}; leave it out")
    if (root / "status.json").is_file() and not (root / "saes").is_dir():
        raise FormatError(f"{path_or_repo} is a run without saes/: it is not complete; go on with --resume")
    return root / "saes" if (root / "saes").is_dir() else root


def sae_folder(root: Path, sae_id: str | None, shown: str) -> Path:
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


def read_sae(folder: Path, root: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of the SAE in `folder`, after checksums, header and all values were verified.

    Raises:
        FormatError: a checksum, a key, a shape, a dtype or a value is wrong.
    """
    check_inside((folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE), root)
    for listing in {root, folder}:  # a suite lists all its files, a run's SAE its own
        verify_listed(listing, [folder / CONFIG_FILE, folder / WEIGHTS_FILE])
    config = read_config(folder / CONFIG_FILE)
    weights = read_safetensors(folder / WEIGHTS_FILE, weight_shapes(config))
    # In memory a latent's decoder direction is one contiguous row, as the sparse decode wants it.
    weights["decoder.weight"] = weights["decoder.weight"].T.contiguous().T
    return config, weights


def write_sae(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `weights.safetensors` into `folder` (made if missing), each whole or not at all.

    The safetensors metadata carry the configuration too, so that the weights alone say what they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().float().cpu().contiguous() for name, value in weights.items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        # One key: safetensors writes several in an order that changes from call to call, and so the file's sha256.
        save_file(plain, temporary, metadata={"config": json.dumps(config)})
    write_json(folder / CONFIG_FILE, config)


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in `weights.safetensors`."""
    hidden_dim, dict_size = config["hidden_dim"], config["dict_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (dict_size, hidden_dim),
        "encoder.bias": (dict_size,),
        "decoder.weight": (hidden_dim, dict_size),
        "pre_bias": (hidden_dim,),
    }
    if ACTIVATIONS[config.get("activation", TopK.name)].has_threshold:
        shapes["threshold"] = (dict_size,)
    return shapes


def read_config(path: Path) -> dict[str, Any]:
    """A `config.json`, validated by `check_config`.

    Raises:
        FormatError: not JSON, too large, or a key has an impossible value.
    """
    if path.stat().st_size > _CONFIG_LIMIT:
        raise FormatError(f"{path} is larger than {_CONFIG_LIMIT:,} bytes; it is no SAE's configuration")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON ({error}); restore it or download it again") from None
    return check_config(path, config)


def check_config(where: Path, config: Any) -> dict[str, Any]:
    """`config`, without a null model, if it can be an SAE's: its sizes and known keys of their types and ranges.

    `hidden_dim`, `dict_size` and `k` must be there; of other keys those this package reads are checked where they are.

    Raises:
        FormatError: names the first key that is wrong.
    """
    if not isinstance(config, dict):
        raise FormatError(f"{where} is not a JSON object")
    try:
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # NaN, half a surrogate pair, nesting
        raise FormatError(f"{where} holds what JSON cannot ({str(error).splitlines()[0]})") from None
    for key in ("hidden_dim", "dict_size", "k"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
            raise FormatError(f"{where}: {key} must be a whole number above 0, not {_shown(value)}")
    if config["k"] > config["dict_size"]:
        raise FormatError(f"{where}: k {config['k']} exceeds dict_size {config['dict_size']}")
    for key in _NUMBERS:
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63):
            raise FormatError(f"{where}: {key} must be a whole number of at least 0, not {_shown(value)}")
    for key in _TEXTS:
        value = config.get(key)
        if value is not None and (not isinstance(value, str) or not value or not value.isprintable()):
            raise FormatError(f"{where}: {key} must be a line of text, not {_shown(value)}")
    if config.get("sae_id") is not None:
        check_sae_id(config["sae_id"])
    if config.get("site") is not None and not _SITE.fullmatch(config["site"]):
        raise FormatError(f"{where}: site must be names joined by dots, not {_shown(config['site'])}")
    _check_prefixes(where, config)
    activation_of(config.get("activation", TopK.name), config["k"])
    return {key: value for key, value in config.items() if key != "model" or value is not None}


def _check_prefixes(where: Path, config: dict[str, Any]) -> None:
    """FormatError unless the nested dictionaries of a Matryoshka SAE, where it has them, end at ascending latents."""
    prefixes = config.get("prefixes")
    if prefixes is None:
        return
    whole = isinstance(prefixes, list) and prefixes and all(type(latents) is int for latents in prefixes)
    if not whole or prefixes != sorted(set(prefixes)) or not 0 < prefixes[0] <= prefixes[-1] == config["dict_size"]:
        raise FormatError(f"{where}: prefixes must be whole numbers that rise to dict_size, not {_shown(prefixes)}")


def _shown(value: Any) -> str:
    """A value for a message, at most a line of it."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def join_below(root: Path, *names: str) -> Path:
    """`root / names...`, each name one part of a path: letters, digits, `_.@+-`, no sign in front.

    Raises:
        FormatError: a name is more than that, such as `..` or an absolute path.
    """
    for name in names:
        if not _PART.fullmatch(name):
            raise FormatError(f"{_shown(name)} cannot be the name of a file or folder; nothing is written")
    return root.joinpath(*names)


def read_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: tuple[str, ...] = ("F32",)
) -> dict[str, Tensor]:
    """Exactly the tensors named in `shapes`, as float32, after the header was checked and before any value is used.

    Raises:
        FormatError: not a safetensors file, truncated, a tensor is missing or extra, has another shape or a dtype
            outside `dtypes` (safetensors' names), or holds NaN or infinity.
        ResourceError: the operating system refuses to open it.
    """
    try:
        with open_safetensors(path) as file:
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
                raise FormatError(f"{path}: tensor {extra[0]} does not belong to this SAE")
            tensors = {name: file.get_tensor(name).float() for name in shapes}
    except (SafetensorError, FileNotFoundError) as error:
        raise FormatError(f"{path} is not a whole safetensors file ({error}); download it again") from None
    except OSError as error:
        raise refused(error, path) or error from None
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """FormatError naming file and tensor if a value is NaN or infinite."""
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise FormatError(f"{path}: {name} holds {bad:,} NaN or infinite values; the SAE is unusable")
