"""Pictures from records. Each PNG carries a digest of the numbers it was drawn from."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from experiments.errors import UserError
from experiments.evaluation.footprint import Footprint
from experiments.report import (
    Record,
    bits_per_weight,
    float_record,
    label,
    labels,
    paired_difference,
)

MARKERS = "osD^vP*X<>hp"
COLORS = cycler(color=matplotlib.colormaps["tab20"].colors)  # type: ignore[attr-defined]
SHOWN = 30.0  # times the float model's perplexity
type Point = tuple[float, float]  # bits per weight, or another cost, and perplexity
DIGEST = "planish:records"  # the PNG's text chunk


def perplexity_against_size(records: Sequence[Record], path: Path) -> Path:
    """Perplexity against the megabytes of all tensors, one line per method; whole or not at all.

    The bars are ± one standard error of the *paired* difference to the float model, when it is
    among the records: the windows are the same, so what they share cancels.
    """
    reference = float_record(records)
    with matplotlib.rc_context({"font.size": 10}):
        figure, axes = _figure("size of all tensors, MB")
        for number, (name, mine) in enumerate(_by_method(records).items()):
            _line(axes, sorted(mine, key=_megabytes), reference, name, number)
        if reference is not None:
            _level(axes, reference)
        axes.margins(x=0.25, y=0.15)
        axes.legend()
        return save(figure, path, records_digest(records))


def pareto(records: Sequence[Record], path: Path, peers: Sequence[Point] = ()) -> Path:
    """Perplexity against bits per compressed weight, every method, and the front of the best.

    A point is on the front if no other has both fewer or equal bits and a lower perplexity. Bars as
    in `perplexity_against_size`; what lies above SHOWN times the float model is left out and
    counted. peers: bits and perplexity of other tools' results, drawn apart and never on the front.
    Whole or not at all.
    """
    reference = float_record(records)
    within = [r for r in records if reference is None or _value(r) <= SHOWN * _value(reference)]
    methods = _by_method(within)
    with matplotlib.rc_context({"font.size": 10, "axes.prop_cycle": COLORS}):
        figure, axes = _figure(
            "bits per compressed weight, scales and zero points counted", width=9.5, height=8.0
        )
        best = front([record for mine in methods.values() for record in mine])
        axes.step(
            [_bits(r) for r in best],
            [_value(r) for r in best],
            where="post",
            color="gray",
            linewidth=5,
            alpha=0.25,
            label="Pareto front",
        )
        for number, (name, mine) in enumerate(methods.items()):
            _points(axes, mine, reference, name, number)
        names = {id(r): name for r, name in zip(records, labels(records), strict=True)}
        _name(axes, best, [names[id(record)] for record in best])
        if reference is not None:
            _level(axes, reference)
        _elsewhere(axes, peers, math.inf if reference is None else SHOWN * _value(reference))
        axes.margins(x=0.08, y=0.12)
        if above := len(records) - len(within):
            axes.set_title(
                f"{above} more above {SHOWN:g} times the float model", fontsize=8, loc="left"
            )
        figure.legend(fontsize=7, ncols=2, loc="outside lower center", frameon=False)
        return save(figure, path, records_digest(records, peers))


def front(records: Sequence[Record]) -> list[Record]:
    """Those that no other beats in both bits and perplexity, by rising bits."""
    places = [(_bits(record), _value(record)) for record in records]
    return [records[n] for n in front_of(places)]


def front_of(points: Sequence[Point]) -> list[int]:
    """Which points no other beats in both of what they have, by the first of it, rising."""
    best: list[int] = []
    for n in sorted(range(len(points)), key=lambda n: points[n]):
        if not best or points[n][1] < points[best[-1]][1]:
            best.append(n)
    return best


def records_digest(records: Sequence[Record], peers: Sequence[Point] = ()) -> str:
    """SHA-256 of the recorded numbers that a picture shows, as they were written."""
    shown: list[Any] = [
        [name, record.get("footprint"), record["metrics"]["perplexity"]]
        for record, name in zip(records, labels(records), strict=True)
    ]
    shown += [f"{bits:.4f} {perplexity:.4f}" for bits, perplexity in peers]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest that a picture carries; None where it carries none.

    Raises UserError if there is no picture.
    """
    try:
        with Image.open(path) as picture:
            return picture.info.get(DIGEST)
    except OSError as error:
        raise UserError(f"{path} cannot be read as a picture: {error}.") from error


