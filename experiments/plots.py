"""Pictures from records."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.evaluation.footprint import Footprint
from experiments.report import Record, bits_per_weight, float_record, label, paired_difference

MARKERS = "osD^vP*X"


def perplexity_against_size(records: Sequence[Record], path: Path) -> Path:
    """Perplexity against the megabytes of all tensors, one line per method; whole or not at all.

    The bars are ± one standard error of the *paired* difference to the float model, when it is
    among the records: the windows are the same, so what they share cancels.
    """
    reference = float_record(records)
    points = [record for record in records if bits_per_weight(record) is not None]
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for number, name in enumerate(dict.fromkeys(map(_method, points))):
            mine = sorted((r for r in points if _method(r) == name), key=_megabytes)
            _line(axes, mine, reference, name, number)
        if reference is not None:
            _level(axes, reference)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
        axes.set_xlabel("size of all tensors, MB")
        axes.set_ylabel("perplexity (log scale)")
        axes.margins(x=0.25, y=0.15)
        axes.grid(alpha=0.3)
        axes.legend()
        partial = path.with_name(f".{path.name}")
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
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


def _level(axes: Axes, reference: Record) -> None:
    axes.axhline(_value(reference), color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        f"float model {_value(reference):.2f}",
        (1, _value(reference)),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(-4, -11),
        ha="right",
        fontsize=8,
        color="gray",
    )


def _error(record: Record, reference: Record | None) -> float:
    """Standard error of the loss, paired where it can be."""
    paired = None if reference is None else paired_difference(record, reference)
    return paired[1] if paired else record["metrics"]["perplexity"]["loss_standard_error"]


def _method(record: Record) -> str:
    """The method without its bits: points of one method are joined."""
    return " ".join(w for w in label(record).replace(" bit", "-bit").split() if "-bit" not in w)


def _value(record: Record) -> float:
    return record["metrics"]["perplexity"]["value"]


def _megabytes(record: Record) -> float:
    return Footprint(**record["footprint"]).megabytes
