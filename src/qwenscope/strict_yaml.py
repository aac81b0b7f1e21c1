"""YAML as a recipe needs it: plain values, every key once, and one line for whatever is wrong with the text.

PyYAML takes the last of two equal keys without a word, lets Python's own errors through where a value is impossible
(`2024-13-45`, a number of 5,000 digits), follows nesting and aliases as far as memory goes, and reads `0100` as 64 and
`1:30` as 90, as YAML 1.1 has it and no one means it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from qwenscope.errors import printable
from qwenscope.files import read_at_most

_OLD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*:.*)")
_LEVELS = 32
_BYTES = 1 << 20
_NODES = 100_000
"""Values in all, each alias counted as what it stands for."""


class YamlError(Exception):
    """The text is not the YAML that is read here; the message is one line that names the place."""


def parse_yaml(text: str) -> Any:
    """The value that `text` writes down.

    Raises:
        YamlError: no YAML, a key given twice, an impossible value, or too deep or too large a tree.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, "", {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise YamlError(_described(error)) from None
    except RecursionError:
        raise YamlError("nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """The value in a file.

    Raises:
        YamlError: as `parse_yaml`; or the file is larger than any recipe, or not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return parse_yaml(read_at_most(path, _BYTES).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise YamlError(f"it is not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from None
    except ValueError as error:
        raise YamlError(str(error)) from None


class _Loader(yaml.SafeLoader):
    """Says where an impossible value stands; an integer has 64 bits at most."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 64:
                raise OverflowError
            if isinstance(value, int | float) and _OLD_NUMBER.fullmatch(node.value):
                raise _at(node, f"{_shown(node)} would be read as {value}; write that, or the number without its zeros")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _at(node, f"{_shown(node)} is not a possible {kind}") from error
        return value


def _check(node: yaml.Node, key: str, seen: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(values, levels) of a node, itself and what its aliases stand for included, after a look at its keys.

    `seen` has both by the id of a node that was looked at; an alias into itself has no end and is refused.
    """
    if id(node) in seen:
        return seen[id(node)]
    seen[id(node)] = _NODES, 0  # until its end is reached
    inner = []
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else _shown(key_node)
            path = f"{key}.{name}" if key else name
            if name in first:
                raise _at(key_node, f"{_cut(path)} is given twice, first in line {first[name]}")
            first[name] = key_node.start_mark.line + 1
            inner += [_check(key_node, path, seen), _check(value_node, path, seen)]
    elif isinstance(node, yaml.SequenceNode):
        inner = [_check(item, f"{key}.{place}", seen) for place, item in enumerate(node.value)]
    values, levels = 1 + sum(values for values, _ in inner), 1 + max((levels for _, levels in inner), default=0)
    if levels > _LEVELS:
        raise _at(node, f"nested deeper than {_LEVELS} levels")
    if values > _NODES:
        raise _at(node, f"holds more than {_NODES:,} values, or itself")
    seen[id(node)] = values, levels
    return values, levels


def _at(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _described(error: yaml.YAMLError) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return printable(str(error))[:200]
    return f"{printable(problem)} (line {mark.line + 1})"


def _shown(node: yaml.Node) -> str:
    return repr(_cut(node.value)) if isinstance(node, yaml.ScalarNode) else f"a {node.tag.rpartition(':')[2]}"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}..."


def set_value(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of `tree` by `key=value`, the value YAML; list items are named by their number.

    Raises:
        YamlError: no such place, or no YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise YamlError(f"{override}: write key=value, such as training.tokens=1000000")
    try:
        value = parse_yaml(text)
    except YamlError as error:
        raise YamlError(f"{key}: {text[:60]!r} is not a YAML value: {error}") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else _item(node, part, key)[int(part)]
    if isinstance(node, dict):
        node[last] = value
    else:
        _item(node, last, key)[int(last)] = value


def _item(node: Any, part: str, key: str) -> list[Any]:
    """`node` as a list that has an item of this number."""
    if not isinstance(node, list):
        raise YamlError(f"{key}: nothing can be set below a value at {part!r}")
    if not re.fullmatch("[0-9]{1,6}", part) or int(part) >= len(node):
        raise YamlError(f"{key}: {part!r} is no item of a list of {len(node)}")
    return node
