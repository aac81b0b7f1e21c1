"""Datasets on the Hugging Face Hub as shards: resolved once to a commit, streamed by row group.

Parquet is read in ranges of just the columns needed; JSON lines are fetched whole into the Hub's cache, which checks
their size. The `datasets` library is not in this path: its streaming neither seeks by row group nor leaves out nested
columns (WildChat's address hashes would reach memory), and its JSON reader changes floats.
"""

from __future__ import annotations

from functools import partial
from typing import IO

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


def hub_shards(repo: str, revision: str | None, where: str) -> tuple[str, list[Shard]]:
    """The commit that `revision` names (None: the newest), and the data files in it.

    Raises:
        CorpusError: no such dataset or revision, no access, or no data file.
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
    if info.sha is None or not names:
        raise CorpusError(f"{where} holds no {', '.join(SUFFIXES)} file")
    return info.sha, [Shard(name, partial(_open, repo, info.sha, name)) for name in names]


def _open(repo: str, commit: str, name: str) -> IO[bytes]:
    if not name.endswith(".parquet"):
        return open(hf_hub_download(repo, name, revision=commit, repo_type="dataset"), "rb")
    files = HfFileSystem(skip_instance_cache=True)
    handle: IO[bytes] = files.open(
        f"datasets/{repo}@{commit}/{name}", "rb", cache_type="none"
    )  # Arrow plans its own ranges
    return handle
