"""A model that another run leaves: made once, known by what made it."""

import dataclasses

import hydra
import numpy as np
import pytest

from experiments import compress, evaluate, train
from experiments.checkpoints.soup import Soup
from experiments.checkpoints.sources import open_source
from experiments.configuration import CONF
from experiments.entry import build, resolved
from experiments.errors import UserError
from experiments.runs.identity import identity
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import CONFIG

BASE = ["algorithm=rtn", "algorithm.format.group_size=16", "hardware.rate=1e11"]
TRAINED = ["steps=2", "batch=2", "evaluation_batch=2", "hardware.rate=1e11"]


def asked(folder, *more, made=()):
    """A short training of what a compression makes."""
    given = [*tiny.overrides(folder)[2:], f"runs={folder / 'runs'}", "logger.tensorboard=false"]
    inner = [*tiny.overrides(folder), *BASE, *made]
    method = ["parametrization=ste", "parametrization.format=null"]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose(
            "train", ["model=made", f"model.overrides={inner}", *given, *method, *TRAINED, *more]
        )


def name(config):
    return identity("train", resolved(config))


def test_it_is_made_once_and_then_trained(tmp_path, capsys):
    done = train.run(asked(tmp_path))
    (made,) = (tmp_path / "runs" / "compress").glob("*/seed-0")
    direct = compress.run(tiny.config(tmp_path, *BASE))
    assert direct.folder == made  # the run that the command itself makes
    assert done.record["model"]["digest"] == open_source(direct.checkpoint).digest()
    sizes = [run.record["footprint"] for run in (done, direct)]
    assert sizes[0]["weights"] > 0  # packed as they were, beside what is dense
    assert all(sizes[0][key] == sizes[1][key] for key in ("weights", "weight_bits"))
    written = (made / "record.json").stat().st_mtime_ns
    train.run(asked(tmp_path, "steps=1"))
    assert (made / "record.json").stat().st_mtime_ns == written
    assert capsys.readouterr().err.count("making the model first") == 1


def test_what_was_trained_is_stored_in_half_the_bytes(tmp_path):
    """float32 as it leaves training; by a compression that does nothing else, as that stores."""
    inner = [*tiny.overrides(tmp_path), *TRAINED, "logger.tensorboard=false"]
    given = [*tiny.overrides(tmp_path)[2:], f"runs={tmp_path / 'runs'}", "hardware.rate=1e11"]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        made = ["model=made", "model.command=train", f"model.overrides={inner}"]
        config = hydra.compose("compress", [*made, *given, "algorithm=none"])
    done = compress.run(config)
    (trained,) = (tmp_path / "runs" / "train").glob("*/seed-0/checkpoint")
    before, after = open_source(trained), open_source(done.checkpoint)
    stored = done.record["footprint"]
    assert stored["model_bits"] == 16 * stored["parameters"] and stored["weights"] == 0
    for name in ("embed.weight", "blocks.1.mlp.up.weight"):
        assert before.read(name).dtype == np.float32
        np.testing.assert_array_equal(after.read(name), before.read(name).astype(np.float16))


def test_what_made_it_counts_and_not_where_it_lies(tmp_path):
    first = name(asked(tmp_path))
    assert name(asked(tmp_path, f"runs={tmp_path / 'elsewhere'}", "dry_run=true")) == first
    assert name(asked(tmp_path, made=["algorithm.format.bits=3"])) != first
    assert name(asked(tmp_path, made=["seed=1"])) == first  # a repetition


def test_a_dry_run_makes_nothing(tmp_path):
    with pytest.raises(UserError, match=r"`python -m experiments.compress .*`: run that first"):
        train.run(asked(tmp_path, "dry_run=true"))
    assert not (tmp_path / "runs").exists()


def test_a_command_that_leaves_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="command=evaluate leaves no model: choose compress or"):
        train.run(asked(tmp_path, "model.command=evaluate"))


def brewed(folder, *members):
    """An evaluation of the mean of two trainings of one model."""
    inner = [*tiny.overrides(folder), *TRAINED, "logger.tensorboard=false"]
    given = [*tiny.overrides(folder)[2:], f"runs={folder / 'runs'}", "logger.tensorboard=false"]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("evaluate", ["model=soup", f"model.overrides={inner}",
                                          f"model.members={list(members)}", *given])  # fmt: skip


def test_a_soup_is_the_mean_of_what_runs_leave(tmp_path):
    config = brewed(tmp_path, "seed=1", "seed=2 learning_rates=2")
    assert np.isfinite(evaluate.run(config).record["metrics"]["perplexity"]["value"])
    found = build(config, "model")
    members = [open_source(path) for path in (tmp_path / "runs/train").glob("*/*/checkpoint")]
    assert len(members) == 2 and found.config == members[0].config
    for name in ("embed.weight", "blocks.1.mlp.up.weight"):
        each = [member.read(name) for member in members]
        np.testing.assert_allclose(found.read(name), np.mean(each, axis=0), rtol=1e-6, atol=1e-8)
        assert not np.array_equal(*each)


def test_a_soup_counts_what_each_member_has(tmp_path):
    def name(*members):
        return identity("evaluate", resolved(brewed(tmp_path, *members)))

    assert len({name("seed=1", "seed=2"), name("seed=1", "seed=3"), name("seed=1")}) == 3


def test_members_of_other_shapes_are_refused(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, layers in zip(folders, (1, 2), strict=True):
        folder.mkdir()
        tiny.write_model(folder, dataclasses.replace(CONFIG, layers=layers))
    with pytest.raises(UserError, match="is of another shape than .*members of one architecture"):
        Soup([open_source(folder / "model.gguf") for folder in folders])
    with pytest.raises(UserError, match="A soup needs members"):
        Soup([])