def _figure(xlabel: str, width: float = 7.0, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(xlabel)
    axes.set_ylabel("perplexity (log scale)")
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure: Figure, path: Path, digest: str) -> Path:
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata={DIGEST: digest})
    partial.replace(path)
    return path


def _line(
    axes: Axes, mine: Sequence[Record], reference: Record | None, name: str, number: int
) -> None:
    xs, ys = [_megabytes(r) for r in mine], [_value(r) for r in mine]
    drawn = axes.errorbar(
        xs,
        ys,
        yerr=[y * _error(r, reference) for y, r in zip(ys, mine, strict=True)],
        marker=MARKERS[number % len(MARKERS)],
        capsize=3,
        label=name,
    )
    above = number % 2 == 0  # neighbours' labels on opposite sides
    for x, y, record in zip(xs, ys, mine, strict=True):
        axes.annotate(
            f"{y:.1f} at {bits_per_weight(record):.2f} bits",
            (x, y),
            textcoords="offset points",
            xytext=(6, 4) if above else (-6, -14),
            ha="left" if above else "right",
            fontsize=8,
            color=drawn.lines[0].get_color(),
        )


def _points(
    axes: Axes, mine: Sequence[Record], reference: Record | None, name: str, number: int
) -> None:
    axes.errorbar(
        [_bits(r) for r in mine],
        [_value(r) for r in mine],
        yerr=[_value(r) * _error(r, reference) for r in mine],
        marker=MARKERS[number % len(MARKERS)],
        linestyle="none",
        capsize=3,
        alpha=0.8,
        label=name,
    )


def _name(axes: Axes, best: Sequence[Record], names: Sequence[str]) -> None:
    """A number at each point of the front, and what they stand for where no point can be."""
    for number, record in enumerate(best, 1):
        axes.annotate(
            str(number),
            (_bits(record), _value(record)),
            textcoords="offset points",
            xytext=(-7, -7),
            ha="right",
            va="center",
            fontsize=9,
            fontweight="bold",
        )
    named = zip(best, names, strict=True)
    axes.text(
        0.985,
        0.97,
        "\n".join(f"{n}  {name}: {_value(r):.1f}" for n, (r, name) in enumerate(named, 1)),
        transform=axes.transAxes,
        ha="right",
        va="top",
        multialignment="left",
        fontsize=8,
        linespacing=1.4,
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0},
    )


def _elsewhere(axes: Axes, peers: Sequence[Point], highest: float) -> None:
    if shown := [point for point in peers if point[1] <= highest]:
        bits, perplexity = zip(*shown, strict=True)
        axes.scatter(
            bits, perplexity, marker="o", edgecolors="black", facecolors="none", s=70,
            label="other tools",
        )  # fmt: skip


def _level(axes: Axes, reference: Record) -> None:
    axes.axhline(_value(reference), color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        f"float model {_value(reference):.2f}",
        (0, _value(reference)),  # where size is small, every method is far above
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(4, -11),
        fontsize=8,
        color="gray",
    )


def _by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The compressed ones, by method without its bits: points of one method belong together."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if bits_per_weight(record) is not None:
            words = label(record).replace(" bit", "-bit").split()
            name = " ".join(word for word in words if "-bit" not in word)
            found.setdefault(name, []).append(record)
    return found


def _error(record: Record, reference: Record | None) -> float:
    """Standard error of the loss, paired where it can be."""
    paired = None if reference is None else paired_difference(record, reference)
    return paired[1] if paired else record["metrics"]["perplexity"]["loss_standard_error"]


def _bits(record: Record) -> float:
    return bits_per_weight(record) or 0.0


def _value(record: Record) -> float:
    return record["metrics"]["perplexity"]["value"]


def _megabytes(record: Record) -> float:
    return Footprint(**record["footprint"]).megabytes
