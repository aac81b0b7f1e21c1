"""What results look like as JSON: what their pages rely on, checked when they are read; more may stand beside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_Interval = tuple[FiniteFloat, FiniteFloat] | None
_Side = Literal["a", "b"]


class Head(TypedDict):
    """What every result begins with: see `heads.head`."""

    kind: str
    target: str
    saes: dict[str, str]


class _Address(TypedDict):
    sae: str
    latent: _Count


class _Piles(TypedDict):
    positive: FiniteFloat
    negative: FiniteFloat


class _Control(TypedDict):
    auroc: FiniteFloat
    interval: _Interval
    balanced_accuracy: FiniteFloat


class _Contrasted(_Address):
    effect: FiniteFloat
    interval: _Interval
    adjusted_effect: FiniteFloat
    q: FiniteFloat
    auroc: FiniteFloat
    active: _Piles


class _Differing(_Piles):
    p: FiniteFloat


class _Counted(TypedDict):
    positive: dict[str, _Count]
    negative: dict[str, _Count]
    p: FiniteFloat | None


class _Confounds(TypedDict):
    length: _Differing
    roles: dict[str, _Differing]
    language: _Counted
    source: _Counted


class _Contrast(Head):
    conversations: _Piles
    paired: bool
    pool: str
    tested: _Count
    found: _Count
    fdr: FiniteFloat
    latents: Annotated[list[_Contrasted], Field(max_length=1000)]
    controls: dict[str, dict[str, _Control]]
    confounds: _Confounds


class _Sides(TypedDict):
    a: FiniteFloat
    b: FiniteFloat


class _Named(TypedDict):
    id: str
    text: str
    side: _Side
    max: NotRequired[FiniteFloat]
    change: NotRequired[FiniteFloat]


class _Token(TypedDict):
    token: str
    count: _Count
    a: _Count
    b: _Count


class _Different(_Address):
    group: _Count
    effect: FiniteFloat
    interval: _Interval
    q: FiniteFloat
    rate: _Sides
    active: _Sides
    conversations: list[_Named]
    tokens: NotRequired[list[_Token]]


class _Corpora(Head):
    conversations: _Sides
    a: str
    b: str
    tested: _Count
    found: _Count
    fdr: FiniteFloat
    latents: Annotated[list[_Different], Field(max_length=1000)]


class _Names(TypedDict):
    a: str
    b: str


class _Fit(_Sides):
    change: FiniteFloat
    interval: _Interval


class _Checkpoints(Head):
    conversations: _Sides
    data: str
    model: _Names
    tested: _Count
    found: _Count
    fdr: FiniteFloat
    latents: Annotated[list[_Different], Field(max_length=1000)]
    fvu: dict[str, _Fit]


class _Weighted(_Address):
    weight: FiniteFloat


class _Calibration(TypedDict):
    conversations: _Count
    sources: list[str]
    languages: list[str]
    rate_interval: tuple[FiniteFloat, FiniteFloat]


class _Fitted(TypedDict):
    positive: _Count
    negative: _Count


class _Monitor(Head):
    model: str
    site: str
    pool: Literal["max", "mean"]
    roles: list[str]
    fpr: FiniteFloat
    threshold: FiniteFloat
    latents: Annotated[list[_Weighted], Field(min_length=1, max_length=10_000)]
    fitted_on: _Fitted
    held_out: dict[str, _Control]
    calibration: _Calibration


class _Rate(TypedDict):
    rate: FiniteFloat
    interval: tuple[FiniteFloat, FiniteFloat]
    count: _Count


class _Stated(TypedDict):
    false_positives: _Rate
    recall: _Rate | None
    holds: bool


class _Recall(TypedDict):
    recall: NotRequired[FiniteFloat]
    interval: NotRequired[_Interval]
    refused: NotRequired[str]


class _By(TypedDict):
    auroc: FiniteFloat
    interval: _Interval
    at: dict[str, _Recall]


class _Slice(TypedDict):
    conversations: _Fitted
    stated: _Stated
    by: dict[str, _By]


class _Test(Head):
    monitor: str
    fpr: FiniteFloat
    latents: Annotated[list[_Weighted], Field(max_length=10_000)]
    slices: dict[str, _Slice]


class _Check(TypedDict):
    rate: FiniteFloat
    difference: FiniteFloat
    interval: _Interval
    beyond_random_difference: NotRequired[FiniteFloat]
    beyond_random_interval: NotRequired[_Interval]


class _Cell(TypedDict):
    arm: Literal["prompt", "steered", "random direction"]
    trait: str
    strength: FiniteFloat | None
    position: str | None
    kl: FiniteFloat
    perplexity: FiniteFloat
    checks: dict[str, _Check]


class _Plain(TypedDict):
    perplexity: FiniteFloat
    checks: dict[str, FiniteFloat]


class _Matrix(TypedDict):
    strength: FiniteFloat
    position: str
    traits: dict[str, dict[str, FiniteFloat]]


class _Trait(_Address):
    trait: str


class _Scenarios(Head):
    runs: _Count
    scenarios: _Count
    repeats: _Count
    traits: dict[str, str]
    latents: Annotated[list[_Trait], Field(max_length=1000)]
    unsteered: _Plain
    effects: list[_Cell]
    matrix: _Matrix


FORMS: dict[str, TypeAdapter[Any]] = {
    "contrast": TypeAdapter(_Contrast),
    "diff": TypeAdapter(_Corpora),
    "checkpoints": TypeAdapter(_Checkpoints),
    "monitor": TypeAdapter(_Monitor),
    "monitor test": TypeAdapter(_Test),
    "scenarios": TypeAdapter(_Scenarios),
}
"""By kind."""
