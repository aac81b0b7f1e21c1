"""Worker processes that prepare rows ahead of the language model; without torch they are small and quick to start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

from qwenscope.corpus.prepare import Outcome, Preparer

_preparers: dict[str, Preparer] = {}
_MAIN_LOCK = threading.Lock()


class _Worker(SpawnProcess):
    """A process that does not import the script it was started from: one without a main guard would run again there."""

    def start(self) -> None:
        with _MAIN_LOCK:
            script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
            try:
                super().start()
            finally:
                sys.modules["__main__"] = script


class _Context(SpawnContext):
    Process = _Worker


def worker_pool(workers: int, preparers: Mapping[str, Preparer]) -> ProcessPoolExecutor:
    """Fresh processes (never forks of one that may hold threads or a GPU), each with every source's preparer."""
    return ProcessPoolExecutor(workers, mp_context=_Context(), initializer=_start, initargs=(dict(preparers),))


def prepare_in_worker(source: str, rows: list[tuple[int, Any]]) -> list[Outcome]:
    """What a worker does with a chunk of a source's rows."""
    return _preparers[source](rows)


def _start(preparers: dict[str, Preparer]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the main process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    _preparers.update(preparers)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody: its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
