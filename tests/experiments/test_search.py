"""What a search measures, against the model itself; what it chooses; and compressions by it."""

import dataclasses
import inspect
import re
from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from algorithms.walk import advance
from experiments import allocated, compress, search
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.planish import Checkpoint
from experiments.checkpoints.sources import Source
from experiments.configuration import CONF
from experiments.entry import build, resolved
from experiments.errors import UserError
from experiments.evaluation.forward import activations
from experiments.evaluation.perplexity import perplexity
from experiments.hardware import Hardware
from experiments.report import label
from experiments.runs import run as runs
from experiments.runs.identity import identity
from experiments.searching import mixed, walks
from experiments.step_labels import allocation_label

RTN = ["algorithm=rtn", "algorithm.format.group_size=16", "allocation=mixed"]
TWO = ["allocation.options=[{format: {bits: 2}},{format: {bits: 4}}]"]
SCORES = sorted(path.stem for path in Path(CONF, "allocation", "score").glob("*.yaml"))
CHOICES = sorted(p.stem for p in Path(CONF, "allocation").glob("*.yaml") if p.stem != "none")


def searched(config, *more):
    return search.run(config(*RTN, *TWO, *more, name="search")).record["search"]


def windows(config):
    return search.prepare(config(*RTN, *TWO, name="search")).job.windows


@pytest.mark.some("hawq")
@pytest.mark.parametrize("score", SCORES)
def test_what_is_chosen_is_within_the_budget_and_no_worse_than_every_unit_alike(config, score):
    """4 bits cost 5.5 with their scales; half way there is room for some units."""
    found = searched(config, f"allocation/score={score}", "allocation.budgets.bits=4.5")
    assert found["totals"]["bits"] <= 4.5 and len(found["rules"]) == len(found["units"]) == 8
    assert found["bound"] <= found["score"] <= found["uniform"][0]["score"]
    assert found["uniform"][1]["score"] < found["score"]
    assert {unit["chosen"] for unit in found["units"]} == {0, 1}
    for unit, rule in zip(found["units"], found["rules"], strict=True):
        assert unit["score"][0] > unit["score"][1] > 0
        assert rule == {"match": unit["match"], "algorithm": found["options"][unit["chosen"]]}


class Changed(Source):
    """A model with some weights in place of its own."""

    def __init__(self, source, changes):
        self.source, self.changes = source, changes
        self.config, self.location = source.config, source.location

    def names(self):
        return self.source.names()

    def read(self, name):
        return self.changes[name] if name in self.changes else self.source.read(name)

    def tokenizer(self):
        return self.source.tokenizer()

    def digest(self):
        return self.source.digest()


def test_the_divergence_is_that_of_the_whole_model(config):
    """With one block rounded to 2 bits, by logits of all the vocabulary."""
    more = ["allocation/score=kl", "allocation.unit=block", "allocation.budgets.bits=4.5"]
    found = searched(config, *more)["units"][1]["score"][0]
    source, tokens = build(config(), "model"), windows(config)
    compress_ = build(config(*RTN, "bits=2"), "algorithm").compress
    changes = {
        name: np.asarray(compress_(jnp.asarray(source.read(name)), None).dequantize())
        for name in source.names() if re.fullmatch(r"blocks\.1\.(attention|mlp)\..*weight", name)
    }  # fmt: skip
    ends = [activations(each, [tokens], step=lambda _: None)[0][:, :-1]
            for each in (source, Changed(source, changes))]  # fmt: skip
    model = load_model(source)
    logits = [model.tail(x, model.stem.embed) for x in ends]
    p, q = (np.asarray(z - jax.nn.logsumexp(z, -1, keepdims=True)) for z in logits)
    assert found == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), -1)), rel=1e-3)


def test_gradients_are_those_of_the_models_loss(config):
    """Along a random change of one layer, by differences of the whole model's loss."""
    source, tokens, path = build(config(), "model"), windows(config), "mlp.up"
    seen = {}

    def measure(layer, block, chunks, gradients):
        moving = list(chunks)
        for stage in range(3):  # up to what mlp.gate and mlp.up read
            advance(block, moving, stage)
        seen[layer] = [(f.activation, g[path]) for f, g in zip(moving, gradients, strict=True)]
        return []

    walks.backward(walks.Model(source, tokens, 4), measure, lambda _: [path], {}, lambda *_: None)
    name = f"blocks.0.{path}.weight"
    w = np.asarray(source.read(name), np.float32)
    d = np.random.default_rng(0).normal(size=w.shape).astype(np.float32)

    def loss(step):
        changed = Changed(source, {name: w + np.float32(step) * d})
        return perplexity(changed, tokens, chunk=4).losses.sum() * (tokens.shape[1] - 1)

    slope = sum(np.sum((np.asarray(x) @ d.T) * np.asarray(g)) for x, g in seen[0])
    assert slope == pytest.approx((loss(1e-2) - loss(-1e-2)) / 2e-2, rel=2e-2)


