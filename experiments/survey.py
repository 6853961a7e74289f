"""Render the documents' tables and pictures from recorded runs:
python -m experiments.survey [--check]

A document names what it shows between markers, and the text between them is replaced:

    <!-- results:begin recipe=gptq -->  …  <!-- results:end -->

    recipe=NAME       runs of the embedded model that use the step of that name, the float one first
    runs="A; B"       runs by name, in order: overrides of conf/compress.yaml, or "float" and those
                      of conf/evaluate.yaml; what they were asked, where that is tasks
    trained="A; B"    training runs by name ("train", then overrides of conf/train.yaml), the seeds
                      of each together, beside the first
    claims=PAGE       the claims of a page and whether they hold [scale=embedded]
    published=A,B     what sources report of the methods of these pages, side by side
    reported=PAGE     what sources report of a training method
    map=WHAT          taxonomy or timeline of all pages; comparison of all runs, also at equal
                      costs; what was searched beside what was not; or the peers
    benchmark=NAME    the benchmark of that name
    race=NAME         the race of optimizers in the benchmark of that name
    kernels=NAME      what `python -m kernels.bench` recorded of an operation, or of all

With --check nothing is written, and it fails where a document or a picture is not what the records
say, a page's facts are not valid or the bibliography is incomplete.
"""

import argparse
import functools
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from experiments import (
    benchmark_report,
    equal_cost,
    kernel_report,
    plots,
    records,
    searched,
    task_scores,
)
from experiments.configuration import did_you_mean
from experiments.entry import guarded
from experiments.errors import UserError
from experiments.files import write_whole
from experiments.measurements import spectra
from experiments.papers import bibliography, maps, pages
from experiments.papers.claims import judge_page
from experiments.papers.facts import Page
from experiments.papers.lookup import Find, NotRecorded, finder, float_model, parse
from experiments.papers.peers import read_peers, size
from experiments.progress import console
from experiments.recipes import steps
from experiments.report import (
    Record,
    bits_per_weight,
    grid,
    loss_differences,
    markdown,
)
from experiments.step_labels import origin
from experiments.training import race, recovery
from experiments.training import report as training_report

RESULTS = Path("papers", "results")
FIGURES = Path("papers", "figures")
KERNELS = Path("kernels")
PICTURED = ["float", "algorithm=rtn", "algorithm=rtn algorithm.format.bits=3"]
PICTURED += ["algorithm=gptq", "algorithm=gptq algorithm.format.bits=3"]
MARKED = re.compile(
    r"(<!-- results:begin(?P<options>[^>]*) -->\n).*?(<!-- results:end -->)", re.DOTALL
)


class Picture(NamedTuple):
    path: Path
    draw: Callable[[Path], Path]
    digest: str  # of what it is drawn from


