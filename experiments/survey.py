"""Render the documents' tables and picture from recorded runs:
python -m experiments.survey [--check]

A document names what it shows between markers, and the text between them is replaced:

    <!-- results:begin recipe=gptq -->  …  <!-- results:end -->

`recipe` takes the records whose last step has that name, the float model first; `runs` takes
records by name, in order; `benchmark` takes the benchmark of that name. With --check nothing is
written, and a stale document fails.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import records
from experiments.entry import guarded
from experiments.errors import UserError
from experiments.plots import perplexity_against_size
from experiments.report import Record, bits_per_weight, label, markdown, speed_markdown

RESULTS = records.ROOT / "papers" / "results"
PICTURE = records.ROOT / "papers" / "figures" / "perplexity_against_size.png"
PICTURED = ("float", "rtn-w4-g64", "rtn-w3-g64", "gptq-w4-g64", "gptq-w3-g64")
MARKED = re.compile(
    r"(<!-- results:begin(?P<options>[^>]*) -->\n).*?(<!-- results:end -->)", re.DOTALL
)


def documents() -> list[Path]:
    """Every Markdown file that may hold markers."""
    return [records.ROOT / "README.md", *sorted((records.ROOT / "papers").glob("*.md"))]


def load(folder: Path = RESULTS) -> dict[str, Record]:
    """The recorded runs that documents quote, by file name."""
    return {path.stem: records.read(path) for path in sorted(folder.glob("*.json"))}


def render(text: str, found: dict[str, Record], where: str) -> str:
    """The document with its tables as the records have them."""

    def table(match: re.Match[str]) -> str:
        wanted = dict(option.split("=", 1) for option in match["options"].split())
        if "benchmark" in wanted:
            what = wanted["benchmark"]
            shown = speed_markdown(found[f"benchmark-{what}"], what)
        else:
            shown = markdown(select(wanted, found, where))
        return f"{match[1]}{shown}{match[3]}"

    return MARKED.sub(table, text)


def select(wanted: dict[str, str], found: dict[str, Record], where: str) -> Sequence[Record]:
    """The records that a marker asks for; raises UserError if it names none or unknown ones."""
    if "runs" in wanted:
        names = wanted["runs"].split(",")
        if missing := [name for name in names if name not in found]:
            raise UserError(f"{where} asks for runs={','.join(missing)}, not in papers/results.")
        return [found[name] for name in names]
    if "recipe" not in wanted:
        raise UserError(f"{where} has a results marker without recipe= or runs=.")
    name = wanted["recipe"].upper()
    runs = [r for r in found.values() if r["command"] != "benchmark"]
    chosen = [r for r in runs if label(r).split(" + ")[-1].split()[0] == name]
    if not chosen:
        raise UserError(f"{where} asks for recipe={wanted['recipe']}, not in papers/results.")
    return [found["float"], *sorted(chosen, key=_order)]


def _order(record: Record) -> tuple[float, float]:
    return -(bits_per_weight(record) or 0.0), -record["metrics"]["perplexity"]["loss"]


@guarded
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fail if a document is stale")
    check = parser.parse_args().check
    found, stale = load(), []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        fresh = render(text, found, path.name)
        if fresh != text:
            stale.append(path.name)
            if not check:
                path.write_text(fresh, encoding="utf-8")
    if not check:
        perplexity_against_size([found[name] for name in PICTURED], PICTURE)
    if check and stale:
        raise UserError(f"{', '.join(stale)} is stale: run python -m experiments.survey.")
    print("up to date" if not stale else f"rendered {', '.join(stale)}", file=sys.stderr)


if __name__ == "__main__":
    main()
