"""What reaches a terminal: whatever a text holds is shown, and nothing in it is obeyed."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from qwenscope.cli import options
from qwenscope.cli.tables import comparison_table, survey_tables

HOSTILE = "a\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\x7f\u202eb"
SHOWN = r"a\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\x7f\u202eb"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown(*things: Any, color: bool = False, **how: Any) -> str:
    file = io.StringIO()
    console = options._Console(
        file=file, soft_wrap=True, force_terminal=color, color_system="standard" if color else None
    )
    for thing in things:
        console.print(thing, **how)
    return file.getvalue()


def test_no_sequence_of_a_text_reaches_the_terminal() -> None:
    assert shown(HOSTILE, markup=False, highlight=False) == re.sub(r"\\x07|\\r|\\x08", "", SHOWN) + "\n"
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    assert not RAW.search(shown(table))
    assert shown("two\nlines\tand 日本 👩‍👩‍👧", markup=False) == "two\nlines   and 日本 👩‍👩‍👧\n"


def test_our_own_colors_stay() -> None:
    assert shown("[bold red]error[/]:", color=True).startswith("\x1b[1;31merror\x1b[0m")


@given(st.text(max_size=30))
def test_any_text_is_shown_on_a_terminal(text: str) -> None:
    assert not RAW.search(shown(text, markup=False))


@given(st.text(max_size=30))
def test_any_text_comes_back_from_json(text: str) -> None:
    for encoding in ("utf-8", "ascii"):
        raw = io.BytesIO()
        before, sys.stdout = sys.stdout, io.TextIOWrapper(raw, encoding=encoding)
        try:
            options.write_json({"text": text})
            sys.stdout.flush()
            data = raw.getvalue()
        finally:
            sys.stdout = before
        assert json.loads(data) == {"text": text}
        assert not RAW.search(data.decode(encoding))


@pytest.mark.parametrize("word", ["[/x]", "[red]", "[link=file:///etc/passwd]x[/link]", "[", "\\[bold]"])
def test_words_of_others_are_no_markup(word: str) -> None:
    cell = {
        "rows_in": 1,
        "rows_kept": 0,
        "truncated": 0,
        "tokens": 0,
        "share": 0.0,
        "dropped": {f"template: {word}": 1},
    }
    report = {"sources": {"files": cell}, "scrubbed": {}, "tokens": 0, "padding_share": 0.0}
    assert f"files: template: {word}" in shown(*survey_tables(report))
    compared = {"suites": {"first": f"runs/{word}", "second": "b"}, "pairs": []}
    assert f"runs/{word} against b" in shown(comparison_table(compared))


SCRIPT = f"""
import logging, sys
from qwenscope.cli.options import err, out, set_up_output
set_up_output(False)
out.print("Grüße 🙂 日本", highlight=False)
err.print("Ω")
logging.getLogger("x").warning({HOSTILE!r})
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_an_output_that_lacks_a_character_gets_its_escape(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = "Grüße 🙂 日本\n".encode(encoding, "backslashreplace")
    assert done.stdout == expected
    assert SHOWN in done.stderr.decode(encoding)


def test_a_traceback_in_the_log_keeps_its_lines() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    text = options._Formatter("%(message)s").format(record)
    assert len(text.splitlines()) > 3
    assert text.endswith(f"ValueError: {SHOWN}")


def test_words_between_colons_are_no_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    for console in (options.out, options.err):
        console.print("top:-1: and :smile:", markup=False)
        console.print("top:-1: and :smile:")
    said = capsys.readouterr()
    assert said.out == said.err == "top:-1: and :smile:\n" * 2
