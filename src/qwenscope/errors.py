"""Errors that a user can cause and cure: one line each, naming the culprit and what to do.

The command line prints the message and exits with the class's `exit_code`; anything else is a bug of ours and
keeps its traceback. 2 is typer's own usage error, 129, 130 and 143 are SIGHUP, SIGINT and SIGTERM.
"""


def printable(text: str) -> str:
    """`text` on one line that is safe to show: its lines are joined; control characters, marks that turn the writing
    direction and lone surrogates become escapes such as \\x1b.

    Examples:
        >>> printable("a\\n b\\x1b[31m")
        'a b\\\\x1b[31m'
    """
    line = " ".join(filter(None, map(str.strip, text.expandtabs(1).splitlines())))
    return line if line.isprintable() else "".join(map(_escaped, line))


def reason(error: BaseException, most: int = 300) -> str:
    """What an error says, on one line of at most so many characters; its type where it says nothing."""
    return printable(str(error))[:most].rstrip(" :") or type(error).__name__


def _escaped(sign: str) -> str:
    return sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii")


class QwenscopeError(ValueError):
    """Base class: something outside the code is wrong, and the message says what and how to cure it."""

    exit_code = 1

    def __str__(self) -> str:
        """The message as one line that a terminal and a log can take, its middle left out where it is a page long."""
        line = printable(super().__str__())
        return line if len(line) <= 1200 else f"{line[:800]} ... {line[-300:]}"


class RecipeError(QwenscopeError):
    """The recipe (or a `--set`) has an unknown key, an impossible value, or does not match the run folder."""

    exit_code = 3


class ModelError(QwenscopeError):
    """The language model cannot be loaded, or a hook point does not exist in it or has another kind."""

    exit_code = 4


class CorpusError(QwenscopeError):
    """A data source is missing, empty, shrunk, malformed or died half-way."""

    exit_code = 5


class TrainingError(QwenscopeError):
    """Training cannot go on: non-finite or exploding loss, too many rows left out."""

    exit_code = 6


class CheckpointError(QwenscopeError):
    """No checkpoint verifies, or the one that does belongs to another recipe, model or format version."""

    exit_code = 7


class LockError(QwenscopeError):
    """Another process works in the same run folder."""

    exit_code = 8


class FormatError(QwenscopeError):
    """An SAE, release, index or cache file is damaged, hostile, or cannot be represented in the asked format."""

    exit_code = 9


class ResourceError(QwenscopeError):
    """Disk or memory does not suffice (the message says how many bytes are needed), or the system refuses otherwise."""

    exit_code = 10


class HubError(QwenscopeError):
    """The Hugging Face Hub refuses, lacks the repository or revision, or stays out of reach after all retries."""

    exit_code = 11
