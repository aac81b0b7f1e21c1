"""Transient failures of the Hub are waited out; anything else is the user's to know at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from qwenscope.errors import CorpusError

T = TypeVar("T")
log = logging.getLogger(__name__)

WAITS = (1.0, 4.0, 16.0)
"""Seconds between tries. huggingface_hub retries many requests itself first (about 20 s), so this outlives minutes."""

_HTTP_ERROR = HfHubHTTPError.__bases__[0]  # the root error of whichever HTTP client huggingface_hub is built on


def with_retries(action: Callable[[], T], where: str) -> T:
    """`action()`, tried again after transient errors: 429, 5xx, and whatever breaks a connection.

    Raises:
        CorpusError: still failing after the last wait, or the Hub is not to be asked (HF_HUB_OFFLINE).
        Exception: what `action` raised, if it is not transient.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except OfflineModeIsEnabled as error:
            raise CorpusError(
                f"{where}: HF_HUB_OFFLINE switches the Hub off; unset it or give the source a path"
            ) from error
        except Exception as error:
            if not _is_transient(error):
                raise
            if wait is None:
                raise CorpusError(f"{where}: the Hub still fails after {len(WAITS)} more tries ({error})") from error
            log.warning("%s: %s; trying again in %g s", where, error, wait)
            time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def _is_transient(error: Exception) -> bool:
    if isinstance(error, LocalEntryNotFoundError):  # huggingface_hub's word for "no connection and not in the cache"
        return True
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500)
    return isinstance(error, _HTTP_ERROR | ConnectionError | TimeoutError)
