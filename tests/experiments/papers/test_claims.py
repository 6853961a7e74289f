import dataclasses
import itertools
import math
import re
import shlex

import hydra
import numpy as np
import pytest
from scipy import stats

from experiments.entry import CONF
from experiments.errors import UserError
from experiments.papers import lookup, pages
from experiments.papers.claims import Verdict, judge, judge_page, runs_of
from experiments.papers.facts import Check, Claim
from experiments.papers.lookup import Run, finder, parse, run_at
from tests.experiments.papers import synthetic
from tests.experiments.papers.synthetic import GPTQ, RTN, record

LOWER, HIGHER = GPTQ + "4", RTN + "4"


@pytest.fixture(scope="module")
def found():
    return pages.read_pages()


def claim(metric="metrics.perplexity.value", factor=1.0, higher=HIGHER, **fields):
    check = Check(metric=metric, lower=tuple(LOWER.split()), factor=factor,
                  higher="float" if higher == "float" else tuple(higher.split()))  # fmt: skip
    return Claim(id="c", sentence="s", source="k", check=check, experiment="x", **fields)


def judged(records, mine=None, scale="embedded"):
    mine = mine or claim()
    higher = parse("float") if mine.check.higher == "float" else Run("compress", mine.check.higher)
    return judge(mine, scale, (Run("compress", mine.check.lower), higher), finder(records))


def test_all_three_outcomes_of_a_comparison():
    low, high = record(LOWER, 0.2, noise=0.05), record(HIGHER, 0.3, noise=0.05)
    assert judged([low, high]).status == "HOLDS"
    worse = record(LOWER, 0.4, noise=0.05)
    assert judged([worse, high]).status == "DOES NOT HOLD"
    alike = record(LOWER, 0.3, noise=0.05)
    assert judged([alike, high]).status == "INCONCLUSIVE"


def test_the_statistics_are_those_of_a_paired_t_test_in_the_log():
    low, high = record(LOWER, 0.2, noise=0.05), record("float")
    found = judged([low, high], claim(factor=1.2, higher="float"))
    losses = [r["metrics"]["perplexity"]["window_losses"] for r in (low, high)]
    test = stats.ttest_rel(losses[0], np.add(losses[1], math.log(1.2)))
    interval = 1.2 * np.exp(test.confidence_interval(0.95))
    ratio = math.exp(np.mean(losses[0]) - np.mean(losses[1]))
    assert found.status == "DOES NOT HOLD"
    assert f"ratio {ratio:.3f} ({interval[0]:.3f} to {interval[1]:.3f}), to be below 1.2" in str(
        found.evidence
    )
    assert f"n = 40 windows, p = {test.pvalue:.2g}" in found.evidence


def test_what_is_missing_is_named_by_its_command():
    needs = judged([record(LOWER, 0.2)])
    assert needs.status == "NOT RUN"
    command = "python -m experiments.compress algorithm=rtn algorithm.format.bits=4"
    assert str(needs) == f"NOT RUN (needs: `{command}`)"
    assert str(judged([])).count("python -m experiments.compress") == 2
    assert "`python -m experiments.evaluate`" in str(judged([], claim(higher="float")))


def test_other_windows_are_said_not_skipped():
    found = judged([record(LOWER, 0.2), record(HIGHER, 0.3, windows="others")])
    assert found.status == "NOT RUN"
    assert "the same held-out windows; these are of held-out, others" in str(found)


def test_seeds_are_averaged_where_both_have_them():
    low = [record(LOWER, 0.2, noise=0.3, seed=seed) for seed in range(3)]
    high = [record(HIGHER, 0.3, noise=0.3, seed=seed) for seed in range(1, 4)]
    found = judged(low + high)
    assert "n = 40 windows over 2 seeds" in found.evidence
    alone = judged([*low, record("float")], claim(factor=2.0, higher="float"))
    assert "over 3 seeds" in alone.evidence  # the float model is the same for all of them
    assert "these share none" in str(judged([low[0], high[0]]))


def test_the_same_seeds_again_count_once():
    again = record(LOWER, 0.1) | {"started": "2026-02-01T00:00:00+00:00"}
    found = judged([record(LOWER, 0.4), again, record(HIGHER, 0.3)])
    assert found.status == "HOLDS" and "seeds" not in found.evidence


@pytest.mark.parametrize("factor, status", [(1.0, "HOLDS"), (0.5, "DOES NOT HOLD")])
def test_other_numbers_are_compared_as_they_are(factor, status):
    low = record(LOWER, 0.2, seconds={"compress": 3.0})
    high = record(HIGHER, 0.3, seconds={"compress": 4.0})
    found = judged([low, high], claim("seconds.compress", factor))
    assert found.status == status
    assert found.evidence == (f"seconds.compress 3 against 4: ratio 0.750, to be below {factor:g}")


