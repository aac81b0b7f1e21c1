"""Load SAEs: a local folder or a Hub repository in, checked ones out; `files` says what is checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from qwenscope.checksums import CHECKSUMS_FILE
from qwenscope.errors import FormatError
from qwenscope.hub import check_repo_id, download
from qwenscope.sae.files import CONFIG_FILE, WEIGHTS_FILE, is_sae_id, local_suite, read_sae, sae_folder
from qwenscope.sae.sae import SAE


def load_suite(
    path_or_repo: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu"
) -> dict[str, SAE]:
    """Every SAE of a suite by id, in the order of the ids; see `iterate_suite` where one at a time is enough."""
    return dict(iterate_suite(path_or_repo, revision=revision, device=device))


def iterate_suite(
    path_or_repo: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu"
) -> Iterator[tuple[str, SAE]]:
    """(sae_id, SAE) pairs of a suite, verified and loaded one at a time.

    A folder that is itself one SAE yields that one, under its own name.

    Raises:
        FormatError: as `SAE.from_pretrained`, or the folder or repository holds no SAE at all.
    """
    root = suite_folder(path_or_repo, revision)
    if (root / WEIGHTS_FILE).is_file():
        sae = SAE.of(*read_sae(root, root)).to(device)
        yield sae.config.get("sae_id") or root.resolve().name, sae
        return
    for sae_id in suite_ids(root):
        yield sae_id, SAE.of(*read_sae(sae_folder(root, sae_id, str(path_or_repo)), root)).to(device)


def suite_folder(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The local folder whose sub-folders are the SAEs, downloaded first if `path_or_repo` is a repository."""
    root = local_suite(path_or_repo, revision)
    if root is not None:
        return root
    patterns = [CONFIG_FILE, WEIGHTS_FILE, CHECKSUMS_FILE, f"*/{CONFIG_FILE}", f"*/{WEIGHTS_FILE}"]
    return download(check_repo_id(str(path_or_repo)), revision, patterns)


def suite_ids(root: Path) -> list[str]:
    """Ids of the SAEs in a suite's folder, sorted.

    Raises:
        FormatError: there is none.
    """
    ids = sorted(path.parent.name for path in root.glob(f"*/{WEIGHTS_FILE}") if is_sae_id(path.parent.name))
    if not ids:
        raise FormatError(f"{root} holds no SAE: no folder with {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    return ids
