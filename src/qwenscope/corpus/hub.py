"""Datasets on the Hugging Face Hub as shards: resolved once to a commit, streamed by row group.

Parquet is read in ranges of just the columns needed; JSON lines are fetched whole into the Hub's cache, which checks
their size. The `datasets` library is not in this path: its streaming neither seeks by row group nor leaves out nested
columns (WildChat's address hashes would reach memory), and its JSON reader changes floats.
"""

from __future__ import annotations

import re
from functools import partial
from typing import IO, Any

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from qwenscope.corpus.shards import SUFFIXES, Shard
from qwenscope.errors import CorpusError
from qwenscope.hub import retrying

REPOSITORIES = {
    "ultrachat": "HuggingFaceH4/ultrachat_200k",
    "wildchat": "allenai/WildChat-1M",
    "tool_use": "zactheaipm/agent-tool-use-synthetic",
}

_TRAIN = re.compile(r"(?:^|[^a-z])train(?:[^a-z]|$)")


def hub_shards(
    repo: str, revision: str | None, where: str, by_card: bool, config: str | None
) -> tuple[str, list[Shard]]:
    """The commit that `revision` names (None: the newest), and the data files in it.

    Args:
        by_card: only the files of one configuration, as the card declares it, and of these the training split.
        config: its name; None takes the default one.

    Raises:
        CorpusError: no such dataset, revision or configuration, no access, or no data file.
        HubError: the Hub keeps failing.
    """
    try:
        info = retrying(lambda: HfApi().dataset_info(repo, revision=revision), where)
    except (HfHubHTTPError, HFValidationError) as error:
        problem = " ".join(str(error).split())[:200]
        raise CorpusError(
            f"{where} cannot be opened ({problem}); correct repo and revision, or log in for access"
        ) from error
    names = [entry.rfilename for entry in info.siblings or () if entry.rfilename.endswith(SUFFIXES)]
    if names and by_card:
        card: dict[str, Any] = info.card_data.to_dict() if info.card_data else {}  # type: ignore[no-untyped-call]
        names = _training_files(names, card.get("configs"), config, where)
    if info.sha is None or not names:
        raise CorpusError(
            f"{where} holds no {', '.join(SUFFIXES)} file; the Hub's own conversion of a dataset to parquet is read "
            "with revision: refs/convert/parquet and the config's name"
        )
    return info.sha, [Shard(name, partial(_open, repo, info.sha, name)) for name in names]


def _training_files(names: list[str], declared: Any, config: str | None, where: str) -> list[str]:
    """The files of one configuration: those that the card lists for it, or its folder; of these the training split."""
    configs = {str(entry.get("config_name")): entry for entry in declared or () if isinstance(entry, dict)}
    if config is None and configs:
        default = [name for name, entry in configs.items() if entry.get("default") or name == "default"]
        if not default and len(configs) > 1:
            raise CorpusError(f"{where} has the configs {', '.join(sorted(configs))[:300]}; name one with config")
        config = default[0] if default else next(iter(configs))
    if config in configs:
        patterns = _patterns(configs[config])
        names = [name for name in names if any(pattern.fullmatch(name) for pattern in patterns)]
    elif config is not None:
        names = [name for name in names if name.startswith(f"{config}/")]
        if not names:
            raise CorpusError(f"{where} has no config {config}; it has {', '.join(sorted(configs))[:300] or 'none'}")
    return [name for name in names if _TRAIN.search(name)] or names


def _patterns(entry: dict[str, Any]) -> list[re.Pattern[str]]:
    """What a configuration of a card says of its files: globs, of the split `train` where there is one."""
    files = entry.get("data_files") or "**"
    parts = [
        part if isinstance(part, dict) else {"path": part} for part in (files if isinstance(files, list) else [files])
    ]
    train = [part for part in parts if part.get("split") == "train"]
    globs = [part.get("path") for part in train or parts]
    folder = f"{entry['data_dir'].strip('/')}/" if isinstance(entry.get("data_dir"), str) else ""
    flat = [glob for found in globs for glob in (found if isinstance(found, list) else [found])]
    return [_pattern(folder + str(glob).removeprefix("./")) for glob in flat]


def _pattern(glob: str) -> re.Pattern[str]:
    """A glob in which * stays within a folder and ** does not."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(meanings.get(part, re.escape(part)) for part in parts))


def _open(repo: str, commit: str, name: str) -> IO[bytes]:
    if not name.endswith(".parquet"):
        return open(hf_hub_download(repo, name, revision=commit, repo_type="dataset"), "rb")
    files = HfFileSystem(skip_instance_cache=True)
    handle: IO[bytes] = files.open(
        f"datasets/{repo}@{commit}/{name}", "rb", cache_type="none"
    )  # Arrow plans its own ranges
    return handle
