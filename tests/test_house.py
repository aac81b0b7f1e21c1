"""The house keeps its order: who may import whom, and how long files and functions may be (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"
FOUNDATION = (
    *(
        "errors",
        "files",
        "checksums",
        "seeds",
        "strict_yaml",
        "recipe_keys",
        "recipe_nodes",
        "recipe",
        "limits",
        "hub",
    ),
    "machine",
)
ROOMS = (
    *(frozenset({name}) for name in FOUNDATION),
    frozenset({"sae", "corpus"}),
    frozenset({"lm", "parallel"}),
    frozenset({"activations", "costs"}),
    frozenset({"training"}),
    frozenset({"opening"}),
    frozenset({"evaluation"}),
    frozenset({"features"}),
    frozenset({"analysis"}),
    frozenset({"planning", "release"}),
    frozenset({"doctor"}),
    frozenset({"cli"}),
)
"""From left to right; rooms that stand side by side do not import each other."""
APART = {("lm", "corpus"), ("lm", "sae"), ("parallel", "corpus"), ("sae", "recipe")}
"""Further pairs (who, what) without an arrow: the model knows no conversations, an SAE no recipe."""
OUTSIDE = frozenset({"__init__", "__main__"})
"""The package's front: its names load on first use, so nothing inside may lean on it."""

FILE_LINES, FUNCTION_LINES = 400, 60
LONG: dict[str, str] = {}
"""Functions that may be longer, by `file:name`, each with its reason."""

FILES = sorted((SOURCE / "qwenscope").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in FILES}


def room(module: str) -> str:
    return module.split(".")[1]


def imports(module: str) -> Iterator[str]:
    """Modules of ours that a file imports anywhere: at its top, in a function, or for type checkers alone."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "qwenscope":
                continue
            while name not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            yield name if name in MODULES else "qwenscope.__init__"


GRAPH = {module: set(imports(module)) for module in MODULES if room(module) not in OUTSIDE}


def place(name: str) -> int:
    """How far right a room stands; those of the foundation are one room."""
    found = next((number for number, rooms in enumerate(ROOMS) if name in rooms), len(ROOMS))
    return max(len(FOUNDATION) - 1, found)


def test_every_file_has_its_room() -> None:
    known = set().union(*ROOMS) | OUTSIDE
    assert not {module for module in MODULES if room(module) not in known}


def test_no_file_imports_in_a_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_arrows_point_left() -> None:
    """So no circle of rooms either: places only fall along an arrow."""
    wrong = []
    for module, imported in GRAPH.items():
        for other in imported:
            here, there = room(module), room(other)
            if here == there:
                continue
            aside = place(here) == place(there) and here not in FOUNDATION
            if there in OUTSIDE or place(there) > place(here) or aside or (here, there) in APART:
                wrong.append(f"{module} -> {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_files_fit_one_reading() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > FILE_LINES}


def test_functions_fit_one_screen() -> None:
    long = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if (length := (node.end_lineno or first) - first + 1) > FUNCTION_LINES:
                    long[f"{module}:{node.name}"] = length
    assert not {name: length for name, length in long.items() if name not in LONG}
    assert set(LONG) <= set(long), "no longer too long: take it off the list"