def test_a_metric_that_no_record_has_is_named():
    found = judged([record(LOWER, 0.2), record(HIGHER, 0.3)], claim("metrics.accuracy.value"))
    assert str(found) == (
        "NOT RUN (needs: The record of GPTQ 4 bit g64 has no number at metrics.accuracy.value)"
    )


def test_an_expectation_is_shown_beside_what_came_out():
    fails = claim(expected={"embedded": "does not hold"}, reason="too small")
    low, high = record(LOWER, 0.2), record(HIGHER, 0.3)
    surprise = judged([low, high], fails)
    assert surprise.surprise and str(surprise) == ("HOLDS, though expected not to hold: too small")
    expected = judged([record(LOWER, 0.5), high], fails)
    assert not expected.surprise and str(expected) == "DOES NOT HOLD, as expected: too small"
    open_ = dataclasses.replace(expected, status="INCONCLUSIVE")
    assert str(open_) == "INCONCLUSIVE, expected not to hold: too small"
    assert str(judged([high], fails)).endswith(", expected not to hold: too small")
    assert str(judged([low, high], fails, scale="paper")) == "HOLDS"
    assert str(Verdict(fails, "DOES NOT HOLD", "", "holds")).startswith(
        "DOES NOT HOLD, though expected to hold"
    )


def test_the_embedded_claims_are_all_computed(found):
    find = finder(synthetic.everything().values())
    verdicts = [v for stem in ("rtn", "gptq") for v in judge_page(stem, "embedded", found, find)]
    by_id = {verdict.claim.id: verdict for verdict in verdicts}
    assert len(by_id) >= 6 and all(v.status != "NOT RUN" for v in verdicts)
    failing = by_id["gptq-3-bits-nearly-free"]
    assert failing.status == "DOES NOT HOLD" and not failing.surprise
    assert by_id["gptq-true-sequential-helps"].status == "INCONCLUSIVE"


def test_a_run_at_a_scale_begins_with_its_algorithms_overrides(found):
    lower = run_at(("algorithm=gptq", "algorithm.format.bits=3"), "paper", "gptq", found)
    assert lower.overrides[0] == "experiment=gptq_llama7b"
    other = run_at(("algorithm=rtn",), "paper", "gptq", found)
    assert other.overrides == ("experiment=rtn_llama7b", "algorithm=rtn")
    free = run_at("float", "paper", "gptq", found)
    assert (free.command, free.overrides) == ("evaluate", ("experiment=gptq_llama7b",))
    assert str(free) == "python -m experiments.reproduce paper=gptq scale=paper"
    assert str(run_at("float", "embedded", "gptq", found)) == "python -m experiments.evaluate"
    with pytest.raises(UserError, match="has no scale 'papers'; did you mean paper"):
        run_at("float", "papers", "gptq", found)


def test_overrides_that_say_the_same_name_one_run():
    short, long = parse("algorithm=gptq"), parse(GPTQ + "4 algorithm.format.group_size=64")
    assert lookup.identity_of(short) == lookup.identity_of(long)
    assert lookup.identity_of(short) != lookup.identity_of(parse("algorithm=rtn"))


def test_the_float_model_of_overrides_is_evaluated_as_they_compress_it():
    run = Run("evaluate", ("data.heldout=3", "algorithm=rtn"))
    config = lookup.compose(run)
    assert config.data.heldout == 3 and "algorithm" not in config and config.checkpoint is None
    with pytest.raises(UserError, match="did you mean"):
        lookup.compose(parse("algorithm=gptq algorithm.bit=3"))


def test_runs_are_composed_within_another_command():
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        assert lookup.compose(parse(GPTQ + "7")).algorithm.format.bits == 7
        assert hydra.compose("evaluate").checkpoint is None  # the outer one goes on


def test_a_run_that_lacks_a_value_names_it():
    with pytest.raises(UserError, match="^model.path=…$"):
        lookup.identity_of(parse("model=local"))
    assert "`python -m experiments.compress model=local`, and for it: model.path=…" in str(
        judge(claim(), "embedded", (parse("model=local"), parse("float")), finder([]))
    )


def test_a_run_that_is_misspelt_is_a_mistake_and_not_one_that_has_yet_to_run():
    for wrong in ("algorithm=gptq algorithm.bit=3", "model=made model.overrides=[experiment=c1]"):
        with pytest.raises(UserError, match="is no run") as found:
            judge(claim(), "embedded", (parse(wrong), parse("float")), finder([]))
        assert not isinstance(found.value, lookup.NotRecorded)


