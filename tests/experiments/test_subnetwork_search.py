"""The search over sub-networks, against each of them cut out; samplers; compressions by it."""

import numpy as np
import pytest

from algorithms.search.once_for_all import space
from experiments import compress, search
from experiments.checkpoints.planish import Checkpoint
from experiments.checkpoints.sources import shapes
from experiments.entry import build
from experiments.errors import UserError
from experiments.evaluation.perplexity import perplexity
from experiments.report import calibration, label
from experiments.searching import samplers, subnetworks
from experiments.structures.once_for_all import once_for_all
from experiments.structures.subnetwork import subnetwork
from tests.experiments import tiny

CHOICES = ["structure.layers=[1,2]", "structure.heads=[1,3]",
           "structure.feed_forward=[16,32,64]"]  # fmt: skip
ASKED = ["structure=once_for_all", *CHOICES, "walk.chunk=3"]
WHOLE = sum(np.prod(shape) for shape in shapes(tiny.CONFIG).values())
BUDGET = [f"structure.budgets.parameters={WHOLE * 0.8:.0f}"]


def searched(config, *more):
    return search.run(config(*ASKED, *BUDGET, "allocation=none", *more, name="search"))


def test_every_sub_network_is_worth_what_it_is_cut_out(config, tmp_path):
    """All of them: losses and sizes are those of the smaller models, and the best one is chosen."""
    done = searched(config, "structure/sampler=exhaustive").record
    found, source = done["search"], tiny.model(tmp_path)
    tokens = build(config(), "data").windows(source.tokenizer(), 53, longest=64, seed=0)
    assert found["space"] == 12 and 2 < found["evaluated"] == len(found["trials"]) < 12
    for trial in (found["trials"][0], found["trials"][-1]):
        cut = subnetwork(**trial["sizes"])(source)
        assert trial["loss"] == pytest.approx(perplexity(cut, tokens.calibration).loss, rel=1e-5)
        there = shapes(cut.config)
        assert trial["costs"]["parameters"] == sum(np.prod(s) for s in there.values())
        linear = [s for name, s in there.items() if len(s) == 2 and name != "embed.weight"]
        assert trial["costs"]["multiplications"] == sum(map(np.prod, linear))
        assert trial["costs"]["bytes"] == 2 * trial["costs"]["parameters"]
    assert found["loss"] == min(trial["loss"] for trial in found["trials"])
    assert found["totals"]["parameters"] <= WHOLE * 0.8
    assert done["data"]["searched"] == 6


def test_a_killed_search_goes_on_as_if_nothing_had_been(config, tmp_path, monkeypatch):
    more = ["structure.trials=5", "structure/sampler=evolution", "structure.sampler.population=2"]
    whole = searched(config, *more, f"runs={tmp_path / 'whole'}").record["search"]
    evaluate, calls = subnetworks.Evaluator.__call__, []

    def dying(self, sizes):
        calls.append(sizes)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(self, sizes)

    monkeypatch.setattr(subnetworks.Evaluator, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        searched(config, *more)
    done = searched(config, *more)
    assert done.record["search"] == whole
    assert len(calls) == whole["evaluated"] + 1  # what was known was not evaluated again
    assert len({subnetworks.key_of(t["sizes"]) for t in whole["trials"]}) == whole["evaluated"]


def test_a_compression_begins_with_the_search_and_takes_its_choice(config):
    """By a budget of time too, which is measured."""
    asked = [*ASKED, "structure.budgets.seconds=10", "structure.trials=2", *BUDGET,
             "structure/sampler=random", "algorithm=rtn",
             "algorithm.format.group_size=16"]  # fmt: skip
    done = compress.run(config(*asked))
    record, kept = done.record, Checkpoint(done.checkpoint)
    sizes = record["subnetwork"]["sizes"]
    assert {name: getattr(kept.config, name) for name in sizes} == sizes
    assert record["subnetwork"]["evaluated"] == 2 and record["subnetwork"]["totals"]["seconds"] > 0
    assert record["structure"]["parameters"][1] == record["subnetwork"]["totals"]["parameters"]
    assert label(record).startswith("Once-for-all to ") and "RTN" in label(record)
    assert calibration(record) == "6 × 16"
    assert kept.description["recipe"][0]["_target_"].endswith(".subnetwork")


@pytest.mark.some(3)
@pytest.mark.parametrize(
    "more, sentence",
    [
        (["structure.budgets.parameters=100"], "structure.budgets.parameters=100 leaves no"),
        (["structure.budgets.parameters=null"], "structure.budgets are all null"),
        (
            [f"{each.split('=')[0]}=null" for each in CHOICES],
            "structure: this model was not trained for sub-networks",
        ),
        (["structure.layers=[1,3]"], r"structure: layers=[1, 3] must be"),
        (["structure/sampler=exhaustive", "structure.sampler.most=3"], "12 sub-networks, more"),
        (["structure.trials=0"], "structure: trials=0 must be at least 1"),
        (["structure.sampler.population=1"], "population=1 must be at least 2"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_a_sentence(config, more, sentence):
    with pytest.raises(UserError) as caught:
        searched(config, *more)
    assert sentence in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


SPACE = space({"feed_forward": 16, "layers": 8, "heads": 2, "kv_heads": 2, "hidden": 4},
              {"feed_forward": list(range(1, 17)), "layers": list(range(1, 9))})  # fmt: skip


def sizes(chosen, budgets):
    """It costs as much as it is wide times deep."""
    return {"parameters": chosen["feed_forward"] * chosen["layers"]}


def losses(chosen):
    """The wider and the deeper the better, width more so."""
    return np.asarray([1 / chosen["feed_forward"] + 0.5 / chosen["layers"]])


@pytest.mark.parametrize("sampler", ["evolution", "tpe", "random", "exhaustive"])
def test_samplers_stay_within_the_budget_and_go_the_same_way_again(sampler):
    made = getattr(samplers, sampler)()

    def run(known=()):
        noted = []
        found = once_for_all(sampler=made, budgets={"parameters": 40}, trials=24)
        result = subnetworks.search(
            found, SPACE, losses, sizes, 0, known, lambda _, **f: noted.append(f["trial"])
        )
        return result, noted

    found, noted = run()
    assert all(trial["costs"]["parameters"] <= 40 for trial in found["trials"])
    assert found["evaluated"] == len(noted) and found["asked"] >= found["evaluated"]
    again, new = run(noted[:10])
    assert again == found and len(new) == len(noted) - 10
    least = min(losses(s)[0] for s in SPACE if s["feed_forward"] * s["layers"] <= 40)
    if sampler == "exhaustive":
        assert found["asked"] == len(SPACE) and found["loss"] == least
    else:
        assert found["evaluated"] == 24 and found["loss"] < 1.15 * least
