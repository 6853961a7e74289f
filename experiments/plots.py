"""Pictures from records."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from experiments.report import Record, bits_per_weight, label

MARKERS = "osD^vP*X"


def perplexity_against_size(records: Sequence[Record], path: Path) -> Path:
    """Perplexity ± standard error of Δ against megabytes of all tensors, one line per method.

    The bars are of the *paired* difference to the float model when it is among the records: the
    windows are the same, so what they share cancels. Written whole or not at all.
    """
    with matplotlib.rc_context({"font.size": 10, "svg.hashsalt": "planish"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        points = [record for record in records if bits_per_weight(record) is not None]
        for number, name in enumerate(dict.fromkeys(_method(record) for record in points)):
            mine = sorted((r for r in points if _method(r) == name), key=_megabytes)
            axes.plot(
                [_megabytes(r) for r in mine],
                [_value(r) for r in mine],
                marker=MARKERS[number % len(MARKERS)],
                label=name,
            )
            for record in mine:
                axes.annotate(
                    f"{bits_per_weight(record):.2f} bits\n{_value(record):.1f}",
                    (_megabytes(record), _value(record)),
                    textcoords="offset points",
                    xytext=(8, 4),
                    fontsize=8,
                )
        for record in records:
            if bits_per_weight(record) is None:
                axes.axhline(_value(record), color="gray", linestyle="--", linewidth=1)
                axes.annotate(
                    f"float model {_value(record):.2f}",
                    (1, _value(record)),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    xytext=(-4, 3),
                    ha="right",
                    fontsize=8,
                    color="gray",
                )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
        axes.set_xlabel("size of all tensors, MB")
        axes.set_ylabel("perplexity (log scale)")
        axes.margins(x=0.2, y=0.15)
        axes.grid(alpha=0.3)
        axes.legend()
        partial = path.with_name(f".{path.name}")
        figure.savefig(partial, format=path.suffix[1:], dpi=150)
        partial.replace(path)
    return path


def _method(record: Record) -> str:
    """The method without its bits: points of one method are joined."""
    return " ".join(w for w in label(record).replace(" bit", "-bit").split() if "-bit" not in w)


def _value(record: Record) -> float:
    return record["metrics"]["perplexity"]["value"]


def _megabytes(record: Record) -> float:
    return record["footprint"]["model_bits"] / 8e6
