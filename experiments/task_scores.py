"""What records say of tasks: tables of them, and every question's own score.

In a record, `metrics.tasks` has for each task what was asked (version, n, few-shot examples, limit,
digest of the questions with their prompts) and its metrics, the task's first one first.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from rich import box
from rich.table import Table

from experiments.report import Record, bits_per_weight, grid, labels

PLACE = re.compile(r"metrics\.tasks\.(?P<task>.+)\.(?P<metric>[^.]+)\.value")
FOOTNOTE = (
    "tasks by lm-eval: each one's first metric ± its standard error over questions; bits per "
    "compressed weight, scales and zero points counted."
)


def tasks_of(record: Record) -> Mapping[str, Any]:
    """What a record says of each task; nothing where none was asked."""
    return record.get("metrics", {}).get("tasks", {})


def first_metric(task: Mapping[str, Any]) -> str | None:
    """The metric that a task names first."""
    return next((k for k, v in task.items() if isinstance(v, Mapping) and "value" in v), None)


def question_scores(record: Record, place: str) -> tuple[str, Float[np.ndarray, "n"]] | None:
    """The digest of a task's questions, and the metric of each.

    place: where the metric is in a record, such as "metrics.tasks.wikihow_steps.acc.value". None
    where it is of no task, or is not a mean of numbers.
    """
    at = PLACE.fullmatch(place)
    task = tasks_of(record).get(at["task"], {}) if at else {}
    scores = task.get(at["metric"], {}).get("sample_scores", []) if at else []
    if not scores or not all(isinstance(score, (int, float)) for score in scores):
        return None
    return task["digest"], np.array(scores, np.float64)


def short_name(place: str) -> str:
    """A task and its metric in two words; any other place as it is."""
    at = PLACE.fullmatch(place)
    return f"{at['task']} {at['metric']}" if at else place


def columns(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Each task of the records with its first metric, in order of appearance."""
    found: dict[str, str] = {}
    for record in records:
        for name, task in tasks_of(record).items():
            if metric := first_metric(task):
                found.setdefault(name, metric)
    return list(found.items())


def rows(records: Sequence[Record]) -> list[list[str]]:
    """A header, and a row for each record: its name, its bits, each task."""
    asked = columns(records)
    head = ["method", "bits", *(f"{task} {metric}" for task, metric in asked)]
    body = []
    for record, name in zip(records, labels(records), strict=True):
        bits = bits_per_weight(record)
        scores = [_cell(tasks_of(record).get(task, {}).get(metric)) for task, metric in asked]
        body.append([name, "–" if bits is None else f"{bits:.2f}", *scores])
    return [head, *body]


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    error, value = found["standard_error"], found["value"]
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def table(records: Sequence[Record]) -> Table:
    """For the terminal."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption=FOOTNOTE, caption_justify="left")
    head, *body = rows(records)
    for number, name in enumerate(head):
        drawn.add_column(name, justify="right" if number else "left")
    for row in body:
        drawn.add_row(*row)
    return drawn


def markdown(records: Sequence[Record]) -> str:
    """For a document."""
    return f"{grid(rows(records))}\n\n{FOOTNOTE}\n"
