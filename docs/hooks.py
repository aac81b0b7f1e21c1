"""What mkdocs calls: pages of the site that are made from other files and from the code; nothing is said twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from qwenscope.cli.main import app
from qwenscope.recipe import keys, packaged_recipes

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "qwenscope"
COPIED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FOUNDATION = "foundation"
"""The page of modules that stand in no room."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the reference of every room under Reference."""
    (reference,) = (entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    reference.append({"Python": [{room: f"reference/{room}.md"} for room in rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {name: copied(source) for name, source in COPIED.items()}
    pages |= {"reference/commands.md": commands_page(), "reference/recipe.md": recipe_page()}
    pages |= {f"reference/{room}.md": python_page(room, modules) for room, modules in rooms().items()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):
        files.append(File.generated(config, f"examples/{notebook.name}", abs_src_path=str(notebook)))
    return files


def copied(source: str) -> str:
    """A page of the root as it reads from within docs/."""
    text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
    for name, root_file in COPIED.items():
        text = text.replace(f"]({root_file})", f"]({name})")
    return text


def rooms() -> dict[str, list[str]]:
    """Modules of the package by room: the package itself first, its folders, then what stands in none."""
    found: dict[str, list[str]] = {"qwenscope": ["qwenscope"], FOUNDATION: []}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[-1] in ("__init__", "__main__"):
            if len(parts) == 1:
                continue
            parts = parts[:-1]
        elif len(parts) == 1:
            found[FOUNDATION].append(f"qwenscope.{parts[0]}")
            continue
        found.setdefault(parts[0], []).append(".".join(("qwenscope", *parts)))
    return found


def python_page(room: str, modules: list[str]) -> str:
    """The reference of one room, generated from its docstrings."""
    parts = [f"# {room}\n"]
    for module in modules:
        heading = "" if module in ("qwenscope", f"qwenscope.{room}") else f"## `{module}`\n\n"
        own = "\n    options: {members: false}" if module == f"qwenscope.{room}" else ""
        parts.append(f"{heading}::: {module}{own}\n")
    return "\n".join(parts)


def recipe_page() -> str:
    """Every key of a recipe."""
    packaged = ", ".join(f"`{name}`" for name in packaged_recipes())
    rows = "".join(f"| `{key}` | {cell(meaning)} |\n" for key, meaning in keys().items())
    return f"""# Recipe keys

Packaged recipes: {packaged}. `<id>` stands for an SAE's id, `<n>` for a place in a list.

| key | meaning |
|---|---|
{rows}"""


def commands_page() -> str:
    """Every command with its arguments and options, as `--help` says them."""
    return "# Commands\n\n" + "\n".join(described(typer.main.get_command(app), "qwenscope"))


def described(command: Any, name: str) -> Iterator[str]:
    """A command and, below it, its own commands."""
    context = command.context_class(command, info_name=name)
    if subcommands := getattr(command, "commands", {}):
        yield f"{command.help}\n" if name == "qwenscope" else ""
        for sub, below in subcommands.items():
            yield from described(below, f"{name} {sub}")
        return
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## `{name}`\n\n{command.help}\n\n```text\n{name} {usage}\n```\n"
    yield "| argument or option | meaning |\n|---|---|"
    for parameter in command.get_params(context):
        if (record := parameter.get_help_record(context)) and parameter.name != "help":
            yield f"| `{cell(record[0])}` | {cell(record[1])} |"
    yield ""


def cell(text: str) -> str:
    """Text for one cell of a table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")