def test_a_compression_begins_with_its_search(config, tmp_path, capsys):
    """Its own rules come first and are no part of what is allocated; sizes are as predicted."""
    own = ["rules=[{match: '.*attention.q', algorithm: {format: {bits: 8}}}]"]
    given = [*RTN, *TWO, "allocation/score=output_error", "allocation.budgets.bits=4.5", *own]
    done = compress.run(config(*given))
    direct = search.run(config(*given, name="search"))
    assert done.record["search"]["identity"] == direct.record["identity"]
    assert done.record["search"]["rules"] == direct.record["search"]["rules"]
    assert done.record["search"]["seconds"] == direct.record["search"]["seconds"]
    assert capsys.readouterr().err.count("searching first") == 1
    recipe = Checkpoint(done.checkpoint).description["recipe"]
    assert [step["match"] for step in recipe[1:]][0] == ".*attention.q" and len(recipe) == 10
    stored = Checkpoint(done.checkpoint).description["tensors"]
    bits = weights = 0
    for name, tensor in stored.items():
        if tensor["kind"] == "compressed" and not name.endswith("attention.q.weight"):
            bits, weights = bits + tensor["storage_bits"], weights + np.prod(tensor["shape"])
    assert bits / weights == pytest.approx(direct.record["search"]["totals"]["bits"])
    assert label(done.record) == "RTN 2/4 bit g16 + 1 rule + Output error to 4.5 bits"


