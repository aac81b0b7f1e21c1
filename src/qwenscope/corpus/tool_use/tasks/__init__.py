"""Everything a user may ask for, one module per domain; importing the package registers the tools and the tasks."""

from qwenscope.corpus.tool_use.model import TASKS, TOOLS
from qwenscope.corpus.tool_use.tasks import (
    home,
    money,
    numbers,
    operations,
    people,
    planning,
    research,
    shopping,
    travel,
    workspace,
)

__all__ = [
    "TASKS",
    "TOOLS",
    "home",
    "money",
    "numbers",
    "operations",
    "people",
    "planning",
    "research",
    "shopping",
    "travel",
    "workspace",
]