def commanded(command):
    """The identities of all runs of a command line, sweeps spread out."""
    _, _, module, *words = shlex.split(command)
    pairs = [word.split("=", 1) for word in words if word != "--multirun"]
    pairs = [pair for pair in pairs if pair[0] != "seed"]  # which tells no experiments apart
    each = [
        [f"{key}={value}" for value in ([values] if set("[{") & set(values) else values.split(","))]
        for key, values in pairs
    ]
    which = module.removeprefix("experiments.")
    return {lookup.identity_of(Run(which, job)) for job in itertools.product(*each)}


@pytest.mark.parametrize("stem", sorted(pages.read_pages()))
@pytest.mark.some(8)
def test_the_command_of_a_claim_makes_what_it_compares(found, stem):
    for mine in found[stem].claims:
        kind = r"python -m experiments\.(compress|evaluate|train) "
        assert re.match(kind, mine.experiment), mine.id
        runs = runs_of(mine, "embedded", stem, found)
        named = {lookup.identity_of(run): run for run in runs}  # all compose
        floats = {each for each, run in named.items() if run == parse("float")}
        assert (named.keys() - floats) & commanded(mine.experiment), mine.id


def trained(name, *losses):
    run = parse(f"train experiment=c1 optimizer={name}")
    return [
        synthetic.of(run, seed=seed, training={"heldout": {"loss": loss}})
        for seed, loss in enumerate(losses)
    ]


def of_training(lower, higher, factor=1.0):
    """A claim on the final losses of two optimizers, judged by their runs."""
    check = Check(metric="training.heldout.loss", lower=("optimizer=muon",),
                  higher=("optimizer=adamw",), factor=factor)  # fmt: skip
    mine = Claim(id="c", sentence="s", source="k", check=check, experiment="x")
    runs = tuple(parse(f"train experiment=c1 optimizer={name}") for name in ("muon", "adamw"))
    return judge(mine, "embedded", runs, finder([*lower, *higher]))


def test_what_training_came_to_is_compared_seed_by_seed():
    muon, adamw = (2.0, 2.1, 2.3), (2.3, 2.35, 2.65)
    found = of_training(trained("muon", *muon), trained("adamw", *adamw))
    test = stats.ttest_rel(muon, adamw)
    assert found.status == "HOLDS"
    assert f"n = 3 seeds, p = {test.pvalue:.2g}" in found.evidence
    reversed_ = of_training(trained("muon", *adamw), trained("adamw", *muon))
    assert reversed_.status == "DOES NOT HOLD"
    alike = of_training(trained("muon", 2.0, 2.4, 2.3), trained("adamw", 2.1, 2.3, 2.3))
    assert alike.status == "INCONCLUSIVE"
    one = of_training(trained("muon", 2.0), trained("adamw", 2.1))
    assert one.status == "INCONCLUSIVE"  # of one seed nothing is known


def test_a_factor_asks_for_more_than_being_lower():
    muon, adamw = trained("muon", 2.0, 2.1, 2.3), trained("adamw", 2.3, 2.35, 2.65)
    assert of_training(muon, adamw, factor=0.5).status == "DOES NOT HOLD"


def test_on_the_page_of_a_training_method_a_run_is_a_training_run(found):
    page = dataclasses.replace(
        found["gptq"], config="conf/optimizer/muon.yaml", scales={"embedded": ("experiment=c1",)}
    )
    run = run_at(("optimizer=muon",), "embedded", "muon", {**found, "muon": page})
    assert run == Run("train", ("experiment=c1", "optimizer=muon"))
    assert str(run) == "python -m experiments.train experiment=c1 optimizer=muon"


def test_a_run_of_another_command_is_named_by_it(found):
    run = run_at(("compress", "algorithm=rtn", "bits=3"), "paper", "gptq", found)
    assert run == Run("compress", ("algorithm=rtn", "bits=3"))
    assert run_at(("train", "steps=9"), "embedded", "gptq", found) == Run("train", ("steps=9",))


def test_training_and_what_it_began_with_are_compared_by_window():
    better = synthetic.of(Run("train", ("experiment=c1",)), 0.2, noise=0.05)
    found = judge(
        claim(), "embedded", (Run("train", ("experiment=c1",)), parse(HIGHER)),
        finder([better, record(HIGHER, 0.3, noise=0.05)]),
    )  # fmt: skip
    assert found.status == "HOLDS" and "n = 40 windows" in found.evidence
