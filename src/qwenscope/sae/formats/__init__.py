"""One registry of formats: SAEs out to, and in from, other libraries. docs/formats.md describes each.

An export is a loop over a suite's SAEs, an import a search for SAEs in a folder or repository; both hold one SAE in
memory at a time, and what they write appears whole or not at all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenscope.checksums import write_checksums
from qwenscope.errors import FormatError
from qwenscope.files import below, public_name, whole_folder
from qwenscope.hub import check_repo_id, download
from qwenscope.sae.files import CONFIG_FILE, WEIGHTS_FILE, check_inside, check_sae_id, join_below
from qwenscope.sae.formats import (
    dictionary_learning,
    directions,
    gemma_scope,
    llama_scope,
    neuronpedia,
    published,
    qwen_scope,
    saelens,
    sparsify,
)
from qwenscope.sae.formats.common import Parts, build
from qwenscope.sae.formats.directions import Push
from qwenscope.sae.formats.hooks import norm_of, refuse_difference
from qwenscope.sae.loading import iterate_suite
from qwenscope.sae.sae import SAE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Format:
    """How SAEs of one format are found, read and written."""

    files: tuple[str, ...] = ()
    """Names (or glob patterns) of one SAE's files; the first tells where an SAE is."""
    read: Callable[[Path, str], Parts] | None = None
    """(path of the first file, name of the folder or repository) -> the SAE; None: not to be imported from."""
    write: Callable[[SAE, str, Path, str | Path], object] | None = None
    """(SAE, its id, the export's folder, the suite it is of); None: not to be exported to."""
    activations: tuple[str, ...] | None = None
    """Those that can be written in it; None: any."""


FORMATS: dict[str, Format] = {
    "saelens": Format(
        (saelens.WEIGHTS, saelens.CONFIG, saelens.SCALER),
        lambda path, _: saelens.read(path.parent),
        lambda sae, sae_id, out, _: saelens.write(sae, join_below(out, sae_id)),
        tuple(saelens.ARCHITECTURES),
    ),
    "sparsify": Format(
        (sparsify.WEIGHTS, sparsify.CONFIG),
        lambda path, _: sparsify.read(path.parent),
        lambda sae, sae_id, out, _: sparsify.write(sae, sae_id, out),
        sparsify.ACTIVATIONS,
    ),
    "dictionary_learning": Format(
        (dictionary_learning.WEIGHTS, dictionary_learning.CONFIG),
        lambda path, _: dictionary_learning.read(path.parent),
        lambda sae, sae_id, out, _: dictionary_learning.write(sae, join_below(out, sae_id)),
        tuple(dictionary_learning.WRITTEN),
    ),
    "neuronpedia": Format(write=neuronpedia.write),
    "qwen-scope": Format(("layer*.sae.pt",), qwen_scope.read),
    "gemma-scope": Format((gemma_scope.PARAMS,), gemma_scope.read),
    "llama-scope": Format((llama_scope.CONFIG, llama_scope.WEIGHTS), lambda path, _: llama_scope.read(path.parent)),
    "qwenscope": Format((WEIGHTS_FILE, CONFIG_FILE), lambda path, _: published.read(path.parent)),
}
EXPORTS = tuple(name for name, known in FORMATS.items() if known.write)
IMPORTS = tuple(name for name, known in FORMATS.items() if known.read)
OF_LATENTS: dict[str, Callable[[Mapping[str, SAE], Sequence[Push], Path], None]] = {
    "control-vector": directions.write_control_vector,
    "directions": directions.write_directions,
}
"""Formats that hold chosen latents of a suite rather than its SAEs."""


def export_sae(sae: SAE, sae_id: str, to: str, out: Path, suite: str | Path) -> None:
    """Write one SAE of `suite` in another library's format, below `out`.

    Raises:
        FormatError: no such format, an activation that it does not have, or names that would lead out of `out`.
    """
    write, known = _known(to, EXPORTS, "exported to").write, FORMATS[to].activations
    assert write is not None
    refuse_difference(sae.config, sae_id, to)
    beyond = "transcoders" if "target" in sae.config else norm_of(sae.config) and "rows normalised one by one"
    if beyond and to != "saelens":
        raise FormatError(f"{sae_id}: {to} has no {beyond}, only saelens has")
    if known is not None and sae.activation.name not in known:
        raise FormatError(f"{sae_id}: {to} has no activation {sae.activation.name}, only {', '.join(known)}")
    if "model" in sae.config:
        sae.config["model"] = public_name(sae.config["model"])
    write(sae, sae_id, out, suite)


