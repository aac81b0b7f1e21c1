"""How many of the releases in SAELens' registry are of kinds that `qwenscope import` opens; docs/formats.md has them.

    PYTHONPATH=src .venv/bin/python bench/peers/registry.py PEERS

Reads `pretrained_saes.yaml` of the sae-lens in PEERS/saelens, which names release, loader, model, repository and path
of each SAE. What it leaves to the files on the Hub (the architecture of releases in SAELens' format, the layer norm of
the "v5" SAEs of GPT-2 small) is taken from SAELens' loaders and the releases' own descriptions: all of it is opened.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from qwenscope.errors import FormatError
from qwenscope.sae.formats import gemma_scope
from qwenscope.sae.formats.hooks import NORMS, site_of

OPEN = "opened"
LOADERS = {
    "mntss_clt_layer_transcoder": "cross-layer transcoder",
    "temporal": "temporal",
    "dictionary_learning_1": OPEN,
    "llama_scope": OPEN,
    "qwen_scope": OPEN,
    "llama_scope_r1_distill": OPEN,
    "goodfire": OPEN,
    "deepseek_r1": OPEN,
    "connor_rob_hook_z": OPEN,
    "mwhanna_transcoder": OPEN,
}
"""The last five by way of SAELens, which loads them by name and saves them as its own."""


def kind_of(about: dict[str, Any], sae: dict[str, Any]) -> str:
    """`OPEN`, or why an SAE of the registry is refused."""
    loader, path = about.get("conversion_func"), str(sae["path"])
    if loader in ("gemma_2", "gemma_2_transcoder", "gemma_3"):
        try:
            gemma_scope.described(Path(path, "params.npz"), f"{about['repo_id']}/{path}")
        except FormatError as error:
            found = re.search(r": (\w+) is refused", str(error))
            return found[1] if found else str(error)
        return OPEN
    if loader is not None:
        return LOADERS[loader]
    overrides = (about.get("config_overrides") or {}) | (sae.get("config_overrides") or {})
    if overrides.get("normalize_activations", "none") not in ("none", *NORMS.values()):
        return f"normalize_activations={overrides['normalize_activations']}"
    hook = re.search(r"blocks\.\d+\.hook_[a-z]+_[a-z]+", str(sae["id"]))
    return OPEN if hook is None or site_of(hook[0], about["model"]) else "embedding"


def count(registry: Path) -> tuple[Counter[str], Counter[str]]:
    """How many releases, by what most of their SAEs are, and how many SAEs are of each kind."""
    releases, saes = Counter[str](), Counter[str]()
    for about in yaml.load(registry.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)).values():
        kinds = Counter(kind_of(about, sae) for sae in about["saes"])
        releases[kinds.most_common(1)[0][0]] += 1
        saes += kinds
    return releases, saes


def registry_of(peers: Path) -> Path:
    """Where the environment of SAELens has its registry."""
    (path,) = (peers / "saelens").glob("lib/python3*/site-packages/sae_lens/pretrained_saes.yaml")
    return path


if __name__ == "__main__":
    for name, found in zip(("releases", "SAEs"), count(registry_of(Path(sys.argv[1]))), strict=True):
        total = sum(found.values())
        print(f"{total:,} {name}: {found[OPEN] / total:.1%} opened")
        for kind, number in found.most_common():
            print(f"  {number:6,} {kind}")
