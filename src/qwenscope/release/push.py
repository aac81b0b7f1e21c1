"""Publish a release on the Hugging Face Hub, and fetch one whole.

Files go up one by one, then become visible in a single commit, which is read back and compared before the tag is set,
last. Whatever dies in between, the next `push` goes on where the Hub's state says it stopped; a push of what is there
already changes nothing. Tokens come from HF_TOKEN or the login and are never shown.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.hf_api import RepoFile

from qwenscope.checksums import CHECKSUMS_FILE, verify_folder
from qwenscope.errors import FormatError, HubError
from qwenscope.files import below, disk_errors_named, fsync_folder, read_object, sha256
from qwenscope.hub import asked, check_repo_id
from qwenscope.release.package import bind
from qwenscope.sae.loading import suite_ids
from qwenscope.sae.sae import SAE

logger = logging.getLogger(__name__)

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEPT = frozenset((".gitattributes", ".gitignore"))  # the Hub's own files, left alone
_ATTEMPTS = 3  # of pulling files that arrive damaged


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a repository at a commit."""

    size: int
    sha256: str | None
    """Of files in large storage; the others have the blob id alone."""
    blob_id: str


def push(folder: Path, repo: str, *, tag: str = "v1", dry_run: bool = False) -> list[str]:
    """Publish a release folder.

    Args:
        folder: made by `release`; its card and notebook are rewritten to name `repo`, if they do not yet.
        repo: `org/name`, created (public) if it does not exist. Files there that are not in `folder` are removed.
        tag: marks the finished release; set last, never moved.
        dry_run: change nothing and send nothing, only list what would be uploaded.

    Returns:
        Lines for the terminal: one per file with its size, and what was done.

    Raises:
        FormatError: `folder` is no whole release, or holds files that its SHA256SUMS does not list.
        HubError: no token, no access, `tag` marks another state, or the Hub stays out of reach; push again.
    """
    check_repo_id(repo)
    if not _TAG.fullmatch(tag):
        raise HubError(f"{tag!r} is no tag: letters, digits, '.', '_' and '-', at most 64")
    files = _checked_files(folder)
    if dry_run:
        return [*_listed(folder, files), f"dry run: {len(files)} files would go to {repo}, tagged {tag}"]
    if get_token() is None:
        raise HubError(f"no token to push to {repo} with; log in with `hf auth login` or set HF_TOKEN")
    if read_object(folder / "config.json").get("repo") != repo:
        bind(folder, repo)
    lines = _listed(folder, files)
    api, local = HfApi(), {name: _local_entry(folder / name) for name in files}
    asked(lambda: api.create_repo(repo, exist_ok=True), repo)
    tagged = _tags(api, repo).get(tag)
    if tagged is not None:
        if _differing(local, _remote(api, repo, tagged)):
            raise HubError(f"{repo}: tag {tag} marks another release; push this one under another --tag")
        return [*lines, f"{repo} has this release already, tagged {tag}"]
    commit = _upload(api, folder, repo, local)
    asked(lambda: _set_tag(api, repo, tag, commit), repo)
    return [*lines, f"pushed {len(files)} files to {repo} at {commit[:12]}, tagged {tag}"]


def pull(repo: str, out: Path, *, revision: str | None = None) -> None:
    """Fetch a whole suite; `out` appears only when every file is there and verified. Run again to go on.

    Args:
        repo: `org/name`.
        out: a new or empty folder; one that holds this very release is left as it is.
        revision: commit, branch or tag; None takes the main branch, which only ever shows whole releases.

    Raises:
        HubError: no such repository or revision, or the Hub stays out of reach; what was fetched is kept for the
            next try, beside `out`.
        FormatError: `out` holds something else, or a file arrives damaged, hostile or not as its checksum says.
    """
    check_repo_id(repo)
    api, what = HfApi(), f"{repo} at {revision or 'main'}"
    commit = str(asked(lambda: api.model_info(repo, revision=revision), what).sha)
    entries = _remote(api, repo, commit)
    _check_names(repo, entries)
    entries = {name: entry for name, entry in entries.items() if name not in _KEPT}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _wrong_files(out, entries):
            raise FormatError(f"{out} is not empty and does not hold {what}; choose another folder")
        return
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    if partial.is_symlink():
        raise FormatError(f"{partial} is a link; remove it")
    for _ in range(_ATTEMPTS):
        with disk_errors_named(out, sum(entry.size for entry in entries.values())):
            asked(lambda: _fetch(repo, commit, partial), what)
        wrong = _wrong_files(partial, entries)
        if not wrong:
            break
        for name in wrong:
            (partial / name).unlink(missing_ok=True)
    else:
        raise FormatError(f"{repo}: {wrong[0]} keeps arriving damaged; try again later")
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    _verify_suite(partial)
    os.replace(partial, out.absolute())
    fsync_folder(out.absolute().parent)


def _fetch(repo: str, commit: str, folder: Path) -> None:
    """Download what `folder` lacks of a commit."""
    snapshot_download(repo, revision=commit, local_dir=folder, ignore_patterns=sorted(_KEPT))


