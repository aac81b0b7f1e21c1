"""One registry of formats: SAEs out to, and in from, other libraries. docs/formats.md describes each.

An export is a loop over a suite's SAEs, an import a search for SAEs in a folder or repository; both hold one SAE in
memory at a time, and what they write appears whole or not at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qwenscope.checksums import write_checksums
from qwenscope.errors import FormatError
from qwenscope.files import whole_folder
from qwenscope.hub import check_repo_id, download
from qwenscope.sae.formats import dictionary_learning, neuronpedia, published, qwen_scope, saelens, sparsify
from qwenscope.sae.formats.common import Parts, build
from qwenscope.sae.loading import CONFIG_FILE, WEIGHTS_FILE, check_inside, check_sae_id, iterate_suite
from qwenscope.sae.topk import TopKSAE

log = logging.getLogger(__name__)

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Importer:
    """How SAEs of one format are found and read."""

    files: tuple[str, ...]
    """Names (or glob patterns) of one SAE's files; the first tells where an SAE is."""
    read: Callable[[Path, str], Parts]
    """(path of the first file, name of the folder or repository) -> the SAE."""


EXPORTERS: dict[str, Callable[[TopKSAE, str, Path], object]] = {
    "saelens": lambda sae, sae_id, out: saelens.write(sae, out / sae_id),
    "sparsify": lambda sae, sae_id, out: sparsify.write(sae, out / sae_id),
    "dictionary_learning": lambda sae, sae_id, out: dictionary_learning.write(sae, out / sae_id),
    "neuronpedia": neuronpedia.write,
}
IMPORTERS: dict[str, Importer] = {
    "saelens": Importer((saelens.WEIGHTS, saelens.CONFIG), lambda path, _: saelens.read(path.parent)),
    "sparsify": Importer((sparsify.WEIGHTS, sparsify.CONFIG), lambda path, _: sparsify.read(path.parent)),
    "dictionary_learning": Importer(
        (dictionary_learning.WEIGHTS, dictionary_learning.CONFIG), lambda path, _: dictionary_learning.read(path.parent)
    ),
    "qwen-scope": Importer(("layer*.sae.pt",), qwen_scope.read),
    "qwenscope": Importer((WEIGHTS_FILE, CONFIG_FILE), lambda path, _: published.read(path.parent)),
}


def export_suite(target: str | Path, to: str, out: Path) -> None:
    """Write every SAE of a run, release or repository in another library's format, one folder each below `out`.

    Args:
        target: what `load_suite` takes.
        to: a key of `EXPORTERS`.
        out: a new or empty folder.

    Raises:
        FormatError: no such format, no SAE in `target`, or `out` is not empty.
    """
    write = _lookup(EXPORTERS, to, "exported to")
    with whole_folder(out) as temporary:
        for sae_id, sae in iterate_suite(target):
            sae.config.setdefault("sae_id", sae_id)
            write(sae, sae_id, temporary)


def import_suite(source: str | Path, origin: str, out: Path) -> None:
    """Read every SAE in a folder, file or Hub repository of another library, and write a suite of ours to `out`.

    Args:
        source: a folder (searched whole), one file, `org/name` on the Hub, or `org/name/path` for a part of it.
        origin: a key of `IMPORTERS`.
        out: a new or empty folder.

    Raises:
        FormatError: no such format, nothing found, a file that is damaged or hostile, or an SAE that a TopK SAE
            cannot represent; then nothing is written.
        HubError: no such repository, or the Hub stays out of reach.
    """
    importer = _lookup(IMPORTERS, origin, "imported from")
    root, name = _fetch(str(source), importer)
    seen: set[str] = set()
    with whole_folder(out) as temporary:
        for path in _find(root, importer):
            check_inside((path, *(path.parent / other for other in importer.files[1:])), root)
            parts = importer.read(path, name)
            sae_id = check_sae_id(parts.config.get("sae_id") or _name_of(path, root, name))
            if sae_id in seen:
                raise FormatError(f"{source} holds two SAEs called {sae_id}; import their folders one by one")
            seen.add(sae_id)
            sae = build(parts, origin)
            sae.config["sae_id"] = sae_id
            sae.save(temporary / sae_id)
            log.info("imported %s", sae_id)
        if not seen:
            raise FormatError(f"{source} holds no {importer.files[0]}; is it of the format {origin}?")
        write_checksums(temporary)


def _lookup(registry: Mapping[str, Entry], name: str, verb: str) -> Entry:
    if name not in registry:
        raise FormatError(f"SAEs cannot be {verb} {name!r}; choose one of {', '.join(registry)}")
    return registry[name]


def _fetch(source: str, importer: Importer) -> tuple[Path, str]:
    """The local folder or file to search, and a text that holds the repository's name."""
    local = Path(source)
    if local.exists():
        return local, str(local.resolve())
    org, slash, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    repo = check_repo_id(org + slash + name)
    if ".." in inside.split("/"):
        raise FormatError(f"{source}: a path inside a repository has no '..'")
    prefix = f"{inside.rstrip('/')}/" if inside else ""
    patterns = [f"{prefix}{pattern}" for file in importer.files for pattern in (file, f"*/{file}")]
    root = download(repo, None, [inside, *patterns] if inside else patterns)
    return root / inside, repo


def _find(root: Path, importer: Importer) -> Iterator[Path]:
    """Files that mark an SAE, sorted."""
    if root.is_file():
        if not root.match(importer.files[0]):
            raise FormatError(f"{root} is not named {importer.files[0]}")
        yield root
    else:
        yield from sorted(path for path in root.rglob(importer.files[0]) if path.is_file())


def _name_of(path: Path, root: Path, name: str) -> str:
    """An SAE id from where the SAE was found: its folders joined by dots, or the source's own name."""
    parts = path.parent.relative_to(root).parts if root.is_dir() else ()
    text = ".".join(parts) or Path(name).name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip("_.-")[:64] or "sae"
