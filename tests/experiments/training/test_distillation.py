"""Every loss in conf/loss, as the trainer uses it: students learn from a teacher, runs resume."""

from pathlib import Path

import numpy as np
import pytest

from experiments import train
from experiments.configuration import CONF
from experiments.errors import UserError
from experiments.training import loop, metrics, offline
from tests.experiments import tiny
from tests.experiments.training import small
from tests.experiments.training.test_train import Killed, kill_at, result

LOSSES = sorted(path.stem for path in Path(CONF, "loss").glob("*.yaml"))
TEXT = [name for name in LOSSES if name not in ("cross_entropy", "function_matching")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The checkpoint of a model that was trained a little, two blocks deep."""
    folder = tmp_path_factory.mktemp("teacher")
    done = train.run(small.config(folder, "model.layers=2", "steps=30", "evaluate_every=null"))
    return done.checkpoint


def taught(folder, teacher, name, *more):
    settings = ["model@teacher=local", f"teacher.path={teacher}", f"loss={name}", *more]
    return train.run(small.config(folder, *settings))


def held(done, key):
    lines = metrics.read(done.folder / metrics.FILE)
    return [line["heldout"][key] for line in lines if "heldout" in line]


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.some(4)
def test_a_student_comes_nearer_to_what_it_is_taught(tmp_path, teacher, name):
    prompt = ["loss.prompt=4"] if name in ("gkd", "minillm") else []
    few = {"top_k_logits": ["loss.codec.k=16"], "sparse_logit_sampling": ["loss.codec.samples=8"]}
    more = [*prompt, *few.get(name, []), "steps=24", "evaluate_every=8", "save_every=100"]
    done = taught(tmp_path, teacher, name, *more)
    losses = held(done, "loss")
    assert losses[-1] < losses[0]
    assert held(done, "cross_entropy")[-1] < held(done, "cross_entropy")[0]
    assert done.record["model"]["teacher"]["digest"]
    assert (done.checkpoint / "planish.json").exists()


LIKE_OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("jsd", "sparse_logit_sampling")
]


@pytest.mark.parametrize("name", ["fitnets", "top_k_logits", "gkd", *LIKE_OTHERS])
@pytest.mark.some("fitnets", "gkd")
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, teacher, monkeypatch, name):
    more = ["loss.prompt=4"] if name == "gkd" else []
    whole = result(taught(tmp_path, teacher, name, f"runs={tmp_path / 'whole'}", *more))
    kill_at(monkeypatch, 1, 5)
    for _ in range(2):
        with pytest.raises(Killed):
            taught(tmp_path, teacher, name, *more)
    assert result(taught(tmp_path, teacher, name, *more)) == whole


def test_stored_logits_are_computed_once_and_their_size_is_recorded(tmp_path, teacher, monkeypatch):
    done = taught(tmp_path, teacher, "top_k_logits", "loss.codec.k=8")
    facts = done.record["training"]["teacher_logits"]
    kept = list((done.folder / offline.FOLDER).iterdir())
    assert facts["bytes_per_token"] == 8 * 2 + 8 * 2 + 4  # entries, values, the rest
    windows = done.record["data"]["calibration"][0] + done.record["data"]["heldout"][0]
    assert facts["bytes"] == windows * 16 * facts["bytes_per_token"]
    assert all(path.suffix == ".npz" for path in kept)

    def never(*_, **__):
        raise AssertionError("the parts are there")

    monkeypatch.setattr(offline, "_written", never)
    kill = done.folder / "record.json"
    kill.unlink()
    assert taught(tmp_path, teacher, "top_k_logits", "loss.codec.k=8").folder == done.folder


def test_regressors_are_learned_and_not_saved(tmp_path, teacher):
    done = taught(tmp_path, teacher, "fitnets", "steps=4")
    names = done.checkpoint / "parts"
    assert not [path for path in names.iterdir() if "projection" in path.name]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["loss=jsd"], "There is no teacher to learn from"),
        (["loss=jsd", "loss.divergence.beta=1.5"], "beta=1.5 must lie between 0 and 1"),
        (["loss=forward_kl", "loss.share=2"], "share=2 must be from 0 to 1"),
    ],
)
def test_what_cannot_be_distilled_is_refused(tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        train.run(small.config(tmp_path, *settings))


def test_layers_that_cannot_be_paired_are_refused(tmp_path, teacher):
    with pytest.raises(UserError, match="student=3 must have from 1 to teacher=2 layers"):
        taught(tmp_path, teacher, "fitnets", "model.layers=3")


def test_a_prompt_longer_than_the_window_is_refused(tmp_path, teacher):
    with pytest.raises(UserError, match="prompt=17 must be from 1 to 16"):
        taught(tmp_path, teacher, "gkd", "loss.prompt=17")


def test_stored_parts_of_other_settings_are_another_run(tmp_path, teacher):
    one = taught(tmp_path, teacher, "top_k_logits", "loss.codec.k=8", "steps=2")
    other = taught(tmp_path, teacher, "top_k_logits", "loss.codec.k=4", "steps=2")
    assert one.folder != other.folder
    assert np.all([loop.STATE in [p.name for p in d.folder.iterdir()] for d in (one, other)])
    assert tiny.files(one.checkpoint) != tiny.files(other.checkpoint)
