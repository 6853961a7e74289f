"""What a search found beside the best of all that it did not find, at the same bytes, from records:
whether the search was worth what it took.
"""

import math
from collections.abc import Sequence

import numpy as np

from experiments.equal_cost import BYTES, costs, is_searched
from experiments.report import Record, grid, labels, loss_differences
from experiments.statistics import estimate, holm

MORE = 0.01  # of its own bytes: what others may have beyond them


def table(records: Sequence[Record]) -> list[list[str]]:
    """A row for each searched run, smallest first. records: all with their size on record, the
    model as it is first; runs of one seed each.
    """
    head = ["searched", "bytes", "perplexity", "best of all others", "bytes", "perplexity",
            "Δ loss", "95 % interval", "p", "search s", "compress s"]  # fmt: skip
    sized = [record for record in records[1:] if record.get("footprint")]
    parts = [each[BYTES] or math.inf for each in costs(sized)]
    named = list(zip(sized, labels(sized), parts, strict=True))
    pairs = []
    for mine in sorted((n for n in named if is_searched(n[0])), key=lambda n: n[2]):
        others = [n for n in named if not is_searched(n[0]) and n[2] <= mine[2] * (1 + MORE)]
        if others:
            best = min(others, key=lambda n: n[0]["metrics"]["perplexity"]["loss"])
            pairs.append((mine, best))
    found = [estimate(_difference(mine[0], best[0])) for mine, best in pairs]
    rows = [
        [
            mine[1], f"{100 * mine[2]:.1f} %", _perplexity(mine[0]),
            best[1], f"{100 * best[2]:.1f} %", _perplexity(best[0]),
            f"{each.mean:+.3f}", f"{each.low:+.3f} to {each.high:+.3f}", f"{p:.1g}",
            _seconds((mine[0].get("search") or {}).get("seconds")),
            _seconds(mine[0]["seconds"].get("compress")),
        ]
        for (mine, best), each, p in zip(pairs, found, holm([e.p for e in found]), strict=True)
    ]  # fmt: skip
    return [head, *rows]


def _difference(record: Record, other: Record) -> np.ndarray:
    found = loss_differences(record, other)
    assert found is not None, "records of other windows"
    return found


def _perplexity(record: Record) -> str:
    return f"{record['metrics']['perplexity']['value']:.2f}"


def _seconds(found: float | None) -> str:
    return "–" if found is None else f"{found:.0f}"


NOTE = (
    "Best of all others: the lowest perplexity of every recorded run that no search chose, of at "
    f"most {100 * MORE:g} % more bytes; bytes: of all tensors, as part of the model in 16 bits; "
    "Δ loss: to it, nats per token, paired by held-out window; p: of no difference, adjusted for "
    "all rows; search s: to fill the table of what each option costs and to choose."
)


def markdown(records: Sequence[Record]) -> str:
    """The table with its note, or that there is none yet."""
    rows = table(records)
    if len(rows) == 1:
        return "No search has been recorded yet.\n"
    return f"{grid(rows)}\n\n{NOTE}\n"
