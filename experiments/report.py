"""Tables from records."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich import box
from rich.table import Table

from experiments.configuration import leaves
from experiments.errors import UserError
from experiments.evaluation.footprint import Footprint
from experiments.recipes import steps as recipe_steps
from experiments.runs.identity import EXCLUDED, SEEDS, seeds_label
from experiments.statistics import Estimate, estimate
from experiments.step_labels import (
    allocation_label,
    origin,
    step_label,
    training_label,
    with_options,
)

Record = dict[str, Any]

HEADER = ("method", "bits", "disk MB", "perplexity", "Δ loss", "seconds", "GB")
FOOTNOTE = (
    "bits per compressed weight, scales and zero points counted; ± standard error over windows; "
    "Δ loss: to the float model, paired by window, nats per token; seconds to compress or train; "
    "GB: peak memory."
)


def label(record: Record) -> str:
    """What was done to the model, in a few words: "AWQ + RTN 4 bit g64"."""
    if "optimizer" in record["config"]:
        return training_label(record["config"])
    allocation = record["config"].get("allocation") or {}
    steps = [step for step in record.get("recipe") or recipe_steps(record["config"]) if step]
    words = [step_label(with_options(step, allocation)) for step in steps if "rule" not in step]
    if rules := len(steps) - len(words):
        words.append(f"{rules} rule{'s' if rules > 1 else ''}")
    if allocation:
        words.append(allocation_label(allocation))
    asked = record["config"].get("model", {})  # an endpoint is known by its name
    stored = record["config"].get("walk", {}).get("dense_dtype") or "float"  # and nothing else done
    own = asked["name"] if "url" in asked and not record["config"].get("checkpoint") else stored
    return (" + ".join(words) or record.get("stored_as") or own) + origin(record["config"])


def labels(records: Sequence[Record]) -> list[str]:
    """As `label`, with the settings that tell experiments of one label apart.

    A setting is named where it is not what most of its namesakes have: "GPTQ 3 bit g64
    sequential=false". Repetitions of one experiment are named by their seeds.
    """
    plain, settings = list(map(label, records)), list(map(_settings, records))
    named = []
    for name, mine in zip(plain, settings, strict=True):
        alike = [other for other, its in zip(settings, plain, strict=True) if its == name]
        keys = dict.fromkeys(key for other in alike for key in other)
        own = [key for key in keys if _uncommon(mine.get(key), [o.get(key) for o in alike])]
        named.append(
            " ".join([name, *(f"{key.split('.')[-1]}={mine.get(key, 'null')}" for key in own)])
        )
    again = Counter(named)
    return [
        f"{name} {seeds_label(record['seeds'])}" if again[name] > 1 and "seeds" in record else name
        for name, record in zip(named, records, strict=True)
    ]


def _uncommon(value: str | None, all_values: list[str | None]) -> bool:
    """Not the one value that most have; where none is, every value counts as uncommon."""
    ranked = Counter(all_values).most_common(2)
    tied = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
    return tied or value != ranked[0][0]


def _settings(record: Record) -> dict[str, str]:
    """The configuration that makes its identity, flat: {"algorithm.format.bits": "4"}."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in leaves(record["config"])
        if key.split(".")[0] not in EXCLUDED
        and SEEDS.isdisjoint(key.split("."))
        and value not in (None, {}, [])  # a step that is left out, or was no step yet
    }


def number(record: Record, metric: str) -> float:
    """The number at a place of a record, such as "metrics.perplexity.value".

    Raises UserError if there is none.
    """
    at: Any = record
    for key in metric.split("."):
        at = at.get(key) if isinstance(at, Mapping) else None
    if not isinstance(at, (int, float)) or isinstance(at, bool):
        raise UserError(f"The record of {label(record)} has no number at {metric}.")
    return float(at)


def bits_per_weight(record: Record) -> float | None:
    """Over the compressed layers, everything counted; None for a model left as it is."""
    size = record.get("footprint")
    return Footprint(**size).bits_per_weight if size and size["weights"] else None


