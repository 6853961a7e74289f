"""What is measured of training, in small: the numbers mean what their names say."""

import math

import numpy as np
import pytest

from experiments.benchmark_report import markdown
from experiments.measurements.optimizers import optimizers
from experiments.measurements.teacher_logits import teacher_logits
from experiments.measurements.training import optimizer_costs, trainer
from experiments.measurements.widths import widths
from experiments.training import race
from tests.experiments import tiny
from tests.experiments.test_benchmark_report import MACHINE
from tests.experiments.training import small


def settings(folder):
    return [o for o in small.overrides(folder) if not o.startswith("runs=")]


def test_a_race_runs_the_best_of_what_it_tried(tmp_path):
    asked = {
        "race": {
            "settings": [*settings(tmp_path), "steps=4", "evaluate_every=2"],
            "optimizers": ["adamw", "sgd"],
            "factors": [0.5, 4.0],
            "tuning_seed": 3,
            "seeds": [0, 1],
        },
        "runs": str(tmp_path / "runs"),
    }
    rows = optimizers(asked)
    assert [row["optimizer"] for row in rows] == ["adamw", "sgd"]
    for row in rows:
        assert row["factor"] == min(row["tried"], key=lambda found: found[1])[0]
        assert not row["inside"]  # of two, each is an edge
        assert [found["seed"] for found in row["finals"]] == [0, 1]
        assert [step for step, _ in row["finals"][0]["curve"]] == [2, 4]
    runs = list((tmp_path / "runs/train").glob("*/seed-*/record.json"))
    assert len(runs) == 2 * (2 + 2)
    again = optimizers(asked)  # given back: times too
    assert again == rows
    assert len(race.table(rows)) == 3


def test_the_trainer_is_compared_with_bare_steps(tmp_path):
    asked = {"run": [*settings(tmp_path), "evaluate_every=null"], "turns": 1}
    found = trainer({"trainer": asked}, tmp_path / "costs")
    assert found["compilations"] == 1
    assert math.isfinite(found["overhead"]) and found["memory"]["temporaries"] > 0
    assert "| 1 |" in markdown(dict(results={"trainer": found}, **MACHINE), "trainer")


def test_an_optimizers_state_is_counted():
    asked = {"optimizer_costs": {"optimizers": ["adamw", "sgd"], "turns": 1}}
    adamw, sgd = optimizer_costs(asked)
    assert adamw["state_bytes_per_parameter"] == pytest.approx(8, rel=1e-4)
    assert sgd["state_bytes_per_parameter"] < 8


def test_what_is_lost_falls_with_what_is_kept(tmp_path):
    source = tiny.model(tmp_path)
    text = [o for o in tiny.overrides(tmp_path) if o.startswith("data")]
    codecs = [{"k": 4, "values": "float32"}, {"k": 16, "values": "float32"}, {"k": 16}]
    vocabulary = source.config.vocabulary
    codecs.append({"k": vocabulary, "values": "float32"})
    found = teacher_logits({"teacher_logits": {"data": text, "codecs": codecs}}, source)
    few, more, rounded, everything = found["rows"]
    assert few["kl"] > more["kl"] > 0 and few["kept"] < more["kept"] < 1
    assert rounded["kl"] >= more["kl"] * 0.999 and rounded["kept"] == more["kept"]
    assert everything["kl"] == pytest.approx(0, abs=1e-6)
    assert everything["kept"] == pytest.approx(1, abs=1e-5)
    assert few["bytes_per_token"] == 4 * 2 + 4 * 4 + 4
    assert "| 4 | float32 | 28 |" in markdown(
        dict(results={"teacher_logits": found}, **MACHINE), "teacher_logits"
    )


@pytest.mark.slow
def test_widths_are_those_of_both_parametrizations(tmp_path):
    run = [o for o in settings(tmp_path) if not o.startswith(("model.hidden", "model.head_size"))]
    asked = {"run": run, "base": {"hidden": 16, "head_size": 8}, "widths": [16, 32], "seeds": [0],
             "steps": 2}  # fmt: skip
    found = widths({"widths": asked})
    standard, mup = (found["parametrizations"][name] for name in ("standard", "muP"))
    assert list(standard) == ["blocks.0", "logits"]
    for name in standard:  # the base is the same model in both, trained alike
        np.testing.assert_allclose(standard[name]["sizes"][0], mup[name]["sizes"][0], rtol=1e-5)
    assert mup["logits"]["powers"][0] < standard["logits"]["powers"][0]
    shown = markdown(dict(results={"widths": found}, **MACHINE), "widths")
    assert "| muP | logits |" in shown and "16 wide" in shown
