"""Sessions of a tiny run in which one file-system call is struck: client here, worker when started as a script.

The worker has `shim.c` preloaded and everything imported; each session is a process forked from it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwenscope.recipe import Recipe, load_recipe

SHORT, KILL = -1, -2  # beside errnos, what may strike a call


@dataclass(frozen=True)
class Ending:
    """How a session ended."""

    code: int
    """Exit code, or minus the signal."""
    calls: int
    """File-system calls that it made in its run folder (0: killed)."""
    struck: bool
    said: str
    """What it wrote to stderr."""


class Worker:
    """Starts sessions, one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def session(
        self,
        recipe: Path,
        run: Path,
        *,
        nth: int = 0,
        fault: int = 0,
        sticky: bool = False,
        trace: Path | None = None,
        resume: bool = False,
    ) -> Ending:
        """Train `recipe` into `run`; call number `nth` there (from 1) gets `fault`."""
        job = {
            "recipe": str(recipe),
            "run": str(run),
            "nth": nth,
            "fault": fault,
            "sticky": sticky,
            "trace": trace and str(trace),
            "resume": resume,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return Ending(**json.loads(self._process.stdout.readline()))


@contextmanager
def fault_worker(folder: Path) -> Iterator[Worker]:
    """A worker whose shim is built in `folder`; skips the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("striking single file-system calls needs a C compiler on Linux")
    shim = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(source), "-ldl"], check=True)
    path = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    process = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.communicate()


def _serve() -> None:
    import ctypes
    import tempfile

    import tiny_run  # noqa: F401
    import torch

    from qwenscope.training import admission

    torch.set_num_threads(1)
    load = functools.cache(admission.load_language_model)  # once, before the forks: it lies outside of every run folder
    admission.load_language_model = load
    shim = ctypes.CDLL(None)
    shim.faults_calls.restype = ctypes.c_long
    for line in sys.stdin:
        job = json.loads(line)
        recipe = load_recipe(job["recipe"])
        load(recipe.lm, last_layer=recipe.last_layer)
        with tempfile.TemporaryDirectory() as folder:
            said, counted = Path(folder) / "said", Path(folder) / "counted"
            pid = os.fork()
            if not pid:
                _session(shim, recipe, job, said, counted)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            count = json.loads(counted.read_text()) if counted.exists() else {"calls": 0, "struck": code < 0}
            print(json.dumps({"code": code, "said": said.read_text(), **count}), flush=True)


def _session(shim: Any, recipe: Recipe, job: dict[str, Any], said: Path, counted: Path) -> None:
    import ctypes

    from qwenscope.errors import QwenscopeError
    from qwenscope.training.run import train

    code = 0
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT, 0o600), 2)
        trace = os.open(job["trace"], os.O_WRONLY | os.O_CREAT, 0o600) if job["trace"] else -1
        where = job["run"].encode()
        shim.faults_arm(where, ctypes.c_long(job["nth"]), job["fault"], int(job["sticky"]), trace)
        try:
            train(recipe, Path(job["run"]), resume=job["resume"])
        except QwenscopeError as error:
            print(error, file=sys.stderr)
            code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 99
    shim.faults_disarm()
    counted.write_text(json.dumps({"calls": shim.faults_calls(), "struck": bool(shim.faults_fired())}))
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
