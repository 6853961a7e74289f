"""Experiments beside one another: repetitions gathered, uncertainty stated, differences paired.

An experiment is all records of one identity; its seeds are its repetitions. With two or more, the
confidence interval is over seeds; with one, perplexity's is over held-out windows, a task's over
its questions, and any other metric has none. Perplexity is averaged in the log, so that it and its
interval are exp(loss). The same seeds again tell nothing new of a perplexity or of a task, so the
latest counts; of a time they do.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from experiments.errors import UserError
from experiments.papers.claims import PERPLEXITY, by_seeds, mean_difference, p_value, shared_seeds
from experiments.report import (
    Record,
    bits_per_weight,
    grid,
    label,
    labels,
    loss_differences,
    number,
)
from experiments.statistics import Estimate, estimate, holm
from experiments.task_scores import question_scores, short_name


@dataclasses.dataclass(frozen=True)
class Experiment:
    name: str  # its label, with what tells it from others of the same label
    records: tuple[Record, ...]  # its repetitions


@dataclasses.dataclass(frozen=True)
class Row:
    """One experiment; of perplexity, `found` and `difference` are in nats per token."""

    experiment: Experiment
    found: Estimate
    over: str  # of the interval: "seeds", "runs", "windows", "questions", or "–" for none
    difference: Estimate | None  # to the reference, paired; None for itself and without one
    difference_over: str  # or why there is no difference
    p: float  # of no difference, adjusted by Holm over the table


def experiments(records: Iterable[Record]) -> list[Experiment]:
    """The records by identity, in order of appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["identity"], []).append(record)
    names = labels([mine[0] for mine in found.values()])
    return [Experiment(*each) for each in zip(names, map(tuple, found.values()), strict=True)]


def measured(experiment: Experiment, metric: str) -> bool:
    """All its records have the metric."""
    try:
        return bool([number(record, metric) for record in experiment.records])
    except UserError:
        return False


def compare(
    found: Sequence[Experiment], metric: str = PERPLEXITY, reference: str | None = None
) -> list[Row]:
    """Every experiment against the one whose name holds `reference`, or its own float model.

    Raises UserError if a record lacks the metric or `reference` is not the name of just one.
    """
    named = None if reference is None else choose(found, reference)
    rows = [_row(each, metric, named or _float_of(each, found, metric)) for each in found]
    adjusted = holm([row.p for row in rows])
    return [dataclasses.replace(row, p=p) for row, p in zip(rows, adjusted, strict=True)]


def choose(found: Sequence[Experiment], substring: str) -> Experiment:
    """The one experiment that is named so, or whose name holds the substring alone."""
    exact = [each for each in found if each.name == substring]
    alike = exact or [each for each in found if substring in each.name]
    if len(alike) != 1:
        names = "; ".join(each.name for each in alike or found)
        count = f"{len(alike)} experiments" if alike else "no experiment"
        raise UserError(f"reference {substring!r} names {count}: give one of {names}.")
    return alike[0]


def _float_of(
    experiment: Experiment, found: Sequence[Experiment], metric: str
) -> Experiment | None:
    """The same model as it is, on the same windows or questions."""
    first = experiment.records[0]
    for other in found:
        reference = other.records[0]
        if label(reference) == "float" and reference["model"]["digest"] == first["model"]["digest"]:
            if _by_part(first, reference, metric) is not None:
                return other
    return None


def _row(experiment: Experiment, metric: str, reference: Experiment | None) -> Row:
    records: Sequence[Record] = experiment.records
    if judged := _parts(records[0], metric) is not None:
        records = list(by_seeds(records).values())
    values = np.array([number(record, metric) for record in records])
    sample, over = values, "runs" if len(records) > 1 else "–"
    if judged:
        sample, over = np.log(values) if metric == PERPLEXITY else values, "seeds"
    if len(records) == 1 and (parts := _parts(records[0], metric)) is not None:
        sample, over = parts, _what(metric)
    found = estimate(sample)
    if reference is None or reference is experiment:
        return Row(experiment, found, over, None, "–", math.nan)
    try:
        sample, apart = _differences(records, reference.records, metric)
    except UserError:
        why = _why_not(records, reference.records, metric)
        return Row(experiment, found, over, None, why, math.nan)
    difference = estimate(sample)
    return Row(experiment, found, over, difference, apart, difference.p)


def _what(metric: str) -> str:
    """What one run's metric is a mean over."""
    return "windows" if metric == PERPLEXITY else "questions"


def _parts(record: Record, metric: str) -> Float[np.ndarray, "n"] | None:
    """What one run's metric is the mean of: losses of windows, scores of questions."""
    if metric == PERPLEXITY:
        return np.array(record["metrics"]["perplexity"]["window_losses"])
    scores = question_scores(record, metric)
    return None if scores is None else scores[1]


