"""Puzzle end to end on a tiny model: a library, interrupted or not, and what is chosen from it."""

import dataclasses
import itertools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compress, exporting, library
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.planish import Checkpoint
from experiments.checkpoints.sources import open_source
from experiments.entry import build
from experiments.errors import UserError
from experiments.report import label
from experiments.runs import run as runs
from experiments.structures.alternatives import Alternative, cost, made, sizes_of, within
from experiments.structures.assembled import assembled, stored
from experiments.structures.puzzle import solve
from models.config import BlockSizes
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import CONFIG
from tests.experiments.checkpoints.test_rotated import InMemory
from tests.experiments.structures.test_structures import MIXTURE

SMALL = [
    "structure=puzzle", "structure.multiple=16", "structure.steps=2", "structure.batch=2",
    "structure.score_windows=2", "structure.context=16",
]  # fmt: skip
ONE = ["structure.budgets.parameters=0.6", "algorithm=none"]
WIDE = dataclasses.replace(CONFIG, heads=4, kv_heads=4, head_size=8, qkv_bias=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs that these tests share: a library is made once."""
    return tmp_path_factory.mktemp("puzzle")


@pytest.fixture(scope="module")
def done(folder):
    more = ["export=safetensors", "walk.dense_dtype=float32"]
    return compress.run(tiny.config(folder, *SMALL, *ONE, *more))


@pytest.fixture(scope="module")
def made_library(folder, done):
    return library.run(tiny.config(folder, *SMALL, name="library"))


def test_a_library_holds_what_alternatives_cost_and_lose(folder, made_library):
    said = made_library.record["library"]
    assert said["alternatives"] == [
        ["attention", 1], ["attention", 0], ["feed_forward", 64], ["feed_forward", 32],
        ["feed_forward", 0],
    ]  # fmt: skip
    for scores, losses in zip(said["scores"], said["losses"], strict=True):
        assert scores[0] == scores[2] == 0 and min(scores[1], scores[3], scores[4]) > 0
        assert losses[3]["after"] < losses[3]["before"]  # trained
        assert losses[4]["after"] == losses[4]["before"] > 0  # nothing there to train
    assert [each["parameters"] for each in said["costs"][2:]] == [
        3 * 96 * 64 + 96, 3 * 96 * 32 + 96, 0
    ]  # fmt: skip
    assert [each["cache"] for each in said["costs"]] == [64, 0, 0, 0, 0]


def test_a_score_is_the_divergence_of_the_model_with_that_alternative_alone(folder, made_library):
    source = build(tiny.config(folder), "model")
    windows = library.prepare(tiny.config(folder, *SMALL, name="library")).job.score
    logits = []
    for each in (source, assembled(source, 1, Alternative("feed_forward", 0), {})):
        logits.append(np.asarray(load_model(each)(jnp.asarray(windows))[:, :-1], np.float64))
    p, q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in logits)
    expected = np.mean(np.sum(np.exp(p) * (p - q), -1))
    assert made_library.record["library"]["scores"][1][4] == pytest.approx(expected, rel=1e-3)


def test_what_is_chosen_is_the_best_of_all_choices(folder, made_library):
    """Of the table, by trying each; and what is made of it has those sizes, and reads back."""
    said = made_library.record["library"]
    alternatives = [Alternative(*each) for each in said["alternatives"]]
    _, choice, totals = solve(CONFIG, alternatives, said, {"parameters": 0.6})
    whole = 2 * sum(each["parameters"] for each in said["parent"])
    best = min(
        sum(said["scores"][n // 2][k] for n, k in enumerate(picks))
        for picks in itertools.product(*([(0, 1), (2, 3, 4)] * 2))
        if sum(said["costs"][k]["parameters"] for k in picks) <= 0.6 * whole
    )
    assert choice.score == pytest.approx(best) and totals["parameters"] <= 0.6
    assert choice.bound <= choice.score


def test_a_compression_makes_the_model_that_was_chosen(folder, done, made_library):
    """Of the parent's tensors and the library's, bit for bit, and other software's format of it."""
    record, checkpoint = done.record, Checkpoint(done.checkpoint)
    said, config = record["structure"], checkpoint.config
    sizes = [[each.kv_heads, each.feed_forward] for each in config.blocks]
    assert sizes == said["scores"]["chosen"] and config.family == "nemotron-nas"
    assert said["parameters"][1] < said["parameters"][0] and said["removed"]
    assert label(record) == "Puzzle to 60 % of parameters"
    exported = exporting.place(
        done.folder, build(tiny.config(folder, "export=safetensors"), "export")
    )
    raw = json.loads((exported / "config.json").read_text())
    assert raw["architectures"] == ["DeciLMForCausalLM"] and len(raw["block_configs"]) == 2
    again = open_source(exported)
    assert again.config == config
    for name in checkpoint.names():
        np.testing.assert_allclose(again.read(name), checkpoint.read(name), atol=1e-3, rtol=1e-3)
    source, of_library = (
        build(tiny.config(folder), "model"),
        stored(made_library.folder / "library"),
    )
    for name in checkpoint.names():
        at = re.fullmatch(r"blocks\.(\d)\.((attention|mlp).*)", name)
        attention, channels = sizes[int(at[1])] if at else (1, 64)
        part = (
            f"attention-{attention}" if at and at[3] == "attention" else f"feed_forward-{channels}"
        )
        ours = source.read(name)
        if part not in ("attention-1", "feed_forward-64"):
            ours = of_library(int(at[1]))(f"{part}.{at[2]}")
        np.testing.assert_array_equal(checkpoint.read(name), ours)


def test_other_budgets_go_on_with_the_same_library(folder, done, made_library, capsys):
    """Quantized too; and a budget that nothing meets says by how much."""
    other = ["structure.budgets.parameters=0.9", "structure.budgets.cache=0.5"]
    found = compress.run(
        tiny.config(folder, *SMALL, *other, "algorithm=rtn", "algorithm.format.group_size=32")
    )
    assert "making the library first" not in capsys.readouterr().err
    scores = found.record["structure"]["scores"]
    assert scores["library"] == made_library.record["identity"]
    assert scores["totals"]["cache"] <= 0.5 and scores["totals"]["parameters"] <= 0.9
    said = made_library.record["library"]
    alternatives = [Alternative(*each) for each in said["alternatives"]]
    costly = {**said, "costs": [*said["costs"][:4], said["costs"][3]]}  # none goes without
    with pytest.raises(UserError, match=r"parameters=0\.1 cannot be met: .* times as much"):
        solve(CONFIG, alternatives, costly, {"parameters": 0.1})


def test_an_interrupted_library_ends_with_the_same_bytes(
    folder, made_library, tmp_path, monkeypatch
):
    """And a file that was damaged meanwhile is made again."""
    note = runs.OpenRun.note

    def interrupted(self, event, **fields):
        note(self, event, **fields)
        if event == "block":
            raise KeyboardInterrupt

    settings = tiny.config(tmp_path, *SMALL, name="library")
    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(runs.OpenRun, "note", interrupted)
            library.run(settings)
    (at,) = (tmp_path / "runs" / "library").rglob("blocks.0.safetensors")
    at.write_bytes(at.read_bytes()[:-8])
    found = library.run(settings)
    assert len(found.record["attempts"]) == 3
    assert tiny.files(found.folder / "library") == tiny.files(made_library.folder / "library")
    for ours, theirs in zip(
        found.record["library"]["scores"], made_library.record["library"]["scores"], strict=True
    ):
        assert ours == pytest.approx(theirs)


def test_alternatives_are_made_of_the_parents_weights():
    """Channels that stay lose none of their weights; groups of heads become their mean; biases go
    with them.
    """
    source = InMemory(WIDE)
    parent = {n.removeprefix("blocks.0."): x for n, x in source.tensors.items()
              if n.startswith("blocks.0.")}  # fmt: skip
    activity = np.arange(64.0)
    narrow = made(WIDE, Alternative("feed_forward", 16), parent, activity)
    norms = np.linalg.norm(parent["mlp.down.weight"], axis=0)
    kept = np.sort(np.argsort(-activity * norms)[:16])
    np.testing.assert_array_equal(narrow["mlp.up.weight"], parent["mlp.up.weight"][kept])
    np.testing.assert_array_equal(narrow["mlp.down.weight"], parent["mlp.down.weight"][:, kept])
    shared = made(WIDE, Alternative("attention", 2), parent, activity)
    halves = parent["attention.k.bias"].reshape(2, 2, 8).mean(1).ravel()
    np.testing.assert_allclose(shared["attention.k.bias"], halves, rtol=1e-5)
    np.testing.assert_array_equal(shared["attention.o.weight"], parent["attention.o.weight"])
    assert {n: x.shape for n, x in shared.items()} == within(WIDE, Alternative("attention", 2))
    assert not made(WIDE, Alternative("attention", 0), parent, activity)
    took = cost(WIDE, Alternative("attention", 2), context=10, latency_tokens=1)
    assert took["multiplications"] == 2 * 32 * 96 + 2 * 16 * 96 + 2 * 32 * 10
    assert took["seconds"] > 0 and took["cache"] == 2 * 2 * 8


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["structure.kv_heads=[1,0.5]"], "0.5 of 1 key-value heads are no divisor"),
        (["structure.kv_heads=[]"], r"kv_heads=\[\] must be fractions from 0 to 1"),
        (["structure.feed_forward=[2]"], r"feed_forward=\[2\.0\] must be fractions"),
        (["structure.budgets.parameters=1.5"], "parameters=1.5 must be a fraction of what"),
        (["structure.budgets.parameters=null"], "budgets are all null"),
        (["+structure.budgets.watts=1"], "budgets: watts is none of parameters"),
        (["structure.batch=0"], "batch=0 must be at least 1"),
        (["structure.score_windows=6"], "leave none to train on"),
        (["structure.steps=-1"], "steps=-1 must not be negative"),
        (["dry_run=true", "structure.steps=9"], "begins with a library: run python -m"),
    ],
)
def test_what_cannot_be_is_a_sentence(folder, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        compress.prepare(tiny.config(folder, *SMALL, *ONE, *settings))


def test_what_has_no_library_is_a_sentence(folder):
    with pytest.raises(UserError, match="one library serves all"):
        library.prepare(tiny.config(folder, *SMALL, ONE[0], name="library"))
    with pytest.raises(UserError, match="what structure=puzzle chooses from"):
        library.prepare(
            tiny.config(folder, "structure=shortgpt", "~structure.budgets", name="library")
        )
    blocks = (BlockSizes(kv_heads=1, feed_forward=8),) * 2
    for config in (MIXTURE, dataclasses.replace(CONFIG, blocks=blocks)):
        with pytest.raises(UserError, match="whose blocks are alike and have no mixtures"):
            sizes_of(config, (1,), (1,), 1)
