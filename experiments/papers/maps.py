"""The survey's maps: what there is, since when, how good; from pages' facts and records."""

import math
from collections.abc import Mapping, Sequence

from experiments.comparison import compare, experiments, markdown
from experiments.papers.claims import TRAINED, Verdict
from experiments.papers.facts import Page
from experiments.papers.peers import Peer, size
from experiments.report import Record, bits_per_weight, grid, label, paired_difference

Pages = Mapping[str, Page]


def taxonomy(pages: Pages) -> str:
    """What each method is and asks for, by family, oldest first."""
    rows = [
        [
            page.family,
            page.name,
            page.needs,
            page.bits or "–",
            f"[{stem}.md]({stem}.md)",
            f"[{page.code.rsplit('/', 1)[-1]}](../{page.code})",
        ]
        for stem, page in sorted(pages.items(), key=lambda item: (item[1].family, *_age(item)))
    ]
    return _text([["family", "method", "needs", "bits", "page", "code"], *rows])


def timeline(pages: Pages) -> str:
    """The papers by year."""
    rows = [
        [str(page.citation.year), f"[{page.name}]({stem}.md)", _paper(page), page.citation.venue]
        for stem, page in sorted(pages.items(), key=_age)
    ]
    return _text([["year", "method", "paper", "venue"], *rows])


def comparison(records: Sequence[Record]) -> str:
    """Every compression against the float model, dearest first, seeds together."""
    rows = compare(experiments(records))
    floats = [row for row in rows if label(row.experiment.records[0]) == "float"]
    others = [row for row in rows if row not in floats]
    others.sort(key=lambda row: row.found.mean)
    return markdown([*floats, *others])


def peers(records: Sequence[Record], found: Sequence[Peer]) -> str:
    """For every size that another tool reaches, its best and ours. records: the float one first."""
    reference, *runs = records
    rows = [["weights", "activations", "here", "bits", "Δ loss", "elsewhere", "bits", "Δ loss"]]
    sizes = {peer.size for peer in found}
    for wanted in sorted(sizes, key=lambda s: (s.zeros or "", -s.bits, -(s.activations or 99))):
        theirs = min((p for p in found if p.size == wanted), key=lambda p: p.above(reference))
        error = "" if theirs.standard_error is None else f" ± {theirs.standard_error:.3f}"
        rows.append(
            [
                f"{wanted.bits}.x bits" if wanted.zeros is None else f"{wanted.zeros} zeros",
                "float" if wanted.activations is None else f"{wanted.activations} bits",
                *_best([run for run in runs if size(run) == wanted], reference),
                f"{theirs.method}, {theirs.tool}",
                "–" if wanted.zeros else f"{theirs.bits:.2f}",
                f"{theirs.above(reference):+.3f}{error}",
            ]
        )
    return f"{grid(rows)}\n\n{PEERS_NOTE}\n"


PEERS_NOTE = (
    "Best by loss; Δ loss: to the float model that the tool itself evaluates, paired by window, "
    "nats per token, ± standard error. Ours is over 40 held-out windows and calibrated on 32; each "
    "tool's own number of windows is in [peers.yaml](peers.yaml)."
)


def _best(runs: Sequence[Record], reference: Record) -> list[str]:
    """Name, bits and distance to the float model of the run with the lowest loss."""
    if not runs:
        return ["–"] * 3
    best = min(runs, key=lambda run: run["metrics"]["perplexity"]["loss"])
    mean, error = paired_difference(best, reference) or (math.nan, math.nan)
    return [label(best), f"{bits_per_weight(best):.2f}", f"{mean:+.3f} ± {error:.3f}"]


def published(stems: Sequence[str], pages: Pages) -> str:
    """What sources report, a column per method, with the protocol of each below the table."""
    names = [pages[stem].name for stem in stems]
    found: dict[tuple[str, ...], dict[str, str]] = {}
    protocols: dict[str, list[str]] = {}
    for stem, name in zip(stems, names, strict=True):
        for table in pages[stem].published:
            protocol = f"{name}: {table.protocol} ({table.source})"
            protocols.setdefault(protocol, []).append(table.model)
            for row in table.rows:
                group = "one per row" if row.group_size is None else str(row.group_size)
                key = (table.model, table.metric, str(row.bits), group, f"{table.dense:.2f}")
                found.setdefault(key, {})[name] = f"{row.value:.2f}"
    models = [key[0] for key in found]
    rows = [
        [*key, *(found[key].get(name, "–") for name in names)]
        for key in sorted(found, key=lambda key: models.index(key[0]))
    ]
    header = ["model", "metric", "bits", "group", "float", *names]
    notes = [f"- {', '.join(models)}, {protocol}" for protocol, models in protocols.items()]
    return grid([header, *rows], text_columns=2) + "\n\n" + "\n".join(notes) + "\n"


def reported(page: Page) -> str:
    """What sources report of a training method, as they word it, a table for all."""
    rows = [
        [table.what, name, f"{value:g}", table.source]
        for table in page.reported
        for name, value in table.values.items()
    ]
    return grid([["what", "method", "value", "source"], *rows], text_columns=2) + "\n"


def claims(verdicts: Sequence[Verdict]) -> str:
    """Each claim of a page, whether it holds, and by what."""
    rows = [
        [
            f"{verdict.claim.sentence} `{verdict.claim.id}`",
            str(verdict),
            "–" if verdict.status == "NOT RUN" else verdict.evidence,
            verdict.claim.reading or "–",
        ]
        for verdict in verdicts
    ]
    trained = any(verdict.claim.check.metric.startswith(TRAINED) for verdict in verdicts)
    note = TRAINED_NOTE if trained else CLAIMS_NOTE
    return _text([["claim", "here", "statistics", "as we read it"], *rows]) + f"\n{note}\n"


CLAIMS_NOTE = (
    "HOLDS where the 95 % interval of the ratio, paired by held-out window, lies below its bound, "
    "DOES NOT HOLD where it lies above, INCONCLUSIVE where it contains the bound; p: of a "
    "ratio equal to the bound, two-sided."
)
TRAINED_NOTE = (
    "HOLDS where the 95 % interval of the difference, paired by seed, lies below 0, DOES NOT HOLD "
    "where it lies above, INCONCLUSIVE where it contains 0; p: of no difference, two-sided."
)


def _text(rows: list[list[str]]) -> str:
    return grid(rows, text_columns=len(rows[0])) + "\n"


def _age(item: tuple[str, Page]) -> tuple[int, str]:
    return item[1].citation.year, item[0]


def _paper(page: Page) -> str:
    first = page.citation.authors[0].split()[-1]
    who = first if len(page.citation.authors) == 1 else f"{first} et al."
    if not page.citation.arxiv:
        return f"{who}, {page.citation.title}"
    return f"{who}, [{page.citation.title}](https://arxiv.org/abs/{page.citation.arxiv})"