def loss_differences(record: Record, reference: Record) -> Float[np.ndarray, "windows"] | None:
    """Loss minus the reference's by window, in nats; None unless the windows are the same."""
    mine, other = (scores(r) for r in (record, reference))
    if not mine or not other:
        return None
    if mine["data"] != other["data"] or mine["windows"] != other["windows"]:
        return None
    return np.subtract(mine["window_losses"], other["window_losses"])


def scores(record: Record) -> Mapping[str, Any] | None:
    """What was evaluated: perplexity, or of an encoder similarity; both have a loss by window."""
    return record["metrics"].get("perplexity") or record["metrics"].get("similarity")


def _value(record: Record) -> str:
    found = scores(record)
    if not found:
        return "–"
    value, error = found["value"], found["standard_error"]
    if "similarity" in record["metrics"]:
        return f"{100 * value:.1f} ± {100 * error:.1f} %"  # of second halves found
    return f"{value:.2f} ± {error:.2f}"


def paired_difference(record: Record, reference: Record) -> tuple[float, float] | None:
    """Mean over windows of the loss minus the reference's, and its standard error, in nats.

    None unless both were evaluated on the same windows.
    """
    delta = loss_differences(record, reference)
    return None if delta is None else estimate(delta)[1:3]


def cells(record: Record, reference: Record | None, name: str) -> list[str]:
    """One row of a table, in the order of HEADER, the method under the name given."""
    metrics, bits = scores(record), bits_per_weight(record)
    spent = record["seconds"]
    seconds = spent.get("compress", spent.get("train"))
    left_as_it_is = bits is None and "structure" not in record
    delta = None
    if metrics and reference is not None and record is not reference:
        delta = paired_difference(record, reference)
    return [
        name,
        "–" if bits is None else f"{bits:.2f}",
        "–" if left_as_it_is else f"{record['bytes_on_disk'] / 1e6:.1f}",
        _value(record),
        "–" if delta is None else f"{delta[0]:+.3f} ± {delta[1]:.3f}",
        "–" if seconds is None else f"{seconds:.0f}",
        f"{record['peak_memory'] / 1e9:.2f}",
    ]


def header(records: Sequence[Record]) -> list[str]:
    """HEADER, with what was evaluated in its place."""
    similar = any("similarity" in record["metrics"] for record in records)
    return ["found" if similar and name == "perplexity" else name for name in HEADER]


def float_record(records: Sequence[Record]) -> Record | None:
    """The model as it is, where it is among the records."""
    return next((record for record in records if label(record) == "float"), None)


def table(records: Sequence[Record]) -> Table:
    """For the terminal."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption=FOOTNOTE, caption_justify="left")
    for number, name in enumerate(header(records)):
        drawn.add_column(name, justify="right" if number else "left", no_wrap=True)
    for record, name in zip(records, labels(records), strict=True):
        drawn.add_row(*cells(record, float_record(records), name))
    return drawn


def calibration(record: Record) -> str:
    """The windows that a method observed: "32 × 512"; a dash for one that needs no data."""
    observed = any(
        "statistics" in layer["seconds"] or "block" in layer["errors"]  # learned on the block
        for layer in record.get("layers", [])
    )
    structure = record["config"].get("structure")  # found on them, but where it is named what stays
    observed |= bool(structure) and not _named(structure)
    return " × ".join(map(str, record["data"]["calibration"])) if observed else "–"


def _named(structure: Mapping[str, Any]) -> bool:
    """Whether a structure's settings say what stays, so that nothing is observed."""
    if structure["_target_"].endswith(".subnetwork"):
        return True
    return isinstance(structure.get("layers"), list) and "budgets" not in structure


def markdown(records: Sequence[Record]) -> str:
    """For a document: as `table`, with the calibration windows."""
    reference, head = float_record(records), [*header(records), "calibration"]
    rows = [
        [*cells(record, reference, name), calibration(record)]
        for record, name in zip(records, labels(records), strict=True)
    ]
    return f"{grid([head, *rows])}\n\n{FOOTNOTE}\n"


def with_interval(found: Estimate, digits: int, sign: str = "", scale: int = 1) -> str:
    """The mean and half of its confidence interval, where there is one, both times `scale`."""
    mean, half = scale * found.mean, scale * (found.high - found.mean)
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"


def grid(rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table, its header first; columns after the first few are numbers."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(rows[0]))]
    head, *rest = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rest))