@pytest.mark.some("autoquantize")
@pytest.mark.parametrize("score", ["output_error", "autoquantize"])
def test_an_interrupted_search_goes_on(config, monkeypatch, score):
    """From the first block on or from the last one back, with what was measured kept."""
    given = [*RTN, *TWO, f"allocation/score={score}", "allocation.budgets.bits=4.5"]
    note, met = runs.OpenRun.note, []

    def interrupted(self, event, **fields):
        if event == "measured" and met:
            raise KeyboardInterrupt
        met.extend([event] if event == "measured" else [])
        note(self, event, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(runs.OpenRun, "note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search.run(config(*given, name="search"))
    done = search.run(config(*given, name="search"))
    journal = [e["layer"] for e in runs.Journal(done.folder).entries("measured")]
    assert sorted(journal) == [0, 1] and len(journal) == 2
    undisturbed = search.run(config(*given, "again=true", name="search")).record["search"]
    timed = {"seconds", "solver_seconds"}
    assert {k: v for k, v in done.record["search"].items() if k not in timed} == {
        k: v for k, v in undisturbed.items() if k not in timed
    }


def test_other_budgets_need_no_other_table(config, monkeypatch):
    """What is measured once serves all budgets; a cost that was not measured is."""
    score = "allocation/score=output_error"
    wide = searched(config, score, "allocation.budgets.bits=5.5")
    monkeypatch.setattr(mixed, "solved", None)
    narrow = searched(config, score, "allocation.budgets.bits=4.5")
    assert "measured_by" not in wide and len(narrow["measured_by"]) == 64
    assert [unit["score"] for unit in narrow["units"]] == [u["score"] for u in wide["units"]]
    assert narrow["seconds"] >= wide["seconds"] > 0  # the table is part of what it took
    assert narrow["totals"]["bits"] <= 4.5 < wide["totals"]["bits"]
    for other in (["allocation.budgets.seconds=9"], ["seed=1"], ["allocation.windows=1"]):
        with pytest.raises(TypeError, match="not callable"):
            searched(config, score, "allocation.budgets.bits=4.5", *other)


def test_other_costs_are_budgets_too(config):
    """Seconds of this machine, and multiplications, which zeros save; null leaves a unit dense."""
    options = "[{sparsity: 0.5},{_target_: algorithms.quantization.rtn.rtn, format: {_target_: " \
              "algorithms.formats.integer, bits: 4, group_size: 16}},null]"  # fmt: skip
    given = ["algorithm=magnitude", "allocation=mixed", f"allocation.options={options}",
             "allocation/score=output_error", "allocation.unit=block",
             "allocation.budgets.bits=null", "allocation.budgets.multiplications=70000",
             "allocation.budgets.seconds=100"]  # fmt: skip
    found = search.run(config(*given, name="search")).record["search"]
    weights = sum(unit["weights"] for unit in found["units"])
    assert found["totals"]["multiplications"] == 0.75 * weights <= 70000
    assert sorted(unit["chosen"] for unit in found["units"]) == [0, 2]
    assert 0 < found["totals"]["seconds"] < 100
    assert [alike["bits"] for alike in found["uniform"]] == [9.0, 5.5, 16.0]


@pytest.mark.some(1)
@pytest.mark.parametrize(
    "given, units",
    [(["algorithm=wanda", "allocation=owl"], 2), (["allocation=global_magnitude"], 14),
     (["allocation=lamp"], 14)],
)  # fmt: skip
def test_sparsities_are_those_of_the_checkpoint(config, given, units):
    """The whole model's is what was asked for."""
    done = compress.run(config("algorithm=magnitude", *given, "algorithm.sparsity=0.6"))
    rules = done.record["search"]["rules"]
    assert len(rules) == units and len({rule["algorithm"]["sparsity"] for rule in rules}) > 1
    read, zeros, weights = Checkpoint(done.checkpoint), 0, 0
    for name, tensor in read.description["tensors"].items():
        if tensor["kind"] == "compressed":
            w = read.read(name)
            zeros, weights = zeros + np.sum(w == 0), weights + w.size
    assert zeros / weights == pytest.approx(0.6, abs=0.02)  # rows lose whole numbers
    assert label(done.record).startswith(("Wanda 60 % + OWL", "Magnitude 60 % + "))


@pytest.mark.parametrize("name", [*CHOICES, *(f"score/{name}" for name in SCORES)])
def test_every_allocation_is_configured_with_its_own_defaults(config, name):
    group, _, choice = f"allocation/{name}".rpartition("/")
    overrides = (
        [f"{group}={choice}"] if "/" not in group else ["allocation=mixed", f"{group}={choice}"]
    )
    node = OmegaConf.select(config(*overrides), group.replace("/", "."))
    parameters = inspect.signature(hydra.utils.get_object(node._target_)).parameters
    assert {key for key in node if not key.startswith("_")} == set(parameters)
    for key, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert node[key] == parameter.default, key


def test_a_search_has_the_settings_of_the_compression_that_begins_with_it(config):
    for given in ([*RTN, "bits=3"], ["algorithm=wanda", "allocation=owl", "walk.chunk=2"]):
        direct, asked = config(*given, name="search"), allocated.search_config(config(*given))
        assert set(direct) == set(asked)
        assert identity("search", resolved(direct)) == identity("search", resolved(asked))


def test_a_dry_run_says_what_it_takes_or_what_comes_first(config):
    plan = search.prepare(config(*RTN, *TWO, "allocation.windows=1", name="search"))
    plan.show()
    assert plan.facts()["seconds"]["score"] > 0
    small = dataclasses.replace(plan, hardware=Hardware(memory=1e8, rate=1e11))
    with pytest.raises(UserError, match="Not enough memory to search: .* GB needed, 0.10 GB"):
        small.require(Path("/tmp"))
    with pytest.raises(UserError, match="begins with a search: run python -m experiments.search"):
        compress.prepare(config(*RTN, "dry_run=true"))


@pytest.mark.parametrize(
    "given, sentence",
    [
        (["allocation=none"], "allocation=none leaves nothing to search"),
        (["allocation.budgets.bits=null"], "budgets are all null: give one of bits, bytes"),
        (["allocation.options=[null]"], "leave no choice: give two or more"),
        (["allocation.unit=head"], "unit='head' must be layer, site or block"),
        (["allocation.windows=0"], "windows=0 must be at least 1, or null"),
        (["allocation=owl"], "neither pruning nor algorithm has a fraction that goes"),
        (["rules=[{match: '.*', algorithm: {}}]"], "rules name every layer"),
        (["allocation.options=[null,{format: {bitz: 3}}]"], "rtn has no setting bitz"),
        (["allocation.options=[null,{format: {group_size: 48}}]"], "group_size=48 must divide"),
        (["algorithm=autoround", "algorithm.format.group_size=16"],
         "learns a whole block, and options are tried layer by layer"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_a_sentence(config, given, sentence):
    with pytest.raises(UserError, match=sentence):
        search.prepare(config(*RTN, *given, name="search"))


def test_a_budget_that_cannot_be_met_is_a_sentence(config):
    with pytest.raises(
        UserError, match=r"allocation: budgets: bits=2 cannot be met: .* 3\.5, 1\.75"
    ):
        searched(config, "allocation/score=output_error", "allocation.budgets.bits=2")


def test_options_that_round_inputs_are_no_change_of_weights(config):
    with pytest.raises(UserError, match="Block 1: this score looks at how the weights change"):
        searched(config, "allocation/score=hawq", "activations=int8_token")


def test_an_allocation_is_named_by_its_score_and_budgets():
    node = {"score": {"_target_": "a.hawq"}, "budgets": {"bits": 3.25, "bytes": None}}
    assert allocation_label(node) == "HAWQ-V2 to 3.25 bits"
    assert allocation_label({"_target_": "a.global_magnitude"}) == "Global magnitude"
