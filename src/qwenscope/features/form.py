"""What the JSON inside an index looks like: checked when it is read, so that a damaged file is named, not shown."""

from __future__ import annotations

import json
import zlib
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from qwenscope.errors import FormatError

RULE, RULE_CLIENT = "by rule: ", "rule"
"""How the label begins of a latent that no one has read, and who is said to have written it."""
LIMIT = 64 << 20
"""Bytes of JSON that a compressed cell may hold, unless its reader knows better."""

_Number = int | FiniteFloat
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
_Pair = tuple[_Count, FiniteFloat]


@with_config(ConfigDict(extra="allow"))
class _LanguageModel(TypedDict):
    name: str
    layers: list[str | None]


@with_config(ConfigDict(extra="allow"))
class _Privacy(TypedDict):
    scrub: bool


@with_config(ConfigDict(extra="allow"))
class Meta(TypedDict):
    """The whole index."""

    version: int
    name: str
    language_model: _LanguageModel
    tokens: _Count
    data: str
    privacy: _Privacy
    splits: list[str]
    roles: list[str]


class _Densities(TypedDict):
    first: _Number
    per_decade: _Count
    counts: list[_Count]


@with_config(ConfigDict(extra="allow"))
class Summary(TypedDict):
    """One SAE."""

    layer: int
    digest: NotRequired[str]
    kind: str | None
    dict_size: Annotated[int, Field(gt=0, lt=1 << 32)]
    k: int
    activation: NotRequired[str]
    tokens: _Count
    dead: _Count
    l0: FiniteFloat
    density: _Densities
    map_shares: NotRequired[list[FiniteFloat]]
    base_splits: list[FiniteFloat]
    base_roles: list[FiniteFloat]
    experts: _Count
    quality: dict[str, Any]


class Columns(TypedDict):
    """All latents of one SAE."""

    density: list[FiniteFloat]
    max: list[FiniteFloat]
    mean: list[FiniteFloat]
    role: list[int | None]
    split: NotRequired[list[int | None]]
    peaks: list[list[str]]
    promoted: list[list[str]]
    x: NotRequired[list[int | None]]
    y: NotRequired[list[int | None]]


class _Histogram(TypedDict):
    first: FiniteFloat
    per_octave: _Count
    counts: list[_Count]


class _Logits(TypedDict):
    first: FiniteFloat
    per_sd: _Count
    counts: list[_Count]


class Detail(TypedDict):
    """One latent's page."""

    fired: _Count
    density: FiniteFloat
    mean: FiniteFloat
    max: FiniteFloat
    histogram: _Histogram
    splits: list[_Number]
    roles: list[_Number]
    promoted: list[_Pair]
    suppressed: list[_Pair]
    logit_spread: NotRequired[FiniteFloat]
    logits: NotRequired[_Logits]
    neighbours: list[_Pair]
    elsewhere: list[tuple[str, _Count, FiniteFloat]]
    coactive: list[tuple[_Count, FiniteFloat, _Count]]
    experts: list[tuple[_Count, FiniteFloat, FiniteFloat]]
    examples: list[tuple[str, _Count, list[_Count], list[FiniteFloat]]]


@with_config(ConfigDict(extra="allow"))
class Explanation(TypedDict):
    """One latent's label."""

    label: str


_ADAPTERS: dict[type, TypeAdapter[Any]] = {
    form: TypeAdapter(form) for form in (Meta, Summary, Columns, Detail, Explanation)
}


def pack(value: Any) -> bytes:
    """Compressed JSON."""
    return zlib.compress(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(), 6)


def unpack(blob: bytes, form: type | None = None, limit: int = LIMIT) -> Any:
    """What `pack` packed; of this form, if one is given.

    Raises:
        FormatError: the bytes are damaged, hold more than `limit` bytes of JSON, or have another form.
    """
    try:
        inflater = zlib.decompressobj()
        text = inflater.decompress(blob, limit)
        if not inflater.eof:
            raise FormatError(f"the index is damaged (a cell is cut off, or above {limit:,} bytes); build it again")
        return parsed(text, form)
    except zlib.error as error:
        raise FormatError(f"the index is damaged ({error}); build it again") from None


def parsed(text: str | bytes, form: type | None) -> Any:
    """JSON of a form.

    Raises:
        FormatError: it is none, or has another form.
    """
    try:
        if form is not None:
            _ADAPTERS[form].validate_json(text, strict=True)
        return json.loads(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"the index is damaged ({where}: {first['msg'].lower()}); build it again") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"the index is damaged ({error}); build it again") from None
