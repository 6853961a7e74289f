"""What a page says of its paper, as types, and the strict reading of YAML into them.

`strict` refuses whatever the types do not say, in one sentence: where, which key, what is expected.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from experiments.configuration import did_you_mean
from experiments.errors import UserError

Outcome = Literal["holds", "does not hold"]
Selection = (
    tuple[str, ...] | Literal["float"]
)  # overrides of conf/compress.yaml, or the model as is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Citation:
    key: str  # in references.bib
    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    arxiv: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Official:
    """The code that ours is compared with."""

    repository: str
    files: tuple[str, ...]
    commit: str
    licence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One published number; without a group size, one group per row of the weight."""

    value: float
    bits: int
    group_size: int | None = None
    overrides: tuple[str, ...] = ()  # what else our run of it needs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Numbers from a named source, with the protocol that makes them comparable."""

    model: str
    metric: str
    protocol: str
    dense: float
    rows: tuple[Row, ...]
    source: str
    experiment: str | None = None  # conf/experiment/<name>.yaml, where we can repeat it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reported:
    """What a named source reports of training: a number for each method."""

    what: str  # the model, the data and the metric
    values: dict[str, float]  # by method, as the source names it
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Holds where the metric of `lower` is below `factor` times that of `higher`."""

    metric: str  # the place in a record: metrics.perplexity.value
    lower: Selection
    higher: Selection
    factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    id: str
    sentence: str
    source: str  # a key of references.bib, or an address
    check: Check
    experiment: str  # the command that makes the records
    reading: str | None = None  # how an adjective became measurable
    expected: dict[str, Outcome] = dataclasses.field(default_factory=dict)  # by scale
    reason: str | None = None  # for what is expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    name: str
    family: str
    needs: str
    citation: Citation
    code: str
    config: str
    tests: str
    scales: dict[str, tuple[str, ...]]  # the overrides that every run at a scale begins with
    claims: tuple[Claim, ...]
    bits: str | None = None  # per weight; null: nothing is made smaller
    seeds: tuple[int, ...] = ()  # that each training run is repeated with; none: its own
    also: tuple[str, ...] = ()
    official: Official | None = None
    published: tuple[Published, ...] = ()
    reported: tuple[Reported, ...] = ()

    @property
    def cited(self) -> set[str]:
        """Every key of references.bib that the facts name."""
        sources = {claim.source for claim in self.claims if "://" not in claim.source}
        return {self.citation.key, *self.also, *sources}


def strict[T](kind: type[T], value: Any, where: str) -> T:
    """`value`, a mapping read from YAML, as the dataclass `kind`.

    Raises UserError for a key that is unknown or missing and for a value of another type.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} should be {_expected(kind)}, and is {value!r}.")
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)  # type: ignore[arg-type]
    for key in value:
        if key not in hints:
            raise UserError(f"{where}: there is no key {key!r}{did_you_mean(str(key), hints)}")
    optional = dataclasses.MISSING
    for field in fields:
        needed = field.default is optional and field.default_factory is optional
        if needed and field.name not in value:
            raise UserError(f"{where} lacks {field.name!r}: {_expected(hints[field.name])}.")
    return kind(
        **{key: _read(hints[key], inner, f"{where}: {key}") for key, inner in value.items()}
    )


def _read(kind: Any, value: Any, where: str) -> Any:
    """One value as `kind`: a scalar, a Literal, a union, a tuple, a mapping or a dataclass."""
    if dataclasses.is_dataclass(kind):
        return strict(kind, value, where)  # type: ignore[arg-type]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _first(inner, value, where, kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(inner[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read(inner[1], each, f"{where}.{key}") for key, each in value.items()}
    if origin is Literal and value in inner:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind or (kind is types.NoneType and value is None):
        return value
    raise UserError(f"{where} should be {_expected(kind)}, and is {value!r}.")


def _first(kinds: Iterable[Any], value: Any, where: str, union: Any) -> Any:
    for kind in kinds:
        try:
            return _read(kind, value, where)
        except UserError:
            continue
    raise UserError(f"{where} should be {_expected(union)}, and is {value!r}.")


SCALARS = {str: "text", int: "a whole number", float: "a number", types.NoneType: "null"}


def _expected(kind: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in SCALARS:
        return SCALARS[kind]
    if dataclasses.is_dataclass(kind):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(kind))}"
    if origin is Literal:
        return " or ".join(repr(each) for each in inner)
    if origin is tuple:
        return f"a list, each {_expected(inner[0])}"
    if origin is dict:
        return f"a mapping, each {_expected(inner[1])}"
    return " or ".join(_expected(each) for each in inner)
