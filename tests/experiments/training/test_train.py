"""A training run from its command's side: what it leaves, what it refuses, how it goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import train
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.sources import open_source
from experiments.errors import UserError
from experiments.runs.journal import Journal
from experiments.training import loop, metrics
from experiments.training.loop import STATE
from tests.experiments import tiny
from tests.experiments.training import small


class Killed(Exception):
    """In place of SIGKILL, within one process."""


def run(folder, *more):
    return train.run(small.config(folder, *more))


def result(done):
    """What must not depend on interruptions: metrics and checkpoint, byte for byte."""
    return (done.folder / metrics.FILE).read_bytes(), tiny.files(done.checkpoint)


def kill_at(monkeypatch, *steps):
    """The loop dies when it draws the batch of one of these steps, once each."""
    left, draw = set(steps), loop.Order.draw

    def dying(self, data, step):
        if step in left:
            left.remove(step)
            raise Killed
        return draw(self, data, step)

    monkeypatch.setattr(loop.Order, "draw", dying)


def test_a_run_leaves_metrics_a_checkpoint_and_a_record(tmp_path):
    done = run(tmp_path)
    lines = metrics.read(done.folder / metrics.FILE)
    assert [line["step"] for line in lines if "train" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "heldout" in line] == [4, 8]
    record = done.record
    assert record["training"]["heldout"] == lines[-1]["heldout"]
    # the checkpoint, evaluated by protocol E on the same windows, is what was trained
    loss = record["metrics"]["perplexity"]["loss"]
    assert loss == pytest.approx(lines[-1]["heldout"]["loss"], abs=2e-6)
    source = open_source(done.checkpoint)
    assert load_model(source).config == source.config
    assert record["model"]["parameters"] > 0
    speeds = Journal(done.folder).entries("speed")
    assert [each["step"] for each in speeds] == [4, 6, 8]
    assert all(each["positions_per_second"] > 0 and each["utilization"] > 0 for each in speeds)
    assert json.loads((done.folder / "record.json").read_text())["command"] == "train"


def test_the_same_command_gives_the_finished_run_back(tmp_path):
    assert run(tmp_path).folder == run(tmp_path, "save_every=2").folder


def test_training_lowers_the_loss(tmp_path):
    lines = metrics.read(run(tmp_path, "steps=40").folder / metrics.FILE)
    held = [line["heldout"]["loss"] for line in lines if "heldout" in line]
    assert held[-1] < held[0] - 0.1


@pytest.mark.parametrize(
    "around, kills",
    [
        ([], (1, 3, 5, 6, 7)),  # before, at and after saved states
        (["dtype=bfloat16", "clip=1.0", "accumulate=2"], (1, 5)),
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, monkeypatch, around, kills):
    whole = result(run(tmp_path, f"runs={tmp_path / 'whole'}", *around))
    kill_at(monkeypatch, *kills)
    for _ in kills:
        with pytest.raises(Killed):
            run(tmp_path, *around)
    assert result(run(tmp_path, *around)) == whole


@pytest.mark.slow
def test_twenty_times_killed_it_ends_with_the_same_bytes(tmp_path):
    """By SIGKILL some steps after each start, at a random moment of whatever is under way."""
    arguments = ["experiments.train", *small.overrides(tmp_path), "steps=400", "save_every=10",
                 "evaluate_every=25", "optimizer=muon"]  # fmt: skip
    whole = tiny.command(*arguments, f"runs={tmp_path / 'whole'}", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert killed(tmp_path, arguments, int(rng.integers(1, 25)), rng.uniform(0, 0.2))
    assert tiny.command(*arguments, cwd=tmp_path).returncode == 0
    one, other = (next((tmp_path / name / "train").glob("*/seed-0")) for name in ("whole", "runs"))
    assert (one / metrics.FILE).read_bytes() == (other / metrics.FILE).read_bytes()
    assert tiny.files(one / "checkpoint") == tiny.files(other / "checkpoint")


def killed(folder, arguments, steps, wait):
    """Whether a run could be killed `wait` seconds after it had logged so many more steps."""

    def logged():
        found = list(folder.glob(f"runs/train/*/seed-0/{metrics.FILE}"))
        return found[0].read_bytes().count(b'"train"') if found else 0

    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        lines = None
        while process.poll() is None:
            going = (folder / "runs").exists() and any(folder.glob("runs/train/*/seed-0/.claim"))
            lines = logged() if lines is None and going else lines
            if lines is not None and logged() >= lines + steps // 2:  # a line every two steps
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                return process.wait() != 0
            time.sleep(0.01)
    return False


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_state(tmp_path):
    with pytest.raises(UserError) as caught:
        run(tmp_path, "optimizer=sgd", "optimizer.learning_rate=1e9", "steps=9")
    sentence = str(caught.value)
    assert "first in the gradient of" in sentence or "held-out loss is" in sentence
    assert "lower the learning rate" in sentence
    folder = next((tmp_path / "runs" / "train").glob("*/seed-0"))
    assert not (folder / "record.json").exists()
    saved = [int(p.name) for p in (folder / STATE).iterdir() if p.name.isdigit()]
    if saved:
        assert f"step {max(saved)} is kept" in sentence


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["batch=0"], "batch=0 must be from 1"),
        (["passes=1", "steps=1000"], "need more than passes=1"),
        (["accumulate=3"], "accumulate=3 must divide batch=4"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["evaluate_every=0"], "evaluate_every=0 must be at least 1"),
        (["clip=0"], "clip=0 must be positive"),
        (["trainable=nothing"], "matches no parameter"),
        (["mesh.data=2"], "are 2 devices, and there are"),
        (["loss.z_loss=-1"], "z_loss=-1 must not be negative"),
        (["optimizer=muon", "optimizer.match.others=nothing"], "No pattern of match="),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(tmp_path, settings, sentence):
    with pytest.raises(UserError) as caught:
        run(tmp_path, *settings)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    teacher = tiny.write_model(tmp_path)
    with pytest.raises(
        UserError, match="The teacher's vocabulary has 53 tokens, the student's 256"
    ):
        run(tmp_path, "model@teacher=local", f"teacher.path={teacher}")