def export_suite(target: str | Path, to: str, out: Path) -> None:
    """Write every SAE of a run, release or repository in another library's format, one folder each below `out`.

    Args:
        target: what `load_suite` takes.
        to: one of `EXPORTS`.
        out: a new or empty folder.

    Raises:
        FormatError: as `export_sae`; no SAE in `target`, or `out` is not empty.
    """
    _known(to, EXPORTS, "exported to")
    with whole_folder(out) as temporary:
        for sae_id, sae in iterate_suite(target):
            sae.config.setdefault("sae_id", sae_id)
            export_sae(sae, sae_id, to, temporary, target)


def export_latents(target: str | Path, to: str, pushes: Sequence[Push], out: Path) -> None:
    """Write the directions of chosen latents of a run, release or repository.

    Args:
        target: what `load_suite` takes.
        to: one of `OF_LATENTS`.
        pushes: the latents, at least one.
        out: a new or empty folder.

    Raises:
        FormatError: no latents, or as the format has it; then nothing is written.
        ResourceError: the format needs a package that is not installed.
    """
    if not pushes:
        raise FormatError(f"{to} holds chosen latents; name them by --sae and --latent")
    chosen = {push.sae_id for push in pushes}
    saes = {sae_id: sae for sae_id, sae in iterate_suite(target) if sae_id in chosen}
    if missing := sorted(chosen - saes.keys()):
        raise FormatError(f"{target} has no SAE {missing[0]}")
    with whole_folder(out) as temporary:
        OF_LATENTS[to](saes, pushes, temporary)


def import_suite(source: str | Path, origin: str, out: Path) -> None:
    """Read every SAE in a folder, file or Hub repository of another library, and write a suite of ours to `out`.

    Args:
        source: a folder (searched whole), one file, `org/name` on the Hub, or `org/name/path` for a part of it.
        origin: one of `IMPORTS`.
        out: a new or empty folder.

    Raises:
        FormatError: no such format, nothing found, a file that is damaged or hostile, or an SAE that
            cannot be represented; then nothing is written.
        HubError: no such repository, or the Hub stays out of reach.
    """
    read, files = _known(origin, IMPORTS, "imported from").read, FORMATS[origin].files
    assert read is not None
    root, name = _fetch(str(source), files)
    seen: set[str] = set()
    with whole_folder(out) as temporary:
        for path in _find(root, files[0]):
            check_inside((path, *(path.parent / other for other in files[1:])), root)
            parts = read(path, name)
            sae_id = check_sae_id(parts.config.get("sae_id") or _name_of(path, root, name))
            if sae_id in seen:
                raise FormatError(f"{source} holds two SAEs called {sae_id}; import their folders one by one")
            seen.add(sae_id)
            sae = build(parts, origin)
            sae.config["sae_id"] = sae_id
            sae.save(temporary / sae_id)
            logger.info("imported %s", sae_id)
        if not seen:
            raise FormatError(f"{source} holds no {files[0]}; is it of the format {origin}?")
        write_checksums(temporary)


def _known(name: str, names: tuple[str, ...], verb: str) -> Format:
    if name not in names:
        raise FormatError(f"SAEs cannot be {verb} {name!r}; choose one of {', '.join(names)}")
    return FORMATS[name]


def _fetch(source: str, files: tuple[str, ...]) -> tuple[Path, str]:
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
    patterns = [f"{prefix}{pattern}" for file in files for pattern in (file, f"*/{file}")]
    root = download(repo, None, [inside, *patterns] if inside else patterns)
    return root / inside, repo


def _find(root: Path, marker: str) -> Iterator[Path]:
    """Files that mark an SAE, sorted."""
    if root.is_file():
        if not root.match(marker):
            raise FormatError(f"{root} is not named {marker}")
        yield root
    elif root.is_dir():
        yield from sorted(path for path in below(root) if path.match(marker) and path.is_file())


def _name_of(path: Path, root: Path, name: str) -> str:
    """An SAE id from where the SAE was found: its folders joined by dots, or the source's own name."""
    parts = path.parent.relative_to(root).parts if root.is_dir() else ()
    text = ".".join(parts) or Path(name).name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip("_.-")[:64] or "sae"
