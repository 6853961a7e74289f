"""Plain text out of a MediaWiki dump (pages-articles, bzip2), by rules and nothing learned.

Kept: articles (namespace 0, no redirects), each as its title, its paragraphs, headings and list
items, with the labels of links. Dropped, with all they hold: comments, templates, tables,
references, mathematics, galleries, code, files and categories, bare addresses, markup, and the
sections in which an article lists its sources (SOURCES). The same dump gives the same text.
"""

import bz2
import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.errors import UserError

SOURCES = (
    "see also|references|external links|further reading|notes|footnotes|bibliography|sources|"
    "citations|notes and references|references and notes|works cited"
)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_EMPTY_TAG = re.compile(r"<(?:ref|references|gallery)\b[^<>]*/>", re.I)
_DROPPED_TAG = re.compile(
    r"<(ref|math|chem|gallery|timeline|score|imagemap|hiero|syntaxhighlight|source|pre|code|"
    r"references|table)\b[^<>]*>.*?</\1\s*>",
    re.S | re.I,
)
_BREAK = re.compile(r"<br\b[^<>]*>", re.I)
_TAG = re.compile(r"</?[a-z][^<>]*>", re.I)
_DROPPED_LINK = re.compile(r"\[\[\s*(?:file|image|media|category)\s*:", re.I)
_LABELLED_ADDRESS = re.compile(r"\[(?:https?:|ftp:|mailto:|//)[^\s\]]*\s*([^\]]*)\]", re.I)
_ADDRESS = re.compile(r"\b(?:https?|ftp)://\S+", re.I)
_HEADING = re.compile(r"^(={2,6})[ \t]*(.*?)[ \t]*\1[ \t]*$", re.M)
_SOURCE_HEADING = re.compile(rf"^==[ \t]*(?:{SOURCES})[ \t]*==[ \t]*$", re.I | re.M)
_NEXT_SECTION = re.compile(r"^==[^=]", re.M)
_QUOTES = re.compile(r"'{2,}")
_SWITCH = re.compile(r"__[A-Z]+__")
_LIST_MARK = re.compile(r"^[*#:;]+[ \t]*", re.M)
_LEFTOVER_ROW = re.compile(r"^[ \t]*(?:[|!]|\{\||\}\}).*$", re.M)
_EMPTY_BRACKETS = re.compile(r"[ \t]*\([\s,;:–-]*\)")
_SPACE_BEFORE = re.compile(r"[ \t]+([,.;:)])")


def read(path: Path) -> str:
    """The plain text of all articles of a dump, blank lines between paragraphs.

    Streams page by page. Raises UserError if the file is no whole bzip2 file of XML.
    """
    try:
        articles = [f"{title}\n\n{clean(wikitext)}" for title, wikitext in pages(path)]
    except (OSError, EOFError, ET.ParseError, KeyError) as error:
        raise UserError(
            f"{path} is not a whole MediaWiki dump in bzip2 ({error}): fetch it again."
        ) from error
    return "\n\n".join(articles)


def pages(path: Path) -> Iterator[tuple[str, str]]:
    """Title and wikitext of each article: namespace 0, no redirects."""
    with bz2.open(path) as file:
        for _, element in ET.iterparse(file):
            if not element.tag.endswith("page"):
                continue
            fields = {child.tag.rpartition("}")[2]: child for child in element.iter()}
            if fields["ns"].text == "0" and "redirect" not in fields:
                yield fields["title"].text or "", fields["text"].text or ""
            element.clear()  # a page at a time is in memory


def clean(wikitext: str) -> str:
    """The plain text of one article's markup."""
    text = _COMMENT.sub("", wikitext)
    text = _DROPPED_TAG.sub("", _EMPTY_TAG.sub("", text))
    text = _replace_nested(text, "{{", "}}", lambda _: "")
    text = _replace_nested(text, "{|", "|}", lambda _: "")
    text = _LABELLED_ADDRESS.sub(r"\1", text)
    text = _replace_nested(text, "[[", "]]", _label)
    text = _ADDRESS.sub("", _TAG.sub("", _BREAK.sub(" ", text)))
    text = _HEADING.sub(r"\n\2\n", _drop_sources(text))
    for leftover in (_QUOTES, _SWITCH, _LEFTOVER_ROW, _LIST_MARK):
        text = leftover.sub("", text)
    return _tidy(html.unescape(text))


def _replace_nested(text: str, opening: str, closing: str, by: Callable[[str], str]) -> str:
    """Replace each outermost balanced span; brackets without a partner stay as they are."""
    open_at: list[int] = []
    spans: list[tuple[int, int]] = []
    for bracket in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text):
        if bracket[0] == opening:
            open_at.append(bracket.start())
        elif open_at:
            start = open_at.pop()
            while spans and spans[-1][0] > start:
                spans.pop()  # it lies inside this one
            spans.append((start, bracket.end()))
    pieces, done = [], 0
    for start, end in spans:
        pieces += [text[done:start], by(text[start:end])]
        done = end
    return "".join(pieces) + text[done:]


def _label(link: str) -> str:
    """What a reader sees of [[target|label]]; nothing of files and categories."""
    if _DROPPED_LINK.match(link):
        return ""
    return link[2:-2].rpartition("|")[2].strip("[]:")


def _drop_sources(text: str) -> str:
    """Without the top-level sections that list sources and links."""
    while heading := _SOURCE_HEADING.search(text):
        following = _NEXT_SECTION.search(text, heading.end())
        text = text[: heading.start()] + (text[following.start() :] if following else "")
    return text


def _tidy(text: str) -> str:
    """One space between words, one blank line between paragraphs, no traces of what was dropped."""
    text = re.sub(r"[ \t\u00a0\u2009\u200a\u202f]+", " ", text)
    text = _SPACE_BEFORE.sub(r"\1", _EMPTY_BRACKETS.sub("", text))
    lines = (line.strip() for line in text.split("\n"))
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()
