"""The documents, rendered from records that were made up, in a repository of its own."""

import dataclasses
import json
import re
import shutil

import pytest
from matplotlib.figure import Figure

from experiments import records, survey
from experiments.errors import UserError
from experiments.papers import lookup, maps, pages, peers
from experiments.papers.facts import Reported
from experiments.survey import Survey
from tests.experiments.papers import synthetic
from tests.experiments.papers.synthetic import GPTQ, RTN

README = """# A workbench

<!-- results:begin runs="float; algorithm=rtn; algorithm=gptq algorithm.format.bits=3" -->
<!-- results:end -->
"""


def cited(found):
    """The real bibliography, less what these pages do not cite."""
    entries = re.split(r"(?m)^(?=@)", (records.ROOT / "papers" / "references.bib").read_text())
    keys = {key for page in found.values() for key in page.cited}
    return "".join(entry for entry in entries if any(f"{{{key}," in entry for key in keys))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A repository with two real pages, records of all their embedded runs, and it rendered."""
    root = tmp_path_factory.mktemp("house")
    (root / "papers").mkdir()
    for name in ("README.md", "rtn.md", "gptq.md", "peers.yaml"):
        shutil.copy(records.ROOT / "papers" / name, root / "papers" / name)
    survey_page = root / "papers" / "README.md"  # less what it shows of runs that are not made up
    of_runs = r"<!-- results:begin (runs|race|benchmark)=.*?results:end -->"
    survey_page.write_text(re.sub(of_runs, "", survey_page.read_text(), flags=re.DOTALL))
    (root / "papers" / "references.bib").write_text(cited(pages.read_pages(root / "papers")))
    (root / "README.md").write_text(README)
    (root / "kernels").mkdir()
    (root / "kernels" / "README.md").write_text("# kernels\n")
    (root / "algorithms").mkdir()
    (root / "algorithms" / "README.md").write_text("# algorithms\n")
    shutil.copy(records.ROOT / "kernels" / "measured.py", root / "kernels")
    (root / survey.RESULTS).mkdir()
    (root / survey.FIGURES).mkdir()
    for name, record in synthetic.everything().items():
        (root / survey.RESULTS / f"{name}.json").write_text(json.dumps(record))
    found = Survey(root)
    for path, fresh in found.stale():
        path.write_text(fresh)
    for path, draw, _ in found.pictures():
        draw(path)
    return root


@pytest.fixture
def root(rendered, tmp_path):
    return shutil.copytree(rendered, tmp_path / "house")


def shown(root, document, marker):
    """What a document shows between a marker and its end."""
    text = (root / document).read_text()
    return re.search(f"results:begin {marker} -->\n(.*?)<!-- results:end", text, re.DOTALL)[1]


def test_what_was_just_rendered_is_not_stale(root):
    assert list(Survey(root).problems()) == []


@pytest.mark.parametrize(
    "document, digits",
    [
        ("README.md", r"(\d\d\.\d)(\d)( ± )"),
        ("papers/README.md", r"(\+0\.1\d)(\d)( \|)"),
        ("papers/gptq.md", r"(ratio \d\.\d\d)(\d)( \()"),
        ("papers/rtn.md", r"(\d\d\.\d)(\d)( against)"),
        ("papers/gptq.md", r"(\+0\.6\d)(\d)( ± )"),
    ],
)
def test_one_digit_changed_by_hand_is_found(root, document, digits):
    path = root / document
    before, digit, after = (match := re.search(digits, path.read_text())).groups()
    changed = f"{before}{(int(digit) + 1) % 10}{after}"
    path.write_text(path.read_text().replace(match[0], changed, 1))
    assert list(Survey(root).problems()) == [
        f"{document} is stale: run python -m experiments.survey."
    ]


def test_one_digit_changed_in_a_record_is_found_in_tables_and_pictures(root):
    rounding = lookup.identity_of(lookup.parse("algorithm=rtn"))
    path = next(p for p in (root / survey.RESULTS).iterdir() if rounding in p.read_text())
    record = json.loads(path.read_text())
    record["metrics"]["perplexity"]["value"] += 1.0
    path.write_text(json.dumps(record))
    found = " ".join(Survey(root).problems())
    assert "README.md is stale" in found and "papers/rtn.md is stale" in found
    assert "perplexity_against_size.png was drawn from other records" in found
    assert "pareto.png was drawn from other records" in found


def test_another_number_of_a_peer_is_found_in_table_and_picture(root):
    path = root / "papers" / "peers.yaml"
    path.write_text(path.read_text().replace("loss: 0.146", "loss: 0.147"))
    found = " ".join(Survey(root).problems())
    assert "papers/README.md is stale" in found and "pareto.png was drawn from other" in found


def test_the_best_of_every_size_stands_beside_the_best_elsewhere(root):
    table = shown(root, "papers/README.md", "map=peers")
    row = next(line for line in table.splitlines() if "| 4.x bits | float |" in "| " + line[2:])
    assert "GPTQ 4 bit g64 | 4.38 | +0.16" in row
    assert "AWQ 4 bit g64, llm-compressor 0.14 | 4.31 | +0.146 ± 0.007 |" in row
    assert "| 4.x bits | 4 bits | – | – | – | NVFP4, llm-compressor" in table  # nothing of ours


@pytest.mark.parametrize(
    "row, sentence",
    [
        ("{tool: a, method: b, bits: 4.0}", r"papers/peers.yaml\[0\] lacks 'windows'"),
        ("{tool: a, method: b, bits: 4.0, windows: 20}", "b needs either loss or perplexity"),
    ],
)
def test_a_peer_without_its_numbers_is_refused(tmp_path, row, sentence):
    (tmp_path / "peers.yaml").write_text(f"- {row}\n")
    with pytest.raises(UserError, match=sentence):
        peers.read_peers(tmp_path)


def test_a_missing_picture_and_one_without_a_digest_are_found(root):
    figures = root / survey.FIGURES
    (figures / "pareto.png").unlink()
    Figure(figsize=(1, 1)).savefig(figures / "perplexity_against_size.png")
    assert list(Survey(root).problems()) == [
        "papers/figures/perplexity_against_size.png was drawn from other records: run python -m "
        "experiments.survey.",
        "papers/figures/pareto.png is missing: run python -m experiments.survey.",
    ]


def test_a_gap_in_the_bibliography_is_found(root):
    path = root / "papers" / "references.bib"
    path.write_text(path.read_text().replace("hassibi1993obs,", "hassibi1994obs,"))
    assert len(list(Survey(root).problems())) == 2


def test_a_recipe_is_shown_with_the_float_model(root):
    table = shown(root, "papers/rtn.md", "recipe=rtn")
    assert table.index("float") < table.index("RTN 8 bit") < table.index("RTN 3 bit")
    assert "GPTQ" not in table
    named = shown(root, "README.md", 'runs="[^"]*"')
    assert named.index("float") < named.index("RTN 4 bit") < named.index("GPTQ 3 bit")
    assert re.search(r"GPTQ 3 bit g64 \| 3\.38", named)  # the default, not its namesakes


def test_the_claims_are_shown_with_what_was_expected(root):
    table = shown(root, "papers/gptq.md", "claims=gptq")
    assert "DOES NOT HOLD, as expected: the paper says it of 175 billion" in table
    assert "HOLDS | 23" in table and "INCONCLUSIVE" in table and "n = 40 windows" in table


def test_a_claim_whose_run_is_missing_says_so(root):
    for path in (root / survey.RESULTS).iterdir():
        if json.loads(path.read_text())["config"].get("walk", {}).get("sequential") is False:
            path.unlink()
    page = Survey(root).render((root / "papers/gptq.md").read_text(), "gptq.md")
    assert (
        "NOT RUN (needs: `python -m experiments.compress algorithm=gptq bits=3 "
        "walk.sequential=false`) | – |" in page
    )


def test_the_maps(root):
    taxonomy = shown(root, "papers/README.md", "map=taxonomy")
    assert "[gptq.md](gptq.md) | [gptq.py](../algorithms/quantization/gptq.py)" in taxonomy
    timeline = shown(root, "papers/README.md", "map=timeline")
    assert timeline.index("2018") < timeline.index("2023")
    comparison = shown(root, "papers/README.md", "map=comparison")
    assert len(comparison.split("\n\n")[0].splitlines()) == 2 + len(synthetic.everything())
    assert "GPTQ 3 bit g64 activation_order=false" in comparison and "40 windows" in comparison


def test_runs_of_other_models_and_windows_stay_out(root):
    other = synthetic.record(GPTQ + "5", 0.1, model={"location": "x", "digest": "other"})
    short = synthetic.record(RTN + "5", 0.1, windows="other")
    for name, record in {"other": other, "short": short}.items():
        (root / survey.RESULTS / f"{name}.json").write_text(json.dumps(record))
    assert list(Survey(root).problems()) == []


def test_a_compression_of_what_another_run_made_stands_among_those_of_equal_cost(root):
    made = "model=made model.overrides=['algorithm=rtn'] algorithm=gptq algorithm.format.bits=2"
    record = synthetic.record(made, model={"location": "x", "digest": "other"})
    (root / survey.RESULTS / "made.json").write_text(json.dumps(record))
    value = f"**{record['metrics']['perplexity']['value']:.2f}**"
    assert f"{value} GPTQ 2 bit g64 from algorithm=rtn" in Survey(root).render(
        "<!-- results:begin map=costs -->\n<!-- results:end -->", "page"
    )


def test_what_is_reported_of_training_is_shown(root):
    values = {"AdamW": 5625.0, "SOAP": 3125.0}
    page = dataclasses.replace(
        pages.read_pages()["gptq"], reported=(Reported(what="steps", values=values, source="s"),)
    )
    assert maps.reported(page).splitlines()[2:] == [
        "| steps | AdamW | 5625 | s |", "| steps | SOAP | 3125 | s |"]  # fmt: skip


def test_training_runs_stand_beside_the_first(root):
    for name, loss in (("adamw", 2.3), ("muon", 2.0)):
        for seed in (0, 1):
            record = synthetic.of(
                lookup.parse(f"train experiment=c1 optimizer={name}"), seed=seed,
                training={"heldout": {"cross_entropy": loss + seed / 10}}, seconds={"train": 1.0},
                model={"parameters": 5},
            )  # fmt: skip
            (root / survey.RESULTS / f"{name}-{seed}.json").write_text(json.dumps(record))
    names = "train experiment=c1 optimizer=adamw; train experiment=c1 optimizer=muon"
    text = f'<!-- results:begin trained="{names}; train steps=9" -->\n<!-- results:end -->'
    found = Survey(root).render(text, "page")
    assert "| Muon 200 steps | 2 | 2.0500 ± " in found
    assert "Not run yet:\n\n- `python -m experiments.train steps=9`\n" in found


def test_published_numbers_stand_side_by_side(root):
    table = shown(root, "papers/gptq.md", "published=rtn,gptq")
    assert "| LLaMA-7B | WikiText-2 perplexity | 3 | one per row | 5.68 | 25.54 | 8.07 |" in table
    assert "| LLaMA-7B | WikiText-2 perplexity | 3 | 128 | 5.68 | – | 6.61 |" in table
    assert "- Llama-3.1-8B, GPTQ: llm-compressor, W4A16, groups of 128 (llm-compressor" in table


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("published=gptg", "no page papers/gptg.md; did you mean gptq"),
        ("recipe=wanda", "page asks for recipe=wanda, not in papers/results"),
        (
            'runs="algorithm=rtn algorithm.format.bits=7"',
            "page asks for 'algorithm=rtn algorithm.format.bits=7'",
        ),
        ("runs=nothing", "page asks for 'nothing', and needs"),
        ("claims=gptg", "no page papers/gptg.md; did you mean gptq"),
        ("claims=gptq scale=papers", "no scale 'papers'; did you mean paper"),
        ("map=timelines", "page asks for map=timelines; did you mean timeline"),
        ("benchmark=speed", "page asks for benchmark=speed"),
        ("reported=gptq", "page asks for reported=gptq, and it has none"),
        ('trained="train step=7"', "page asks for 'train step=7': .*did you mean steps"),
        ("table=a", "page has a results marker without recipe=, runs=, trained=, claims=, pub"),
        ("recipe", "page has a results marker with recipe: expected key=value"),
    ],
)
def test_a_marker_that_names_nothing_is_refused(rendered, options, sentence):
    text = f"<!-- results:begin {options} -->\n<!-- results:end -->"
    with pytest.raises(UserError, match=sentence):
        Survey(rendered).render(text, "page")


def test_the_command_renders_and_checks(root, monkeypatch):
    monkeypatch.setattr(survey, "Survey", lambda: Survey(root))
    (root / "README.md").write_text(README)
    (root / survey.FIGURES / "pareto.png").unlink()
    monkeypatch.setattr("sys.argv", ["survey", "--check"])
    with pytest.raises(SystemExit):
        survey.main()
    assert not (root / survey.FIGURES / "pareto.png").exists()  # a check writes nothing
    monkeypatch.setattr("sys.argv", ["survey"])
    survey.main()
    assert list(Survey(root).problems()) == []
    assert not list(root.rglob(".*"))
