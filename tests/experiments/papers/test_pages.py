import copy

import pytest
import yaml

from experiments.errors import UserError
from experiments.papers import pages
from experiments.papers.pages import FRONT, PAPERS


@pytest.fixture(scope="module")
def gptq():
    front = FRONT.match((PAPERS / "gptq.md").read_text())
    return yaml.safe_load(front[1])


def write(folder, facts, name="gptq"):
    path = folder / f"{name}.md"
    path.write_text(f"---\n{yaml.safe_dump(facts, allow_unicode=True)}---\n\n# Page\n")
    return path


def test_every_page_is_valid_and_says_what_its_yaml_says(gptq):
    found = pages.read_pages()
    assert {"rtn", "gptq"} <= set(found)
    page = found["gptq"]
    assert page.citation.authors[0] == "Elias Frantar"
    assert page.published[0].dense == 5.68 and page.published[0].rows[2].group_size == 128
    assert [claim.id for claim in page.claims] == [claim["id"] for claim in gptq["claims"]]
    assert page.claims[0].check.factor == 1.0
    assert page.cited >= {"frantar2023gptq", "chen2025babai"}


def test_claims_were_made_of_both_kinds():
    claims = [claim for page in pages.read_pages().values() for claim in page.claims]
    assert len(claims) >= 6
    unexpected = {c.id for c in claims if c.expected.get("embedded") == "does not hold"}
    assert {"gptq-3-bits-nearly-free", "gptq-2-bits-reasonable"} <= unexpected


def change(facts, key, value):
    """facts with facts[a][b]… = value for the key "a.b.…"; None takes it away."""
    facts = copy.deepcopy(facts)
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node = facts
    for part in path:
        node = node[part]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return facts


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("titel", "x", "papers/gptq.md: there is no key 'titel'"),
        ("claim", [], "there is no key 'claim'; did you mean claims?"),
        ("claims.0.check.matric", "x", r"claims\[0\]: check: there is no key 'matric'; did"),
        ("claims.1.check", None, r"papers/gptq.md: claims\[1\] lacks 'check': a mapping with"),
        ("needs", None, "papers/gptq.md lacks 'needs': text"),
        ("citation.year", "2023", "citation: year should be a whole number, and is '2023'"),
        ("citation.year", True, "citation: year should be a whole number, and is True"),
        ("citation", "GPTQ", "citation should be a mapping with key, title"),
        ("also", "frantar2022obc", "also should be a list, each text, and is 'frantar2022obc'"),
        ("claims.0.check.lower", "gptq", "lower should be a list, each text or 'float'"),
        ("claims.2.expected.embedded", "fails", "expected.embedded should be 'holds' or 'does not"),
        ("published.0.rows.1.value", "6.09", r"rows\[1\]: value should be a number, and is '6.09'"),
    ],
)
def test_facts_of_another_shape_are_refused_in_one_sentence(tmp_path, gptq, key, value, sentence):
    path = write(tmp_path, change(gptq, key, value))
    with pytest.raises(UserError, match=sentence) as caught:
        pages.read_page(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("code", "algorithms/gptq.py", "papers/gptq.md: code: there is no algorithms/gptq.py."),
        ("config", "conf/gptq.yaml", "config: there is no conf/gptq.yaml"),
        ("tests", "tests/none.py", "tests: there is no tests/none.py"),
        ("claims.1.id", "gptq-below-rtn-4-bits", "'gptq-below-rtn-4-bits' comes 2 times"),
        ("scales.embedded", None, "scales lacks 'embedded'"),
        ("claims.2.expected", {"papers": "holds"}, "no scale 'papers'; did you mean paper?"),
        ("claims.2.reason", None, "expected and reason belong together"),
        ("published.5.experiment", "gptq_llama7b", "measures perplexity, not mean accuracy"),
    ],
)
def test_facts_that_are_not_true_are_refused(tmp_path, gptq, key, value, sentence):
    write(tmp_path, change(gptq, key, value))
    with pytest.raises(UserError, match=sentence):
        pages.read_pages(tmp_path)


def test_what_is_not_yaml_is_refused(tmp_path):
    for text, sentence in [
        ("# Page\n", "should open with its facts"),
        ("---\na: [1\n---\n", "papers/page.md: not YAML"),
        ("---\nname: a\nname: b\n---\n", "the key 'name' comes 2 times"),
        ("---\n- 1\n---\n", "papers/page.md should be a mapping"),
        ("---\na: !!python/object/apply:os.getcwd []\n---\n", "not YAML"),
    ]:
        (tmp_path / "page.md").write_text(text)
        with pytest.raises(UserError, match=sentence):
            pages.read_page(tmp_path / "page.md")


def test_an_unknown_page_is_named_with_its_neighbour():
    with pytest.raises(UserError, match="no page papers/gptg.md; did you mean gptq"):
        pages.find(pages.read_pages(), "gptg")