class Survey:
    """All that a repository's documents are rendered from: records and the pages' facts."""

    def __init__(self, root: Path = records.ROOT):
        self.root = root
        self.records = load(root / RESULTS)
        self.pages: dict[str, Page] = pages.read_pages(root / "papers")
        self.peers = read_peers(root / "papers")
        self.find: Find = finder(self.records.values())
        self.devices = kernel_report.read(root / KERNELS / "results")

    def documents(self) -> list[Path]:
        """Every Markdown file that may hold markers."""
        pages = sorted((self.root / "papers").glob("*.md"))
        rooms = [self.root / room / "README.md" for room in (".", "algorithms", KERNELS)]
        return [*rooms, *pages]

    def embedded(self) -> list[Record]:
        """The float model, and all compressions of it on the same windows."""
        reference = float_model(self.records.values())[0]
        mine = [
            record
            for record in self.records.values()
            if record["command"] == "compress"
            and record["model"]["digest"] == reference["model"]["digest"]
            and loss_differences(record, reference) is not None
        ]
        return [reference, *sorted(mine, key=_order)]

    def sized(self) -> list[Record]:
        """The float model, and all that was made of it whose size is on record: compressed,
        trained afterwards, and compressed again.
        """
        reference, *compressed = self.embedded()
        further = [
            record
            for record in self.records.values()
            if (record["command"] == "train" or origin(record["config"]))
            and record.get("footprint")
            and loss_differences(record, reference) is not None
        ]
        found = [*compressed, *sorted(further, key=_order)]
        return [reference, *(run for run in found if size(run).activations is None)]

    def render(self, text: str, where: str) -> str:
        """The document with its tables as records and facts have them."""

        def table(match: re.Match[str]) -> str:
            wanted = _options(match["options"], where)
            kind = next((key for key in wanted if key in KINDS), None)
            if kind is None:
                raise UserError(f"{where} has a results marker without {'=, '.join(KINDS)}=.")
            return f"{match[1]}{KINDS[kind](self, wanted, where)}{match[3]}"

        return MARKED.sub(table, text)

    def stale(self) -> Iterator[tuple[Path, str]]:
        """Each document that is not what it should be, with what it should be."""
        for path in self.documents():
            text = path.read_text(encoding="utf-8")
            fresh = self.render(text, path.name)
            if fresh != text:
                yield path, fresh
        measured = self.root / KERNELS / "measured.py"
        fresh = kernel_report.measured_source(measured.read_text(), self.devices)
        if fresh != measured.read_text():
            yield measured, fresh

    def pictures(self) -> Iterator[Picture]:
        """Everything drawn from the records."""
        few, figures = [self.find(parse(name))[0] for name in PICTURED], self.root / FIGURES
        yield Picture(
            figures / "perplexity_against_size.png",
            functools.partial(plots.perplexity_against_size, few),
            plots.records_digest(few),
        )
        yield self._front(figures / "pareto.png", activations=False)
        yield self._front(figures / "pareto_activations.png", activations=True)
        sized = self.sized()
        draw = functools.partial(equal_cost.picture, sized)
        yield Picture(figures / "equal_cost.png", draw, equal_cost.digest(sized))
        if curves := recovery.curves(self.records.values(), sized[0], self.find):
            draw = functools.partial(recovery.picture, curves, sized[0])
            yield Picture(figures / "recovery.png", draw, recovery.digest(curves, sized[0]))
        for name, record in self.records.items():
            if rows := record.get("results", {}).get("optimizers"):
                path = figures / f"{name.removeprefix('benchmark-')}.png"
                yield Picture(path, functools.partial(race.picture, rows), race.digest(rows))
            if found := record.get("results", {}).get("spectrum"):
                path, rows = figures / f"{name.removeprefix('benchmark-')}.png", found["rows"]
                yield Picture(path, functools.partial(spectra.picture, rows), spectra.digest(rows))
        for found in kernel_report.pictures(self.devices, self.root / KERNELS / "figures"):
            yield Picture(*found)

    def _front(self, path: Path, activations: bool) -> Picture:
        """All that quantize weights alone, or all that round activations too."""
        reference, *runs = self.embedded()
        shown = [
            run for run in runs
            if (size(run).activations is not None) == activations and not run["config"].get("cache")
            and equal_cost.QUANTIZED in equal_cost.kind(run)
        ]  # fmt: skip
        value = reference["metrics"]["perplexity"]["value"]
        peers = [
            (peer.bits, value * math.exp(peer.above(reference)))
            for peer in self.peers
            if (peer.activations is not None) == activations and peer.zeros is None
        ]
        found = [reference, *shown]
        draw = functools.partial(plots.pareto, found, peers=peers)
        return Picture(path, draw, plots.records_digest(found, peers))

    def problems(self) -> Iterator[str]:
        """Everything that --check fails for, one sentence each."""
        entries = bibliography.read(self.root / "papers" / "references.bib")
        yield from bibliography.problems(entries, self.pages)
        for path, _ in self.stale():
            yield f"{path.relative_to(self.root)} is stale: run python -m experiments.survey."
        for path, _, digest in self.pictures():
            name = path.relative_to(self.root)
            if not path.exists():
                yield f"{name} is missing: run python -m experiments.survey."
            elif plots.drawn_from(path) != digest:
                yield f"{name} was drawn from other records: run python -m experiments.survey."


def load(folder: Path) -> dict[str, Record]:
    """The recorded runs that documents quote, by file name."""
    return {path.stem: records.read(path) for path in sorted(folder.rglob("*.json"))}


def _options(text: str, where: str) -> dict[str, str]:
    try:
        return dict(option.split("=", 1) for option in shlex.split(text))
    except ValueError as error:
        raise UserError(f"{where} has a results marker with{text}: expected key=value.") from error


def _order(record: Record) -> tuple[float, float]:
    return -(bits_per_weight(record) or 0.0), -record["metrics"]["perplexity"]["loss"]


