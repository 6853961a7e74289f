"""Gather runs into one table, repetitions together, differences paired:
python -m experiments.collect [FOLDER_OR_RECORD …] [--metric M] [--reference R]
    [--csv FILE] [--markdown FILE] [--publish FOLDER]

Every record below the folders counts (runs/ when none is named), and so does every run that has
none: what failed or was interrupted is listed below the table, with its reason. Tasks of
evaluation=lm_eval have a table of their own; --metric metrics.tasks.NAME.acc.value compares by one.
"""

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from experiments import records, task_scores
from experiments.comparison import (
    FOOTNOTE,
    Row,
    cells,
    compare,
    experiments,
    header,
    markdown,
    measured,
)
from experiments.entry import guarded
from experiments.errors import UserError
from experiments.files import write_whole
from experiments.papers.claims import PERPLEXITY, by_seeds
from experiments.progress import console
from experiments.publication import publish
from experiments.report import Record, bits_per_weight
from experiments.runs import journal
from experiments.runs.run import Run as Done

RUNS = Path("runs")
BEGINNINGS = ("search", "library")  # of compressions, whose records say what was chosen
COLUMNS = ["method", "identity", "seeds", "bits", "metric", "n", "over", "mean", "low", "high"]
COLUMNS += ["difference_n", "difference_over", "difference", "difference_low", "difference_high"]
COLUMNS += ["p_holm"]


def gather(places: Sequence[Path]) -> list[Record]:
    """Every record of a compression or evaluation at or below the places, in order of path.

    Raises UserError for a place that does not exist and a record that cannot be read.
    """
    found: dict[tuple[str, str, str], Record] = {}
    for path in dict.fromkeys(path for place in places for path in _record_files(place)):
        record = records.read(path)
        if record["command"] not in ("benchmark", *BEGINNINGS):
            key = record["identity"], record["started"], str(record["seeds"])
            found.setdefault(key, record)  # a copy of a run, as in papers/results, is that run
    return list(found.values())


def _record_files(place: Path) -> list[Path]:
    if not place.exists():
        raise UserError(f"There is no {place}: name a folder of runs or a record.")
    if place.is_file():
        return [place]
    own = sorted(place.rglob(records.FILE))
    return own or sorted(place.rglob("*.json"))  # a folder of records, as papers/results is


def _finished(places: Sequence[Path]) -> Iterator[Done]:
    for place in places:
        for path in sorted(place.rglob(records.FILE)):
            record = records.read(path)
            if record["command"] not in BEGINNINGS:
                yield Done(path.parent, record)


def unfinished(places: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Every run that began and has no record, with what its journal says of it last."""
    for place in places:
        for path in sorted(place.rglob(journal.FILE)) if place.is_dir() else []:
            if not (path.parent / records.FILE).exists():
                yield path.parent, _last_word(path)


def _last_word(path: Path) -> str:
    """Why it failed; a journal that ends without a word of that is of a run that was stopped."""
    events = journal.read(path)
    if events and events[-1]["event"] == "failed":
        return f"failed: {events[-1].get('error', 'no reason was given')}"
    return "interrupted, or running still: its command goes on with it"


def as_csv(rows: Sequence[Row], metric: str) -> str:
    """In full precision; of perplexity, mean and interval are of the loss, in nats per token."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    name = "loss" if metric == PERPLEXITY else metric
    for row in rows:
        first, found, delta = row.experiment.records[0], row.found, row.difference
        own = [row.experiment.name, first["identity"], len(by_seeds(row.experiment.records))]
        own += [bits_per_weight(first), name, found.n, row.over, found.mean, found.low, found.high]
        apart = [delta.n, row.difference_over, delta.mean, delta.low, delta.high] if delta else []
        writer.writerow([*own, *(apart or ["", row.difference_over, "", "", ""]), row.p])
    return out.getvalue()


def table(rows: Sequence[Row], metric: str) -> Table:
    """For the terminal: as in a document, each number over its interval and what that is over."""

    def stacked(row: Sequence[str]) -> list[str]:
        return [*row[:3], "\n".join(row[3:6]), "\n".join(row[6:9]), row[9]]

    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption=FOOTNOTE, caption_justify="left")
    for i, name in enumerate(stacked(header(metric))):
        drawn.add_column(name, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        drawn.add_row(*map(Text, stacked(cells(row, metric))))
    return drawn


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("places", nargs="*", type=Path, metavar="FOLDER_OR_RECORD", default=[RUNS])
    parser.add_argument("--metric", default=PERPLEXITY, help=f"where in a record ({PERPLEXITY})")
    parser.add_argument("--reference", help="what a method's name holds (its float model)")
    parser.add_argument("--csv", type=Path, help="write the numbers there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--publish", type=Path, help="copy the records there: papers/results")
    return parser.parse_args()


@guarded
def main() -> None:
    wanted = arguments()
    found = experiments(gather(wanted.places))
    asked = [r for each in found for r in each.records if task_scores.tasks_of(r)]
    if wanted.metric != PERPLEXITY:  # which may be a task's
        asked = []
    lacking = [each for each in found if not measured(each, wanted.metric)]
    if len(lacking) < len(found) or asked:
        found = [each for each in found if each not in lacking]
    lacking = [each for each in lacking if each.records[0] not in asked]
    rows = compare(found, wanted.metric, wanted.reference)
    for path, text in (
        (wanted.csv, as_csv(rows, wanted.metric)),
        (wanted.markdown, _markdown(rows, asked, wanted.metric)),
    ):
        if path:
            _write(path, text)
    if wanted.publish:
        kept = publish(list(_finished(wanted.places)), wanted.publish)
        console.print(f"published {len(kept)} records in {wanted.publish}")
    if rows or not asked:
        console.print(table(rows, wanted.metric) if rows else "no finished runs")
    if asked:
        console.print(task_scores.table(asked))
    for each in lacking:
        console.print(Text(f"not in the table: {each.name}: no {wanted.metric}"), soft_wrap=True)
    for folder, reason in unfinished(wanted.places):
        console.print(Text(f"not in the table: {folder}: {reason}"), soft_wrap=True)


def _markdown(rows: Sequence[Row], asked: Sequence[Record], metric: str) -> str:
    """The table of the metric, then that of tasks, whichever there is."""
    own = [markdown(rows, metric)] if rows or not asked else []
    return "\n".join([*own, *([task_scores.markdown(asked)] if asked else [])])


def _write(path: Path, text: str) -> None:
    path = path.resolve()  # of a link, what it leads to is written, and the link stays
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file that a table could replace: name another.")
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {path.parent} to write {path.name} into: make it.")
    write_whole(path, text)


if __name__ == "__main__":
    main()
