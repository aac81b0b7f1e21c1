"""Transient failures of the Hub are waited out; anything else is the user's to know at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from qwenscope.errors import CorpusError

T = TypeVar("T")
log = logging.getLogger(__name__)

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds between tries: a minute in all outlives a restart of the server, not an outage."""


def with_retries(action: Callable[[], T], where: str) -> T:
    """`action()`, tried again after transient errors.

    Raises:
        CorpusError: still failing after the last wait, or the Hub is not to be asked (HF_HUB_OFFLINE).
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except OfflineModeIsEnabled as error:
            raise CorpusError(f"{where}: the Hub is switched off by HF_HUB_OFFLINE; unset it or give a path") from error
        except Exception as error:
            if not _is_transient(error):
                raise
            if wait is None:
                raise CorpusError(f"{where}: the Hub still fails after {len(WAITS)} retries ({error})") from error
            log.warning("%s: %s; trying again in %g s", where, error, wait)
            time.sleep(wait)
    raise AssertionError("the loop returns or raises")


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (error.response.status_code == 429 or error.response.status_code >= 500)
    return isinstance(error, httpx.TransportError | LocalEntryNotFoundError | ConnectionError | TimeoutError)