def _by_part(record: Record, reference: Record, metric: str) -> Float[np.ndarray, "n"] | None:
    """Differences by window or question; None unless these are the same, of other metrics by
    window too."""
    mine, other = question_scores(record, metric), question_scores(reference, metric)
    if mine is None and other is None:
        return loss_differences(record, reference)
    if mine is None or other is None or mine[0] != other[0]:
        return None
    return mine[1] - other[1]


def _differences(
    records: Sequence[Record], reference: Sequence[Record], metric: str
) -> tuple[Float[np.ndarray, "n"], str]:
    """One difference per shared seed; with a single one, of what has parts, one per part."""
    pairs = shared_seeds(records, reference)
    if metric == PERPLEXITY:
        if len(pairs) == 1:
            return mean_difference(pairs), "windows"
        return np.array([mean_difference([pair]).mean() for pair in pairs]), "seeds"
    if question_scores(records[0], metric) is not None:
        apart = [_by_part(a, b, metric) for a, b in pairs]
        if any(each is None for each in apart):
            raise UserError("other questions")
        if len(pairs) == 1:
            assert apart[0] is not None
            return apart[0], "questions"
    return np.array([number(a, metric) - number(b, metric) for a, b in pairs]), "seeds"


def _why_not(records: Sequence[Record], reference: Sequence[Record], metric: str) -> str:
    if _by_part(records[0], reference[0], metric) is None:
        return "other questions" if question_scores(records[0], metric) else "other windows"
    return "no shared seed"


def cells(row: Row, metric: str) -> list[str]:
    """As HEADER: perplexity as itself, its differences in nats."""
    mean, low, high = row.found.mean, row.found.low, row.found.high
    if metric == PERPLEXITY:
        mean, low, high = (math.exp(min(x, 700)) for x in (mean, low, high))
    digits = ".3f" if metric == PERPLEXITY else ".3g"
    bits, delta = bits_per_weight(row.experiment.records[0]), row.difference
    return [
        row.experiment.name,
        "–" if bits is None else f"{bits:.2f}",
        str(len(by_seeds(row.experiment.records))),
        _figures(mean),
        "–" if math.isnan(low) else f"{_figures(low)} to {_figures(high)}",
        "–" if row.over == "–" else f"{row.found.n} {row.over}",
        row.difference_over if delta is None else f"{delta.mean:+{digits}}",
        "–"
        if delta is None or math.isnan(delta.low)
        else f"{delta.low:+{digits}} to {delta.high:+{digits}}",
        "–" if delta is None else f"{delta.n} {row.difference_over}",
        "–" if math.isnan(row.p) else p_value(row.p).removeprefix("= "),
    ]


def header(metric: str) -> list[str]:
    what = "perplexity" if metric == PERPLEXITY else short_name(metric)
    delta = "Δ loss" if metric == PERPLEXITY else "Δ"
    names = ["method", "bits", "seeds", what, "95 % interval", "over"]
    return [*names, delta, "its 95 % interval", "over", "p (Holm)"]


FOOTNOTE = (
    "intervals: Student's t over seeds where there are two or more, else over held-out windows; "
    "Δ: paired over the same to the float model or the reference named, nats per token where it is "
    "of the loss; p: of no difference, adjusted for all rows; seconds to compress and GB of peak "
    "memory are of the first seed; †: other work had more than a twentieth of the machine "
    "meanwhile, or how much it had is not on record; growth: of the time that a block takes, the "
    "last third of them over the first, without the very first: 1 where time is linear in depth."
)
QUIET = 0.05


def markdown(rows: Sequence[Row], metric: str = PERPLEXITY) -> str:
    """For a document, with what each run cost: seconds to compress, their growth, peak memory."""
    lines = [[*header(metric), "seconds", "growth", "GB"]]
    lines += [[*cells(row, metric), *_cost(row.experiment.records[0])] for row in rows]
    return f"{grid(lines)}\n\n{FOOTNOTE}\n"


def _cost(record: Record) -> list[str]:
    seconds, memory = record["seconds"].get("compress"), record.get("peak_memory")
    shared = record.get("elsewhere", {}).get("compress", 1.0) > QUIET
    return [
        "–" if seconds is None else f"{seconds:.0f}{' †' if shared else ''}",
        _growth(record),
        "–" if memory is None else f"{memory / 1e9:.2f}",
    ]


def _growth(record: Record) -> str:
    """Of the median seconds per block; the first block compiles what all have."""
    spent = [sum(layer["seconds"].values()) for layer in record.get("layers", [])]
    if (third := len(spent) // 3) < 2:
        return "–"
    early, late = np.median(spent[1 : 1 + third]), np.median(spent[-third:])
    return f"{late / early:.2f}"


def _figures(value: float) -> str:
    """Four figures, no exponent for what people read without."""
    if not math.isfinite(value) or not 1e-3 <= abs(value) < 1e7:
        return f"{value:.4g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
