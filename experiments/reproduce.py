"""Run what a paper's claims need, and say which of them hold:
python -m experiments.reproduce paper=gptq [scale=embedded] [publish=true]

Finished runs are given back, interrupted ones gone on with. A run that cannot be made leaves its
claims NOT RUN, with the reason, and the others go on.
"""

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich import box
from rich.table import Table
from rich.text import Text

from experiments import compress, evaluate, records, survey, train
from experiments.entry import entry_point, resolved
from experiments.errors import UserError
from experiments.papers import pages
from experiments.papers.claims import PERPLEXITY, Verdict, judge, runs_of
from experiments.papers.facts import Page, Published
from experiments.papers.lookup import NotRecorded, Run, beginning, compose, identity_of, run_at
from experiments.progress import console
from experiments.publication import key, publish
from experiments.report import Record, label, number
from experiments.runs.run import Run as Done
from experiments.training.report import LOSS

RESULTS = records.ROOT / survey.RESULTS


Runners = Mapping[str, Callable[[DictConfig], Done]]
RUNNERS: Runners = {"compress": compress.run, "evaluate": evaluate.run, "train": train.one}


class Reproduction:
    """A page's runs at a scale: each is made once, when it is first asked for."""

    def __init__(self, stem: str, scale: str, extra: Sequence[str], runners: Runners):
        self.pages = pages.read_pages()
        self.page: Page = pages.find(self.pages, stem)
        self.stem, self.scale = stem, scale
        self.beginning = beginning(stem, scale, self.pages)
        self.extra, self.runners = tuple(extra), runners
        self.done: dict[tuple[str, int | None], Done] = {}  # by identity and seed: claims name one
        self.failed: dict[tuple[str, int | None], str] = {}  # run in several ways
        self.crashed = False

    def find(self, run: Run) -> list[Record]:
        """The records of a run, made where they were not before; NotRecorded: what it needs."""
        whole = dataclasses.replace(run, overrides=(*run.overrides, *self.extra))
        try:
            identity = identity_of(whole)
        except UserError as error:
            raise NotRecorded(str(error).rstrip(".")) from error
        seeds = self.page.seeds if run.command == "train" else ()
        return [self._one(whole, identity, seed) for seed in seeds or (None,)]

    def _one(self, run: Run, identity: str, seed: int | None) -> Record:
        at = identity, seed
        if seed is not None:
            run = dataclasses.replace(run, overrides=(*run.overrides, f"seed={seed}"))
        if at not in self.done and at not in self.failed:
            console.print(Text(str(run), style="dim"), soft_wrap=True)
            self._make(run, at)
        if at in self.failed:
            raise NotRecorded(self.failed[at])
        return self.done[at].record

    def _make(self, run: Run, at: tuple[str, int | None]) -> None:
        try:
            self.done[at] = self.runners[run.command](compose(run))
        except UserError as error:
            self.failed[at] = str(error).rstrip(".")
        except Exception as error:  # a bug in one run is no reason to lose the others
            console.print(Text(traceback.format_exc()))
            self.failed[at] = f"a crash mended: {type(error).__name__}: {error}"
            self.crashed = True

    def verdicts(self) -> list[Verdict]:
        """Every claim of the page, judged."""
        everything = [
            (claim, runs_of(claim, self.scale, self.stem, self.pages)) for claim in self.page.claims
        ]
        return [judge(claim, self.scale, runs, self.find) for claim, runs in everything]

    def published(self) -> Iterator[list[str]]:
        """Each published number that this scale repeats: what, published, ours, gap."""
        experiments = [f"experiment={table.experiment}" for table in self.page.published]
        for table, experiment in zip(self.page.published, experiments, strict=True):
            if table.experiment and experiment in self.beginning:
                yield from self._rows(table)

    def _rows(self, table: Published) -> Iterator[list[str]]:
        what = f"{table.model}, {table.metric}"
        yield self._beside(f"{what}, float", table.dense, run_at(
            "float", self.scale, self.stem, self.pages))  # fmt: skip
        for row in table.rows:
            group = "null" if row.group_size is None else row.group_size
            settings = (f"algorithm.format.bits={row.bits}", f"algorithm.format.group_size={group}")
            run = run_at((*settings, *row.overrides), self.scale, self.stem, self.pages)
            groups = "per channel" if row.group_size is None else f"g{row.group_size}"
            yield self._beside(f"{what}, {row.bits} bit {groups}", row.value, run)

    def _beside(self, what: str, published: float, run: Run) -> list[str]:
        try:
            ours = number(self.find(run)[0], PERPLEXITY)
        except NotRecorded as error:
            return [what, f"{published:g}", f"NOT RUN (needs: {error})", "–"]
        return [what, f"{published:g}", f"{ours:.2f}", f"{ours - published:+.2f}"]

    def recorded(self, folder: Path) -> Iterator[list[str]]:
        """Each run that papers/results has too: what, recorded, reproduced, their difference."""
        known = {key(r): r for r in survey.load(folder).values()} if self.done else {}
        for done in self.done.values():
            before = known.get(key(done.record))
            if before is not None:
                metric = LOSS if done.record["command"] == "train" else PERPLEXITY
                then, now = number(before, metric), number(done.record, metric)
                yield [label(before), f"{then:.4f}", f"{now:.4f}", f"{now - then:+.2g}"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For the terminal: nothing is cut off."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in header:
        drawn.add_column(name, overflow="fold", no_wrap=name == "status")
    for row in rows:
        drawn.add_row(*map(Text, row))
    return drawn


def _told(verdict: Verdict) -> Iterator[str]:
    """A claim in a few lines: what it says, what speaks for or against it, what was expected."""
    yield f"{verdict.claim.id}: {verdict.claim.sentence}"
    yield f"needs: {verdict.evidence}" if verdict.status == "NOT RUN" else verdict.evidence
    if verdict.beside:
        yield verdict.beside


def run(config: DictConfig, runners: Runners = RUNNERS, results: Path = RESULTS) -> list[Verdict]:
    """Make the runs, print what came out, publish if asked; SystemExit 1 if a run crashed."""
    plain = resolved(config)
    mine = Reproduction(plain["paper"], plain["scale"], plain["overrides"], runners)
    verdicts, published = mine.verdicts(), list(mine.published())
    shown = [[verdict.status, "\n".join(_told(verdict))] for verdict in verdicts]
    console.rule(f"{mine.page.name} at the scale {mine.scale}")
    console.print(table(["status", "claim"], shown))
    if published:
        console.print(table(["published", "theirs", "ours", "gap"], published))
    if recorded := list(mine.recorded(results)):
        console.print(table(["run", "recorded", "reproduced", "difference"], recorded))
    if plain["publish"]:
        for path in publish(list(mine.done.values()), results):
            console.print(f"published {path}", soft_wrap=True)
    if mine.crashed:
        raise SystemExit(1)
    return verdicts


@entry_point("reproduce")
def main(config: DictConfig) -> None:
    run(config)


if __name__ == "__main__":
    main()
