"""The Hugging Face Hub: repository names, downloads at one commit, the only loop that tries again, errors that help.

Tokens come from the environment or the login and go into no message: every text of the Hub client passes `redact`.
"""

from __future__ import annotations

import errno
import logging
import re
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub import errors as hub_errors

# httpx's base class, of whichever generation of httpx the installed client is built on.
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from qwenscope.errors import FormatError, HubError, QwenscopeError

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between tries. The client retries many requests itself first (about 20 s), so this outlives minutes."""

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{6,}"), "hf_[redacted]"),
    (re.compile(r"(?i)(bearer|basic)\s+[\w.~+/=-]+"), r"\1 [redacted]"),
    (re.compile(r"(//)[^/@\s]+@"), r"\1[redacted]@"),
)

Result = TypeVar("Result")


def check_repo_id(text: str) -> str:
    """`text` itself if it is an `org/name` as the Hub allows them.

    Raises:
        FormatError: it is not, for example because it is a folder that does not exist.
    """
    if not _REPO_ID.fullmatch(text) or ".." in text or "--" in text or text.endswith(".git"):
        raise FormatError(f"{text!r} is neither an existing folder nor a Hub repository (org/name)")
    return text


def download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Files of the model repository `repo` that match `patterns`, all of one commit; returns that commit's folder in
    the local cache, which bears the commit's name.

    Raises:
        HubError: no such repository or revision, no access, or the Hub stays out of reach.
    """

    def fetch() -> str:
        return snapshot_download(repo, revision=revision, allow_patterns=list(patterns))

    return Path(asked(fetch, f"{repo} at {revision or 'main'}"))


def repo_files(repo: str, revision: str | None) -> list[str]:
    """Paths of all files of `repo` at `revision`.

    Raises:
        HubError: as `download`.
    """
    return asked(lambda: HfApi().list_repo_files(repo, revision=revision), f"{repo} at {revision or 'main'}")


def asked(action: Callable[[], Result], what: str) -> Result:
    """`action()`, a call of the Hub client, tried as `retrying` does; whatever it raises is explained.

    Raises:
        HubError: the last error, in one line without secrets.
    """
    try:
        return retrying(action, what)
    except QwenscopeError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HubError(explain(error, what)) from None


def retrying(action: Callable[[], Result], what: str, level: int = logging.WARNING) -> Result:
    """`action()`, again after 5xx, 429, timeouts and broken connections.

    Args:
        action: reads or writes on the Hub or another server, and may be repeated.
        what: the repository (and revision) or address concerned, for messages.
        level: at which each further try is logged.

    Raises:
        HubError: still failing after the last pause, or the Hub is not to be asked (HF_HUB_OFFLINE).
        Exception: what `action` raised, if trying again cannot help.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except hub_errors.OfflineModeIsEnabled as error:
            raise HubError(explain(error, what)) from None
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            if not _transient(error):
                raise
            if pause is None:
                raise HubError(f"{explain(error, what)}; still so after {len(PAUSES)} more tries") from None
            wait = max(pause, _retry_after(error))
            logger.log(level, "%s; trying again in %.0f s", redact(f"{what}: {_root_cause(error)}"), wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def explain(error: BaseException, what: str) -> str:
    """One line that says what failed and how to cure it, free of tokens."""
    if isinstance(error, hub_errors.GatedRepoError):
        return f"{what} is gated: accept its terms on the Hub and log in with `hf auth login`"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"{what} does not exist on the Hub or is private; check the name, or log in with `hf auth login`"
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{what}: no such revision (commit, branch or tag) on the Hub"
    if isinstance(error, hub_errors.LocalEntryNotFoundError | hub_errors.OfflineModeIsEnabled):
        return f"{what} is not in the local cache and the Hub cannot be reached; check the network and HF_HUB_OFFLINE"
    status = _status(error)
    if status in (401, 403):
        return f"{what}: the Hub refuses access ({status}); log in with `hf auth login` or set HF_TOKEN"
    return redact(f"{what}: {' '.join(str(_root_cause(error)).split()) or type(error).__name__}")


def redact(text: str) -> str:
    """`text` without tokens, authorisation headers and credentials in URLs."""
    token = get_token()
    if token:
        text = text.replace(token, "[redacted]")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what caused it, outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _root_cause(error: BaseException) -> BaseException:
    """The error that says most: the first with the Hub's response, else the innermost."""
    chain = list(_chain(error))
    return next((link for link in chain if getattr(link, "response", None) is not None), chain[-1])


def _response(error: BaseException) -> Any:
    """The server's response, if there was one: the Hub client's errors hold it, urllib's are it."""
    cause = _root_cause(error)
    return cause if isinstance(cause, urllib.error.HTTPError) else getattr(cause, "response", None)


def _status(error: BaseException) -> int | None:
    """HTTP status of the server's response, if there was one."""
    response = _response(error)
    return None if response is None else int(getattr(response, "status_code", None) or response.status)


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asked to wait, at most a minute."""
    seconds = str(getattr(_response(error), "headers", {}).get("retry-after", ""))
    return min(float(seconds), 60.0) if seconds.isdigit() else 0.0


def _transient(error: BaseException) -> bool:
    """Whether trying again can help: server trouble, rate limits, and connections that broke."""
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    links = list(_chain(error))
    return not any(isinstance(link, hub_errors.OfflineModeIsEnabled) for link in links) and any(
        isinstance(link, HTTPError | ConnectionError | TimeoutError | hub_errors.LocalEntryNotFoundError)
        for link in links
    )
