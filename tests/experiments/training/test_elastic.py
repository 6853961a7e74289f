"""Training of all sub-networks: what it leaves, how it goes on, what it refuses."""

import hydra
import pytest

from experiments import train
from experiments.checkpoints.planish import Checkpoint
from experiments.configuration import CONF
from experiments.entry import build
from experiments.errors import UserError
from experiments.evaluation.perplexity import perplexity
from experiments.report import label
from experiments.structures.subnetwork import subnetwork
from experiments.training import metrics
from tests.experiments.training import small
from tests.experiments.training.test_train import Killed, kill_at, result

ELASTIC = ["model.layers=2", "elastic=sandwich", "elastic.layers=[1,2]", "elastic.kv_heads=[1,2]",
           "elastic.feed_forward=[8,16]", "elastic.random=1"]  # fmt: skip


def config(folder, *more):
    return small.config(folder, *ELASTIC, *more)


def test_what_is_saved_is_the_whole_network_and_holds_the_smallest(tmp_path):
    """Which is what was looked at."""
    done = train.run(config(tmp_path))
    lines = metrics.read(done.folder / metrics.FILE)
    held = done.record["training"]["heldout"]
    assert held["loss"] == held["cross_entropy"] != held["smallest"]
    losses = [line["train"] for line in lines if "train" in line]
    assert all(each["loss"] > each["cross_entropy"] for each in losses)
    assert done.record["metrics"]["perplexity"]["loss"] == pytest.approx(held["loss"], abs=2e-6)
    assert label(done.record) == "AdamW 8 steps + sandwich"
    kept = Checkpoint(done.checkpoint)
    assert kept.config.layers == 2 and kept.description["recipe"][0]["elastic"]["layers"] == [1, 2]
    cut = subnetwork(layers=1, kv_heads=1, feed_forward=8)(kept)
    windows = build(config(tmp_path), "data").windows(kept.tokenizer(), 256, longest=17, seed=0)
    found = perplexity(cut, windows.heldout)
    assert found.loss == pytest.approx(held["smallest"], abs=2e-6)


@pytest.mark.slow
def test_a_killed_run_draws_the_same_networks(tmp_path, monkeypatch):
    whole = result(train.run(config(tmp_path, f"runs={tmp_path / 'whole'}")))
    kill_at(monkeypatch, 4)
    with pytest.raises(Killed):
        train.run(config(tmp_path))
    assert result(train.run(config(tmp_path))) == whole


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["elastic.layers=[1,3]"], "elastic: layers=[1, 3] must be different sizes"),
        (["elastic.largest=false"], "elastic: distilled: smaller networks learn"),
        (["parametrization=lora"], "choose parametrization=none"),
        (["loss=fitnets"], "elastic: this loss learns beside the model"),
        (["elastic.hidden=[8,16]"], "elastic.hidden: a norm that subtracts the mean"),
    ],
)
def test_what_has_no_sub_networks_is_refused(tmp_path, settings, sentence):
    with pytest.raises(UserError) as caught:
        train.prepare(config(tmp_path, *settings))
    assert sentence in str(caught.value), caught.value


def test_a_classifier_is_refused():
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        asked = ["model=mlp", "data=digits", "elastic=sandwich", "elastic.feed_forward=[8,16]"]
        wanted = hydra.compose("train", asked)
    with pytest.raises(UserError, match="elastic: a classifier's sizes"):
        train.prepare(wanted)
