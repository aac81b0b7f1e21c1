"""What steering experiments show: rates of checks against the unsteered model, with intervals, and against controls.

An effect is the difference of a check's rate from the unsteered runs of the same scenarios and seeds; its interval is a
bootstrap over scenarios, which are what one would want to generalise over.

Legend: X scenarios, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwenscope.analysis.scenarios import Plan
from qwenscope.analysis.statistics import Array
from qwenscope.evaluation.pairs import interval, resample
from qwenscope.evaluation.plots import Dot, dots, sheet

Records = Sequence[Mapping[str, Any]]
CONDITION = ("arm", "trait", "strength", "position")


def summarise(plan: Plan, records: Records) -> dict[str, Any]:
    """{"scenarios", "repeats", "traits", "latents", "unsteered", "effects", "matrix"}: see docs/analysis.md."""
    by_condition: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        by_condition.setdefault(tuple(record[name] for name in CONDITION), []).append(record)
    plain = by_condition.pop(("unsteered", None, None, None))
    rates = {condition: _rates(plan, found) for condition, found in by_condition.items()}
    base = _rates(plan, plain)
    effects = []
    for condition, found in by_condition.items():
        cell = {**dict(zip(CONDITION, condition, strict=True)), **_costs(found), "checks": {}}
        random = rates.get(("random direction", *condition[1:])) if condition[0] == "steered" else None
        for check in plan.checks:
            mine_X = rates[condition][check]
            told = _difference("", mine_X - base[check], plan.seed)
            if random is not None:
                told |= _difference("beyond_random_", mine_X - random[check], plan.seed)
            cell["checks"][check] = {"rate": float(mine_X.mean()), **told}
        effects.append(cell)
    return {
        "scenarios": len(plan.scenarios),
        "repeats": plan.repeats,
        "traits": {name: trait.check for name, trait in plan.traits.items()},
        "latents": [{"sae": t.sae, "latent": t.latent, "trait": name} for name, t in plan.traits.items()],
        "unsteered": {**_costs(plain), "checks": {check: float(rate_X.mean()) for check, rate_X in base.items()}},
        "effects": effects,
        "matrix": _matrix(plan, effects),
    }


def dose_response(plan: Plan, result: Mapping[str, Any]) -> str:
    """An SVG: per trait and position, the change of its own check by strength; squares steered, circles at random."""
    figures = []
    for name, trait in plan.traits.items():
        for position in plan.positions:
            marks = [
                Dot(
                    cell["strength"],
                    cell["checks"][trait.check]["difference"],
                    f"{cell['arm']} {cell['strength']:g}",
                    "attention" if cell["arm"] == "steered" else "other",
                    cell["checks"][trait.check]["interval"],
                )
                for cell in result["effects"]
                if cell["trait"] == name and cell["position"] == position
            ]
            title = f"{name} ({position}): squares steered, circles random directions"
            figures.append(dots(title, marks, "strength", f"change of {trait.check}", include=(0,), whole_x=False))
    return sheet(figures, min(2, len(figures)))


def _rates(plan: Plan, found: Records) -> dict[str, Array]:
    """{check: its rate in each scenario [X], over repeats}."""
    place = {scenario.name: number for number, scenario in enumerate(plan.scenarios)}
    rates = {check: np.zeros(len(place)) for check in plan.checks}
    for record in found:
        for check, rate_X in rates.items():
            rate_X[place[record["scenario"]]] += record["checks"][check] / plan.repeats
    return rates


def _costs(found: Records) -> dict[str, float]:
    """Mean KL per token, and perplexity of all answers under the unsteered model."""
    tokens = sum(record["tokens"] for record in found) or 1
    kl, nats = (sum(record[key] * record["tokens"] for record in found) / tokens for key in ("kl", "nats"))
    return {"kl": kl, "perplexity": math.exp(nats)}


def _difference(name: str, change_X: Array, seed: int) -> dict[str, Any]:
    count = len(change_X)
    drawn = interval(resample(count, seed) @ change_X / count) if count > 1 else None
    return {f"{name}difference": float(change_X.mean()), f"{name}interval": drawn}


def _matrix(plan: Plan, effects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What each trait does to each check at the largest strength, at the first position."""
    at = {"arm": "steered", "strength": max(plan.strengths, key=abs), "position": plan.positions[0]}
    traits = {
        cell["trait"]: {check: told["difference"] for check, told in cell["checks"].items()}
        for cell in effects
        if all(cell[key] == value for key, value in at.items())
    }
    return {"strength": at["strength"], "position": at["position"], "traits": traits}
