"""references.bib: read, and checked for completeness against the pages that cite it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from experiments.errors import UserError
from experiments.papers.facts import Page

VENUES = ("journal", "booktitle", "howpublished", "publisher", "school", "institution", "eprint")
ENTRY = re.compile(r"@(?P<kind>\w+)\s*\{\s*(?P<key>[^\s,{}]+)\s*,")
FIELD = re.compile(r"(?P<name>\w+)\s*=\s*")


class Entry(NamedTuple):
    kind: str  # article, inproceedings, …
    fields: dict[str, str]  # by name in small letters, without outer braces


def read(path: Path) -> dict[str, Entry]:
    """Every entry by its key; raises UserError if one cannot be read or a key comes twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read as a bibliography: {error}.") from error
    found: dict[str, Entry] = {}
    for at in re.finditer(r"^\s*@", text, re.MULTILINE):
        match = ENTRY.match(text, at.end() - 1)
        if not match:
            line = text[: at.end()].count("\n") + 1
            raise UserError(f"{path.name}, line {line}: expected @kind{{key, fields}}.")
        if match["key"] in found:
            raise UserError(f"{path.name} has {match['key']!r} twice: keep one.")
        where = f"{path.name}: {match['key']}"
        found[match["key"]] = Entry(match["kind"], dict(_fields(text, match.end(), where)))
    return found


def _fields(text: str, at: int, where: str) -> Iterator[tuple[str, str]]:
    """From behind an entry's key to its closing brace."""
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\n,"))
        if text.startswith("}", at):
            return
        match = FIELD.match(text, at)
        if not match:
            raise UserError(f"{where}: expected name = {{value}} and found {text[at : at + 20]!r}.")
        value, at = _value(text, match.end(), where)
        yield match["name"].lower(), " ".join(value.split())


def _value(text: str, at: int, where: str) -> tuple[str, int]:
    """A field's value, in balanced braces, in quotes or bare, and where it ends."""
    if not text.startswith(("{", '"'), at):
        bare = re.compile(r"\w*").match(text, at)
        assert bare is not None
        return bare[0], bare.end()
    depth, quoted = 0, text[at] == '"'
    for end in range(at + 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if (quoted and text[end] == '"' and depth == 0) or (not quoted and depth < 0):
            return text[at + 1 : end], end + 1
    raise UserError(f"{where}: a value that begins with {text[at : at + 20]!r} never ends.")


def problems(entries: Mapping[str, Entry], pages: Mapping[str, Page]) -> list[str]:
    """What is incomplete, one sentence each: nothing where all is well."""
    cited = {key: stem for stem, page in pages.items() for key in sorted(page.cited)}
    found = [
        f"papers/{stem}.md cites {key!r}, which references.bib lacks."
        for key, stem in cited.items()
        if key not in entries
    ]
    found += [
        f"references.bib has {key!r}, which no page cites." for key in entries if key not in cited
    ]
    for key, entry in entries.items():
        found += [
            f"references.bib: {key} has no {field}."
            for field in ("author", "title", "year")
            if not entry.fields.get(field)
        ]
        if not any(entry.fields.get(venue) for venue in VENUES):
            found.append(f"references.bib: {key} has no journal, booktitle or eprint.")
    for stem, page in pages.items():
        if page.citation.key in entries:
            found += _disagreements(stem, page, entries[page.citation.key])
    return found


def _disagreements(stem: str, page: Page, entry: Entry) -> Iterator[str]:
    """What a page says of its own paper is what the bibliography says."""
    pairs = [("title", page.citation.title), ("year", str(page.citation.year))]
    pairs += [("eprint", page.citation.arxiv)] if page.citation.arxiv else []
    for field, stated in pairs:
        listed = re.sub(r"[{}]|\\(?=#)", "", entry.fields.get(field, ""))
        if listed != stated:
            yield (
                f"papers/{stem}.md: citation: the {field} is {stated!r}, and {listed!r} in "
                f"references.bib under {page.citation.key}."
            )