def _checked_files(folder: Path) -> list[str]:
    """Relative paths of a release's files, all verified and all listed in its SHA256SUMS."""
    if not (folder / "README.md").is_file() or not (folder / "config.json").is_file():
        raise FormatError(f"{folder} is no release folder; build one with `qwenscope release`")
    verify_folder(folder)
    listed = {line[66:] for line in (folder / CHECKSUMS_FILE).read_text(encoding="utf-8").splitlines()}
    files = sorted(path.relative_to(folder).as_posix() for path in below(folder) if not path.is_dir())
    if strange := [name for name in files if name not in listed and name != CHECKSUMS_FILE]:
        raise FormatError(f"{folder / strange[0]} is no part of the release; remove it before pushing")
    return files


def _listed(folder: Path, files: list[str]) -> list[str]:
    return [f"{(folder / name).stat().st_size:>14,}  {name}" for name in files]


def _upload(api: HfApi, folder: Path, repo: str, local: Mapping[str, Entry]) -> str:
    """Bring the main branch to exactly `local` in one commit; returns its id. Safe to repeat at any point."""

    def commit() -> str:
        head = str(api.model_info(repo).sha)
        remote = _remote(api, repo, head)
        changed = [name for name, entry in local.items() if not _same(entry, remote.get(name))]
        gone = [name for name in remote if name not in local and name not in _KEPT]
        if not changed and not gone:
            return head
        additions = [CommitOperationAdd(name, folder / name) for name in changed]
        for addition in additions:
            logger.info("%s: %s", repo, addition.path_in_repo)
            api.preupload_lfs_files(repo, [addition], free_memory=False)
        with warnings.catch_warnings():  # the Hub client wonders about Parquet in a model repository
            warnings.simplefilter("ignore", UserWarning)
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *additions,
                *(CommitOperationDelete(name) for name in gone),
            ]
            return str(api.create_commit(repo, operations, commit_message="Release", parent_commit=head).oid)

    done = asked(commit, repo)
    if wrong := _differing(local, _remote(api, repo, done)):
        raise HubError(f"{repo} at {done[:12]}: {wrong[0]} is not what was pushed; nothing was tagged, push again")
    return done


def _set_tag(api: HfApi, repo: str, tag: str, commit: str) -> None:
    """Tag `commit`, unless an earlier try whose answer got lost has done it."""
    target = _tags(api, repo).get(tag)
    if target is None:
        api.create_tag(repo, tag=tag, revision=commit)
    elif target != commit:
        raise HubError(f"{repo}: tag {tag} marks another release; push this one under another --tag")


def _tags(api: HfApi, repo: str) -> dict[str, str]:
    """Commit by tag."""
    return {ref.name: ref.target_commit for ref in asked(lambda: api.list_repo_refs(repo), repo).tags}


def _remote(api: HfApi, repo: str, revision: str) -> dict[str, Entry]:
    """Files of the repository at `revision`."""

    def tree() -> list[RepoFile]:
        found = api.list_repo_tree(repo, revision=revision, recursive=True)
        return [entry for entry in found if isinstance(entry, RepoFile)]

    return {
        entry.path: Entry(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in asked(tree, f"{repo} at {revision}")
    }


def _local_entry(path: Path) -> Entry:
    return Entry(path.stat().st_size, sha256(path), _blob_id(path))


def _blob_id(path: Path) -> str:
    """Git's name of the file's content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _same(local: Entry, remote: Entry | None) -> bool:
    if remote is None or local.size != remote.size:
        return False
    return local.sha256 == remote.sha256 if remote.sha256 else local.blob_id == remote.blob_id


def _differing(local: Mapping[str, Entry], remote: Mapping[str, Entry]) -> list[str]:
    """Names of files that are not the same on both sides."""
    names = {*local, *(name for name in remote if name not in _KEPT)}
    return sorted(name for name in names if name not in local or not _same(local[name], remote.get(name)))


def _wrong_files(folder: Path, entries: Mapping[str, Entry]) -> list[str]:
    """Names of files of a commit that `folder` lacks or holds with other bytes."""
    return [
        name
        for name, entry in entries.items()
        if not (folder / name).is_file() or not _same(_local_entry(folder / name), entry)
    ]


def _check_names(repo: str, entries: Mapping[str, Entry]) -> None:
    """Refuse repositories whose paths could leave the folder they are fetched into."""
    for name in entries:
        parts = PurePosixPath(name).parts
        plain = name.isprintable() and "\\" not in name and ":" not in name and not name.startswith("/")
        if not plain or ".." in parts or name != "/".join(parts):
            raise FormatError(f"{repo} holds a file named {name!r}, which is refused; nothing was fetched")


def _verify_suite(folder: Path) -> None:
    """Load every SAE as a reader would, and compare with the release's own checksums where it has them."""
    if (folder / CHECKSUMS_FILE).is_file():
        verify_folder(folder)
    for sae_id in suite_ids(folder):
        SAE.from_pretrained(folder, sae_id)
