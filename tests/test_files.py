"""Files appear whole, with the permissions the user asked for, and never through somebody else's link."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from damage import refusal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwenscope.errors import FormatError, QwenscopeError, ResourceError, printable, reason
from qwenscope.files import (
    atomic_path,
    disk_errors_named,
    read_json,
    refused,
    remove_leftovers,
    whole_folder,
    write_json,
    write_text,
)
from qwenscope.sae.files import read_safetensors
from qwenscope.sae.sae import TopKSAE
from qwenscope.training.checkpoint import save
from qwenscope.training.lock import run_lock
from qwenscope.training.telemetry import MetricsFile


@pytest.fixture(params=[0o022, 0o077, 0o002, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_are_what_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        write_text(folder / "inner" / "b.txt", "b")
        (folder / "c.txt").write_text("c")
        TopKSAE(8, 16, 2).save(folder / "sae")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {mode(path) for path in files} == {0o666 & ~umask}
    assert {mode(path) for path in tmp_path.rglob("*") if path.is_dir()} == {0o777 & ~umask}
    assert os.umask(umask) == umask


def test_what_is_not_finished_is_the_owners_alone(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as temporary:
        assert mode(temporary) == 0o600
        temporary.write_text("x")


def test_temporary_names_differ_and_end_with_the_work(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with atomic_path(tmp_path / "a") as temporary:
            names.add(temporary.name)
            temporary.write_text("x")
    assert len(names) == 3
    assert all(name.startswith(".a.") and name.endswith(".tmp") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    """Whoever can write into the folder may swap the file under way for a link: its target keeps bytes and mode."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    victim.chmod(0o600)

    def write() -> None:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.unlink()
            temporary.symlink_to(victim)

    with pytest.raises(ResourceError, match="symbolic links"):
        write()
    assert (victim.read_text(), mode(victim)) == ("mine", 0o600)
    assert not (tmp_path / "a").exists()


def test_a_link_at_the_target_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "a").symlink_to(victim)
    write_text(tmp_path / "a", "new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a").read_text() == "new"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a"):
        raise RuntimeError
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "b"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def killed(act: Callable[[], object]) -> None:
    """`act` in a process that is killed by what it writes with."""
    if not (pid := os.fork()):
        act()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_what_a_killed_process_left_goes_with_the_next_of_the_same_name(tmp_path: Path) -> None:
    def die_in_a_file() -> None:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    def die_in_a_folder() -> None:
        with whole_folder(tmp_path / "b") as temporary:
            (temporary / "inner").mkdir()
            write_text(temporary / "inner" / "c", "half")
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):
        killed(die_in_a_file)
        killed(die_in_a_folder)
    assert len(list(tmp_path.iterdir())) == 2  # the second of each removed the first's
    (tmp_path / ".a.tmp").write_text("somebody else's")
    write_text(tmp_path / "a", "whole")
    with whole_folder(tmp_path / "b") as temporary:
        write_text(temporary / "c", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.tmp", "a", "b"]
    killed(lambda: die_in_a_file())
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.tmp", "a", "b"]


def test_what_a_living_process_writes_is_no_leftover(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as mine, whole_folder(tmp_path / "b") as folder:
        mine.write_text("first")
        remove_leftovers(tmp_path)
        write_text(tmp_path / "a", "second")
        assert mine.read_text() == "first"
        assert folder.is_dir()
    assert (tmp_path / "a").read_text() == "first"
    assert (tmp_path / "b").is_dir()


def test_of_two_that_make_one_folder_the_slower_says_so(tmp_path: Path) -> None:
    def slower() -> None:
        with whole_folder(tmp_path / "out") as mine:
            (mine / "x").write_text("slow")
            with whole_folder(tmp_path / "out") as other:
                (other / "x").write_text("fast")

    with pytest.raises(FormatError, match="out exists and is not empty"):
        slower()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "x").read_text() == "fast"


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.EDQUOT])
def test_what_the_system_refuses_is_one_line(number: int, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught, disk_errors_named(tmp_path / "a", 1234):
        raise OSError(number, "x", str(tmp_path / "b"))
    line = str(caught.value)
    if number in (errno.ENOSPC, errno.EDQUOT):
        assert line == f"no space left for {tmp_path / 'a'} (1,234 bytes needed); free some disk and run again"
    else:
        assert line.startswith(f"{tmp_path / 'a'}: {os.strerror(number)} at {tmp_path / 'b'}; see to")


def test_libraries_that_write_by_themselves_are_understood(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="a: No such file or directory"), disk_errors_named(tmp_path / "a"):
        save_file({"x": torch.zeros(2)}, tmp_path / "missing" / "a")
    with pytest.raises(ResourceError, match="a: Input/output error"), disk_errors_named(tmp_path / "a"):
        sqlite3.connect(tmp_path / "missing" / "a").execute("CREATE TABLE t (x)")
    with pytest.raises(sqlite3.OperationalError), disk_errors_named(tmp_path / "a"):
        sqlite3.connect(":memory:").execute("SELECT no")
    assert refused(OSError("a server said no")) is None


def test_a_file_that_torch_may_not_open_is_refused_like_others(tmp_path: Path) -> None:
    """safetensors opens it first, then torch, to map it: here the process may have one more open file."""
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"a\.safetensors: Too many open files"):
            read_safetensors(tmp_path / "a.safetensors", {"x": (2,)})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"9" * 5000, b'{"a": 1}}', b"\x00"])
