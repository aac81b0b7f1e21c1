"""The keys of a recipe in words: what each means, and what a wrong one was meant to be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError


def keys_of(node: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key below `node` with its meaning; <id> stands for a mapping's key, <n> for a place in a list."""
    for name, field in node.model_fields.items():
        inner, place = _node_in(field.annotation)
        if inner is None:
            yield f"{prefix}{name}", field.description or ""
        else:
            yield from keys_of(inner, f"{prefix}{name}{place}.")


def first_problem(error: ValidationError, node: type[BaseModel], keys: str = "qwenscope recipe --help-keys") -> str:
    """What is wrong with the first bad key below `node`, on one line; `keys` says where all of them are told."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        meant = _meant(key, node)
        return f"unknown key {key[:200]}; " + (f"did you mean {meant}?" if meant else f"see {keys}")
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = "" if isinstance(given, dict | list | BaseModel) else f", not {_cut(repr(given))}"
    return f"{key[:200]}: {message}{shown}" if key else message


def _node_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The part of the tree that a field holds, and how its key goes on: once, by id, or by place."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    found = next((node for node, _ in map(_node_in, get_args(annotation)) if node), None)
    return found, {dict: ".<id>", tuple: ".<n>"}.get(get_origin(annotation), "") if found else ""


def _meant(key: str, node: type[BaseModel]) -> str:
    """What an unknown key was probably meant to be: one spelt like it beside it, or of its name elsewhere."""
    template = re.sub(r"^hook_points\.[^.]+", "hook_points.<id>", re.sub(r"\.\d+", ".<n>", key[:200]))
    place, _, name = template.rpartition(".")
    paths = {path for leaf, _ in keys_of(node) for path in accumulate(leaf.split("."), "{}.{}".format)}
    known = [path.rpartition(".")[::2] for path in sorted(paths)]
    close = difflib.get_close_matches(name, [last for where, last in known if where == place], n=1)
    found = [(place, last) for last in close] or [pair for pair in known if pair[1] == name]
    return " or ".join(".".join(filter(None, pair)) for pair in found)


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}..."
