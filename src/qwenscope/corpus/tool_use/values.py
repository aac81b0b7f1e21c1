"""The words that expressions of the content may use: random draws, dates, invented names and addresses.

An expression is Python over these functions, the pools and the slots drawn before it, compiled once when the content
is read; it sees no other name. Persons and firms are invented; networks, numbers and domains are those kept for
documentation.
"""

from __future__ import annotations

import ast
import datetime
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from types import CodeType
from typing import Any

_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_BUILTINS: dict[str, Any] = {
    f.__name__: f for f in (abs, bin, float, int, len, max, min, range, round, sorted, str, sum, zip)
}


class Values:
    """Functions of the content that draw from a generator."""

    def __init__(self, rng: Random, pools: Mapping[str, Sequence[Any]]) -> None:
        self._rng, self._pools = rng, pools

    def pick(self, *items: Any) -> Any:
        """One of the arguments, or of the items of the only one."""
        return self._rng.choice(items[0] if len(items) == 1 else items)

    def sample(self, items: Sequence[Any], n: int) -> list[Any]:
        """`n` different items in random order."""
        return self._rng.sample(items, n)

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self._rng.randint(low, high)

    def several(self, fewest: int, most: int, low: int, high: int) -> list[int]:
        """Between `fewest` and `most` whole numbers from `low` to `high`."""
        return [self._rng.randint(low, high) for _ in range(self._rng.randint(fewest, most))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._rng.random() < probability

    def money(self, low: int, high: int) -> float:
        """An amount between two whole numbers, with cents."""
        return round(self._rng.randint(low * 100, high * 100) / 100, 2)

    def person(self) -> str:
        """An invented full name."""
        return f"{self.pick(self._pools['first_names'])} {self.pick(self._pools['last_names'])}"

    def phone_number(self) -> str:
        """A number from the range reserved for fiction."""
        return f"555-01{self._rng.randrange(100):02d}"

    def ip(self) -> str:
        """An address from a documentation network."""
        return f"{self.pick('192.0.2', '198.51.100', '203.0.113')}.{self._rng.randint(1, 254)}"

    def any_day(self) -> str:
        """A day as YYYY-MM-DD."""
        return f"{self._rng.randint(2025, 2027)}-{self._rng.randint(1, 12):02d}-{self._rng.randint(1, 28):02d}"

    def clock(self) -> str:
        """A time of day as HH:MM."""
        return hour(self._rng.randint(7, 21), self.pick(0, 15, 30, 45))

    def file_path(self, *extensions: str) -> str:
        """A relative file path with one of the extensions (txt or md)."""
        folder, stem = self.pick(self._pools["folders"]), self.pick(self._pools["stems"])
        month = self.pick(self._pools["month_names"]).lower()
        suffix = self.pick("", "", f"_{self._rng.randint(1, 40)}", f"-{self._rng.randint(2019, 2027)}", f"_{month}")
        return f"{folder}/{stem}{suffix}.{self.pick(extensions or ('txt', 'md'))}"

    def identifier(self, prefix: str) -> str:
        """An identifier such as ORD-48213."""
        return f"{prefix}-{self._rng.randint(10000, 99999)}"

    def book(self) -> str:
        """An invented title."""
        return f"The {self.pick(self._pools['book_adjectives'])} {self.pick(self._pools['book_nouns'])}"


def email_of(name: str) -> str:
    """The example-domain address of an invented person."""
    return f"{name.lower().replace(' ', '.')}@example.com"


def hour(hours: int, minutes: int) -> str:
    """A time of day as HH:MM; minutes may exceed the hour."""
    return f"{(hours + minutes // 60) % 24:02d}:{minutes % 60:02d}"


def spoken(day: str) -> str:
    """A YYYY-MM-DD day as a person writes it."""
    year, month, number = day.split("-")
    return f"{_MONTHS[int(month) - 1]} {int(number)}, {year}"


def later(day: str, days: int) -> str:
    """The YYYY-MM-DD day that many days after another."""
    return (datetime.date.fromisoformat(day) + datetime.timedelta(days=days)).isoformat()


def weekday(day: str) -> str:
    """The name of a YYYY-MM-DD day's weekday."""
    return _WEEKDAYS[datetime.date.fromisoformat(day).weekday()]


def tidy(value: float) -> float:
    """`value` without a useless `.0`."""
    return int(value) if value == int(value) else value


def joined(between: str, items: Iterable[Any]) -> str:
    """The items as text, `between` standing between them."""
    return between.join(map(str, items))


def listed(items: Sequence[str]) -> str:
    """Items as a phrase: a, b and c."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 day, 2 days."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def upper_first(text: str) -> str:
    """`text` with a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (email_of, hour, spoken, later, weekday, tidy, joined, listed, counted, upper_first)
} | {"middle": statistics.median}
_DRAWING = tuple(name for name in vars(Values) if not name.startswith("_"))
NAMES = frozenset((*_FUNCTIONS, *_DRAWING, *_BUILTINS))
"""Every function that an expression may call."""


def vocabulary(rng: Random, pools: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What expressions see: the pools, and the functions, drawing from `rng`."""
    values = Values(rng, pools)
    drawing = {name: getattr(values, name) for name in _DRAWING}
    return {**pools, **_FUNCTIONS, **drawing, "__builtins__": _BUILTINS}


def expression(text: str, known: Iterable[str]) -> CodeType:
    """Compile an expression that uses the `known` names and those of its own loops.

    Raises:
        ValueError: it is no expression, or uses another name.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression ({error.msg})") from error
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    for node in names:
        if node.id not in NAMES and node.id not in own and node.id not in known:
            raise ValueError(f"{text!r} uses {node.id}, which is neither a function, a pool nor drawn before")
    return compile(tree, "<content>", "eval")