def test_what_is_no_json_is_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    assert "x.json is not JSON (" in str(refusal(lambda: read_json(tmp_path / "x.json")))
    assert "cannot be read (" in str(refusal(lambda: read_json(tmp_path)))


@given(st.text(max_size=100))
def test_every_message_is_one_line_that_can_be_shown(text: str) -> None:
    assert printable(text).isprintable()
    assert str(QwenscopeError(text)) == printable(text)
    assert reason(ValueError(text)) == (printable(text)[:300].rstrip(" :") or "ValueError")
    assert printable(printable(text)) == printable(text)


def test_messages_keep_what_can_be_read() -> None:
    assert str(FormatError("a\n  b\tc  d é 日本 🙂")) == "a b c  d é 日本 🙂"
    assert str(FormatError("\x1b[31mred\x07 \u202eevil \udcff")) == r"\x1b[31mred\x07 \u202eevil \udcff"
    assert reason(KeyError()) == "KeyError"
    assert reason(torch.OutOfMemoryError("no\nroom")) == "no room"


def test_a_message_that_quotes_a_page_keeps_both_ends() -> None:
    message = str(FormatError(f"config.json: id {'x' * 100_000} is none; take letters"))
    assert message.startswith("config.json: id xxx")
    assert message.endswith("xxx is none; take letters")
    assert len(message) < 1200


def test_no_file_of_a_run_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", "metrics.jsonl"):
        (run / name).symlink_to(victim)
    with pytest.raises(OSError, match=r"symbolic links.*\.lock"), run_lock(run):
        pass
    MetricsFile(run / "metrics.jsonl", 0).close()  # lines that are none are taken out, by a file of its own
    assert not (run / "metrics.jsonl").is_symlink()
    empty = tmp_path / "empty"
    empty.touch()
    (run / "other.jsonl").symlink_to(empty)
    with pytest.raises(OSError, match=r"symbolic links.*other\.jsonl"):
        MetricsFile(run / "other.jsonl", 0)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / ".step-00000001.tmp").symlink_to(tmp_path)
    save(run / "checkpoints", 1, {"step": 1}, {"sae": {"a": torch.zeros(2)}})
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run", "victim"]


def test_a_lock_has_the_mode_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    with run_lock(tmp_path):
        assert mode(tmp_path / ".lock") == 0o666 & ~umask
