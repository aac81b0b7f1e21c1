"""The filter for conversations of real people (WildChat): which rows are left out, what is scrubbed from the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from qwenscope.corpus.countries import is_protected
from qwenscope.corpus.identifiers import find_identifiers
from qwenscope.corpus.repair import Dropped
from qwenscope.recipe import PrivacyRecipe

FILTER_VERSION = 5
"""Counts up when the same row could get another decision."""
SHORT = 40
"""Characters of strings that are worth remembering: names of tools, keys and values come again and again."""
NOT_DETECTED = "names of persons, postal addresses, dates of birth, anything in free prose"
REASONS = ("country", "unknown_country", "redacted", "toxic")


class PrivacyFilter:
    """Decides about WildChat rows by their metadata and scrubs their text."""

    def __init__(self, rules: PrivacyRecipe) -> None:
        self.rules = rules

    def decide(self, row: dict[str, Any]) -> str | None:
        """Why a row is dropped, or None if it is kept; the first of REASONS that applies.

        Raises:
            Dropped: wildchat_schema, when the row lacks the turns to judge.
        """
        countries, rules = self._countries(row), self.rules
        turns = row["conversation"]
        if rules.drop_countries and any(is_protected(country) for country in countries if country is not None):
            return "country"
        if rules.drop_unknown_country and None in countries:
            return "unknown_country"
        if rules.drop_redacted and _flagged(row, turns, "redacted"):
            return "redacted"
        if rules.drop_toxic and _flagged(row, turns, "toxic"):
            return "toxic"
        return None

    def apply(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Role and content of each turn of a row that stays; nothing else leaves here. The text is yet to be scrubbed.

        Raises:
            Dropped: by a rule, with the country where that is the rule; or wildchat_schema.
        """
        reason = self.decide(row)
        if reason == "country":
            country = next(c for c in self._countries(row) if c is not None and is_protected(c))
            raise Dropped(reason, country)
        if reason is not None:
            raise Dropped(reason)
        return [{"role": turn.get("role"), "content": turn.get("content")} for turn in row["conversation"]]

    def scrub_all(self, value: Any) -> tuple[Any, dict[str, int]]:
        """`value` with every string in it scrubbed, keys of mappings too, and the counts per kind over all.

        Args:
            value: what JSON can hold: messages with their tool calls and results, or tools.
        """
        if not self.rules.scrub:
            return value, {}
        counts: Counter[str] = Counter()

        def walk(value: Any) -> Any:
            if isinstance(value, str):
                text, found = _scrub_short(value) if len(value) <= SHORT else _scrub(value)
                if found:
                    counts.update(found)
                return text
            if isinstance(value, dict):
                return {walk(key): walk(item) for key, item in value.items()}
            return [walk(item) for item in value] if isinstance(value, list) else value

        return walk(value), dict(counts)

    def scrub(self, text: str) -> tuple[str, dict[str, int]]:
        """`text` with each identifier replaced by its kind in angle brackets, and the counts per kind.

        Examples:
            >>> PrivacyFilter(PrivacyRecipe()).scrub("I am bo@firm.de, 8.8.8.8")[0]
            'I am <EMAIL_ADDRESS>, 8.8.8.8'
        """
        return _scrub(text)

    def _countries(self, row: dict[str, Any]) -> list[str | None]:
        """Of the row and of each user turn; None where it is unknown."""
        turns = row.get("conversation")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise Dropped("wildchat_schema")
        given = [row.get("country"), *(turn.get("country") for turn in turns if turn.get("role") == "user")]
        given += [turn["country"] for turn in turns if turn.get("role") != "user" and turn.get("country") is not None]
        return [country if isinstance(country, str) and country.strip() else None for country in given]


def privacy_report(rules: PrivacyRecipe, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the filter did, for the run folder and the card.

    Args:
        rules: the recipe's switches.
        sources: per filtered source its `revision`, `rows_in`, `rows_kept`, `dropped`, `dropped_countries`, `scrubbed`.
    """
    keys = ("revision", "rows_in", "rows_kept", "dropped_countries", "scrubbed")
    filtered = {}
    for id, counts in sources.items():
        dropped = {reason: counts["dropped"].get(reason, 0) for reason in REASONS}
        filtered[id] = {key: counts[key] for key in keys} | {"dropped": dropped}
    return {
        "filter_version": FILTER_VERSION,
        "rules": rules.model_dump(),
        "sources": filtered,
        "not_detected": NOT_DETECTED,
    }


def _scrub(text: str) -> tuple[str, dict[str, int]]:
    identifiers = find_identifiers(text)
    if not identifiers:
        return text, {}
    pieces: list[str] = []
    end = 0
    for identifier in identifiers:
        pieces += [text[end : identifier.start], f"<{identifier.kind}>"]
        end = identifier.end
    return "".join([*pieces, text[end:]]), dict(Counter(identifier.kind for identifier in identifiers))


_scrub_short = lru_cache(maxsize=1 << 16)(_scrub)


def _flagged(row: dict[str, Any], turns: list[dict[str, Any]], flag: str) -> bool:
    if not isinstance(row.get(flag), bool):  # without the flag nobody can say
        raise Dropped("wildchat_schema")
    return row[flag] or any(turn.get(flag) for turn in turns)
