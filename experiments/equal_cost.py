"""All kinds of compression beside one another at equal cost: the bytes that a model takes, and the
multiplications of a token. A table and a picture, from records.

A kind is what was done: blocks or channels cut, weights set to zero, of low rank, quantized, one
after another, then trained; and whether a search chose what each layer got. Within a budget each
kind is shown by the best of its recorded runs.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.entry import resolved
from experiments.papers.lookup import Run, compose
from experiments.plots import MARKERS, SHOWN, Point, front_of, save
from experiments.recipes import steps
from experiments.report import Record, grid, label, labels

CUTS, ROUNDS, QUANTIZED = "experiments.structures", "algorithms.quantization", "quantized"
SEARCHED = "searched"
KINDS = {CUTS: "cut", "algorithms.pruning": "sparse", "algorithms.low_rank": "low rank",
         ROUNDS: QUANTIZED}  # fmt: skip
BYTES, WORK = "bytes", "multiplications"
BUDGETS = {
    BYTES: (0.8, 0.65, 0.5, 0.42, 0.38, 0.34, 0.29, 0.26, 0.24),
    WORK: (0.9, 0.8, 0.7, 0.6, 0.5),
}
MAPS = matplotlib.colormaps
COLORS = [*MAPS["tab20"].colors[::2], *MAPS["tab20b"].colors[::4]]  # type: ignore[attr-defined]
HALF = 16  # bits of a number of the model as it is
type Color = tuple[float, float, float]
type Costs = Mapping[str, float | None]  # as parts of the model's own


def kind(record: Record) -> str:
    """What was done to the model, in this order: "cut, trained, quantized"."""
    done = _history(record["command"], record["config"], record.get("recipe"))
    return ", ".join(dict.fromkeys(done + [SEARCHED] * is_searched(record))) or "as it is"


def _history(command: str, config: Mapping[str, Any], recipe: Sequence[Any] | None) -> list[str]:
    """Of a run, and before it of those that made its model."""
    model = config.get("model") or {}
    before = list[str]()
    if "command" in model:
        made = _composed(model["command"], tuple(model["overrides"]))
        before = _history(model["command"], made, None)
    return [*before, *_words(recipe or steps(config)), *["trained"] * (command == "train")]


def _words(recipe: Sequence[Any]) -> list[str]:
    recipe = [step for step in recipe if step]
    packages = {step.get("_target_", "").rpartition(".")[0].rpartition(".")[0] for step in recipe}
    if any(step.get("format") or step.get("factors") for step in recipe if _keeps_numbers(step)):
        packages.add(ROUNDS)  # numbers that stay, or factors, are codes too
    return [word for package, word in KINDS.items() if package in packages]


def is_searched(record: Record) -> bool:
    """Whether each layer got what a search chose, of options for the same weights."""
    return "budgets" in (record["config"].get("allocation") or {})


@functools.cache
def _composed(command: Any, overrides: tuple[str, ...]) -> Any:
    return resolved(compose(Run(command, overrides)))


def _keeps_numbers(step: Mapping[str, Any]) -> bool:
    return step.get("_target_", "").startswith(("algorithms.pruning", "algorithms.low_rank"))


def costs(records: Sequence[Record]) -> list[Costs]:
    """Of each, as parts of what the model takes as it is, in 16 bits; None: not on record, and of
    bytes where they are more than that, as what training leaves in float32.

    Rounding leaves the multiplications as they are: a run that does nothing else has those of the
    whole model, whether it said so or not, and one that does says what they are.
    """
    sizes = [record["footprint"] for record in records]
    whole = max((size["parameters"] for size in sizes), default=0)
    rounded = [kind(record).removesuffix(f", {SEARCHED}") == QUANTIZED for record in records]
    said = [size.get("multiplications") for size in sizes]
    all_work = next((own for own, plain in zip(said, rounded, strict=True) if own and plain), None)
    found = list[Costs]()
    for size, own, plain in zip(sizes, said, rounded, strict=True):
        own = all_work if plain else own
        work = own / all_work if own and all_work else None
        stored = size["model_bits"] / (HALF * whole)
        found.append({BYTES: stored if stored <= 1 else None, WORK: work})
    return found


def _value(record: Record) -> float:
    return record["metrics"]["perplexity"]["value"]


def table(records: Sequence[Record], cost: str) -> list[list[str]]:
    """A row for each budget, a column for each kind: the lowest perplexity within it, and whose."""
    sized = [record for record in records if record.get("footprint")]
    kinds = sorted({kind(record) for record in sized})
    named = list(zip(sized, labels(sized), costs(sized), strict=True))
    rows = []
    for budget in BUDGETS[cost]:
        within = [each for each in named if (each[2][cost] or math.inf) <= budget]
        best = [
            min((each for each in within if kind(each[0]) == one), default=None, key=_of_named)
            for one in kinds
        ]
        least = min((_value(each[0]) for each in best if each), default=math.nan)
        rows.append([f"{100 * budget:g} %", *(_cell(each, least) for each in best)])
    return [[f"{cost} at most", *kinds], *rows]


def _of_named(named: tuple[Record, str, Costs]) -> float:
    return _value(named[0])


def _cell(found: tuple[Record, str, Costs] | None, least: float) -> str:
    if found is None:
        return "–"
    value = f"{_value(found[0]):.2f}"
    return f"{f'**{value}**' if _value(found[0]) == least else value} {found[1]}"


NOTE = (
    "Perplexity of the best recorded run of each kind within the budget; bold: of all. Parts are "
    "of the model as it is, in 16 bits: bytes of all its tensors; multiplications of a token, by "
    "the weights that there are, in blocks and head. Zeros between weights and ranks save "
    "multiplications only where software skips them."
)


def markdown(records: Sequence[Record]) -> str:
    tables = [grid(table(records, cost), text_columns=99) for cost in BUDGETS]
    return "\n\n".join([*tables, NOTE]) + "\n"


def digest(records: Sequence[Record]) -> str:
    shown = [
        [label(record), kind(record), record.get("footprint"), _value(record)] for record in records
    ]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def picture(records: Sequence[Record], path: Path) -> Path:
    """Perplexity against bytes and against multiplications, a colour for each kind with the front
    of its best. records: the model as it is first. Whole or not at all.
    """
    reference, *others = records
    highest = SHOWN * _value(reference)
    shown = [r for r in others if r.get("footprint") and _value(r) <= highest]
    found, kinds = costs(shown), sorted({kind(record) for record in shown})
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(11.0, 5.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, cost in zip(panels, BUDGETS, strict=True):
            for number, one in enumerate(kinds):
                points = [
                    (part, _value(record))
                    for record, each in zip(shown, found, strict=True)
                    if kind(record) == one and (part := each[cost]) is not None
                ]
                _front(
                    axes, points, COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)], one
                )
            _frame(axes, f"{cost}, part of the model's own in 16 bits", _value(reference))
        panels[0].set_ylabel("perplexity (log scale)")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, ncols=4, loc="outside lower center", frameon=False)
        return save(figure, path, digest(records))


def _front(axes: Axes, points: Sequence[Point], color: Color, marker: str, name: str) -> None:
    """All points, and a line through those that no other of the kind beats in both."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, marker, color=color, alpha=0.45, markersize=5, label=name)
    best = [points[n] for n in front_of(points)]
    axes.plot([x for x, _ in best], [y for _, y in best], color=color, linewidth=1.2)


def _frame(axes: Axes, name: str, level: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(level, color="gray", linestyle="--", linewidth=1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)