def _recipe(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    name = wanted["recipe"]
    reference, *runs = survey.embedded()
    chosen = [r for r in runs if _belongs(r, name)]
    if not chosen and name in survey.pages:
        return "No run of it has been recorded yet.\n"
    if not chosen:
        raise UserError(f"{where} asks for recipe={wanted['recipe']}, not in papers/results.")
    return markdown([reference, *chosen])


def _belongs(record: Record, name: str) -> bool:
    """Whether a run is of a step, or of an algorithm with nothing but activations around it."""
    found = [step.get("_target_", "rule").rsplit(".", 1)[-1] for step in steps(record["config"])]
    around = [step for step in found if step != "quantized_inputs"]
    node = record["config"].get("algorithm") or {"_target_": "none"}
    algorithm = node["_target_"].rsplit(".", 1)[-1]
    return around == [name] if name == algorithm else name in around


def _runs(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    found = []
    for name in wanted["runs"].split(";"):
        try:
            found.append(survey.find(parse(name))[0])
        except UserError as error:
            raise UserError(f"{where} asks for {name.strip()!r}, and needs {error}.") from error
    return task_scores.markdown(found) if any(map(task_scores.tasks_of, found)) else markdown(found)


def _trained(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    """What was recorded beside the first, and the commands of what has yet to run."""
    found, missing = list[list[Record]](), list[str]()
    for name in wanted["trained"].split(";"):
        run = parse(name)
        try:
            found.append(survey.find(run))
        except NotRecorded as error:
            missing.append(f"- {error}\n")
        except UserError as error:
            raise UserError(f"{where} asks for {name.strip()!r}: {error}") from error
    table = training_report.markdown(sum(found, [])) if found else ""
    waiting = "Not run yet:\n\n" + "".join(missing) if missing else ""
    return "\n".join(filter(None, [table, waiting]))


def _claims(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    stem, scale = wanted["claims"], wanted.get("scale", pages.EMBEDDED)
    pages.find(survey.pages, stem)
    try:
        return maps.claims(judge_page(stem, scale, survey.pages, survey.find))
    except UserError as error:
        raise UserError(f"papers/{stem}.md has a claim of what {error}.") from error


def _published(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    stems = wanted["published"].split(",")
    if missing := [stem for stem in stems if not pages.find(survey.pages, stem).published]:
        raise UserError(f"{where} asks for published={missing[0]}, and that page has none.")
    return maps.published(stems, survey.pages)


def _reported(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    page = pages.find(survey.pages, wanted["reported"])
    if not page.reported:
        raise UserError(f"{where} asks for reported={wanted['reported']}, and it has none.")
    return maps.reported(page)


def _map(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    what = wanted["map"]
    if what == "comparison":
        return maps.comparison(survey.embedded())
    if what == "costs":
        return equal_cost.markdown(survey.sized())
    if what == "searched":
        return searched.markdown(survey.sized())
    if what == "peers":
        return maps.peers(survey.embedded(), survey.peers)
    drawn = {"taxonomy": maps.taxonomy, "timeline": maps.timeline}
    if what not in drawn:
        known = [*drawn, "comparison", "peers", "costs", "searched"]
        raise UserError(f"{where} asks for map={what}{did_you_mean(what, known)}")
    return drawn[what](survey.pages)


def _benchmark(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    what = wanted["benchmark"]
    if f"benchmark-{what}" not in survey.records:
        raise UserError(f"{where} asks for benchmark={what}, not in papers/results.")
    return benchmark_report.markdown(survey.records[f"benchmark-{what}"], what)


def _race(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    return f"{grid(race.table(_raced(survey, wanted['race'], where)))}\n"


def _raced(survey: Survey, what: str, where: str) -> list[race.Row]:
    if f"benchmark-{what}" not in survey.records:
        raise UserError(f"{where} asks for race={what}, not in papers/results.")
    return survey.records[f"benchmark-{what}"]["results"]["optimizers"]


def _kernels(survey: Survey, wanted: Mapping[str, str], where: str) -> str:
    if wanted["kernels"] == "all":
        found = kernel_report.summary(survey.devices)
        return f"{kernel_report.rates(survey.devices)}\n{grid(found)}\n"
    return f"{grid(kernel_report.table(wanted['kernels'], survey.devices))}\n"


KINDS: dict[str, Callable[[Survey, Mapping[str, str], str], str]] = {
    "recipe": _recipe,
    "runs": _runs,
    "trained": _trained,
    "claims": _claims,
    "published": _published,
    "reported": _reported,
    "map": _map,
    "benchmark": _benchmark,
    "race": _race,
    "kernels": _kernels,
}


@guarded
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail if anything is not as it should")
    check, survey = parser.parse_args().check, Survey()
    written = []
    if not check:
        for path, fresh in survey.stale():
            written.append(write_whole(path, fresh).name)
        for path, draw, digest in survey.pictures():
            if not path.exists() or plots.drawn_from(path) != digest:
                path.parent.mkdir(exist_ok=True)
                written.append(draw(path).name)
    if problems := list(survey.problems()):
        raise UserError(" ".join(problems))
    console.print(f"rendered {', '.join(written)}" if written else "up to date")


if __name__ == "__main__":
    main()
