import dataclasses

import pytest

from experiments.errors import UserError
from experiments.papers import bibliography, pages

BIB = pages.PAPERS / "references.bib"


@pytest.fixture(scope="module")
def found():
    return pages.read_pages()


def test_the_bibliography_is_complete(found):
    assert bibliography.problems(bibliography.read(BIB), found) == []


def test_values_in_braces_in_quotes_and_bare(tmp_path):
    path = tmp_path / "a.bib"
    path.write_text(
        '@Book{knuth, title = {The {\\TeX} {B}ook}, author = "Donald {"}E.{"} Knuth",\n'
        " year = 1984, publisher = {Addison\n   Wesley} }\n"
    )
    entry = bibliography.read(path)["knuth"]
    assert entry.kind == "Book"
    assert entry.fields == {
        "title": "The {\\TeX} {B}ook",
        "author": 'Donald {"}E.{"} Knuth',
        "year": "1984",
        "publisher": "Addison Wesley",
    }


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("@misc{a, title={x}}\n@misc{a, title={y}}", "a.bib has 'a' twice"),
        ("\n@misc a", "a.bib, line 2: expected @kind"),
        ("@misc{a, title={x}", "a.bib: a: expected name = {value} and found ''"),
        ("@misc{a, title={x", "a.bib: a: a value that begins with '{x' never ends"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, text, sentence):
    (tmp_path / "a.bib").write_text(text)
    with pytest.raises(UserError, match=sentence):
        bibliography.read(tmp_path / "a.bib")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a bibliography"):
        bibliography.read(tmp_path / "none.bib")


def test_each_gap_is_named(found):
    found = {stem: found[stem] for stem in ("gptq", "rtn")}
    cited = {key for page in found.values() for key in page.cited}
    entries = {key: entry for key, entry in bibliography.read(BIB).items() if key in cited}
    lost = entries.pop("hassibi1993obs")
    entries["nobody2000"] = lost
    entries["nagel2021white"] = bibliography.Entry("misc", {"author": "A", "title": "T"})
    wrong = dataclasses.replace(found["gptq"].citation, year=2022)
    mine = found | {"gptq": dataclasses.replace(found["gptq"], citation=wrong)}
    assert bibliography.problems(entries, mine) == [
        "papers/gptq.md cites 'hassibi1993obs', which references.bib lacks.",
        "references.bib has 'nobody2000', which no page cites.",
        "references.bib: nagel2021white has no year.",
        "references.bib: nagel2021white has no journal, booktitle or eprint.",
        "papers/gptq.md: citation: the year is '2022', and '2023' in references.bib under "
        "frantar2023gptq.",
    ]
