"""The pages of papers/: their facts, read from the YAML that they open with, and validated."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from experiments import records
from experiments.configuration import did_you_mean
from experiments.errors import UserError
from experiments.papers.facts import Page, strict

PAPERS = records.ROOT / "papers"
FRONT = re.compile(r"\A---\n(.*?)^---$", re.DOTALL | re.MULTILINE)
EMBEDDED = "embedded"  # the scale that every page has: the model and text that anyone can run


class _UniqueKeys(yaml.SafeLoader):
    """YAML without code, in which a key that comes twice is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        for key, times in Counter(str(key.value) for key, _ in node.value).items():
            if times > 1:
                raise yaml.YAMLError(f"the key {key!r} comes {times} times{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_pages(folder: Path = PAPERS) -> dict[str, Page]:
    """Every page by its file's name; raises UserError for the first one that is not valid."""
    paths = [path for path in sorted(folder.glob("*.md")) if path.stem != "README"]
    pages = {path.stem: read_page(path) for path in paths}
    if found := list(problems(pages)):
        raise UserError(found[0])
    return pages


def read_page(path: Path) -> Page:
    """The facts of one page, of the right shape; `problems` says whether they are true."""
    where = f"papers/{path.name}"
    front = FRONT.match(path.read_text(encoding="utf-8"))
    if not front:
        raise UserError(f"{where} should open with its facts, as YAML between lines of '---'.")
    try:
        facts = yaml.load(front[1], _UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}.") from error
    return strict(Page, facts, where)


def problems(pages: Mapping[str, Page], root: Path = records.ROOT) -> Iterator[str]:
    """What facts of the right shape may still have wrong, one sentence each."""
    claims = [(stem, claim) for stem, page in pages.items() for claim in page.claims]
    for id, times in Counter(claim.id for _, claim in claims).items():
        if times > 1:
            yield f"papers/: the claim id {id!r} comes {times} times: it names one claim."
    for stem, page in pages.items():
        for key in ("code", "config", "tests"):
            if not (root / getattr(page, key)).exists():
                yield f"papers/{stem}.md: {key}: there is no {getattr(page, key)}."
        if EMBEDDED not in page.scales:
            yield f"papers/{stem}.md: scales lacks {EMBEDDED!r}: the runs that anyone can repeat."
        for table in page.published:
            if table.experiment and "perplexity" not in table.metric:
                yield (
                    f"papers/{stem}.md: published: {table.experiment} measures perplexity, not "
                    f"{table.metric}: leave the experiment out."
                )
    for stem, claim in claims:
        where = f"papers/{stem}.md: claim {claim.id}"
        for scale in claim.expected.keys() - pages[stem].scales.keys():
            yield f"{where}: expected: no scale {scale!r}{did_you_mean(scale, pages[stem].scales)}"
        if bool(claim.expected) != (claim.reason is not None):
            yield f"{where}: expected and reason belong together."


def find(pages: Mapping[str, Page], stem: str) -> Page:
    """A page by name; raises UserError, with the nearest one, if there is none."""
    if stem not in pages:
        raise UserError(f"There is no page papers/{stem}.md{did_you_mean(stem, pages)}")
    return pages[stem]
