"""The race's table and picture: who wins, by how much, when the target was reached."""

import math

import pytest

from experiments import plots
from experiments.training import race


def row(name, *losses, factor=1.0, inside=True):
    curves = [[[10, loss + 1.0], [20, loss]] for loss in losses]
    finals = [
        {"seed": n, "loss": loss, "curve": curve}
        for n, (loss, curve) in enumerate(zip(losses, curves, strict=True))
    ]
    return {"optimizer": name, "tried": [], "factor": factor, "inside": inside, "finals": finals}


ROWS = [row("adamw", 2.0, 2.1, 2.2), row("muon", 1.8, 1.9, 2.0, factor=2, inside=False)]


def test_the_best_is_first_and_compared_with_the_baseline_seed_by_seed():
    head, first, second = race.table(ROWS)
    assert head[4] == "steps to 2.100"
    assert [first[0], second[0]] == ["muon", "adamw"]
    assert first[1] == "2 (edge)"
    assert first[2].startswith("1.9000 ± ")
    assert first[3] == "-0.2000 ± 0.0000"
    assert second[3] == "–"


def test_steps_are_those_of_straight_lines_between_evaluations():
    assert race.steps_to([[10, 3.0], [20, 2.0]], 2.5) == 15
    assert race.steps_to([[10, 2.0], [20, 1.0]], 2.5) == 10
    assert race.steps_to([[10, 3.0], [20, 2.6]], 2.5) == math.inf
    assert race.steps_to([], 2.5) == math.inf


def test_who_does_not_get_there_has_no_steps():
    assert race.table([*ROWS, row("sgd", 3.0, 3.1, 3.2)])[-1][4:] == ["not reached", "–"]


def test_the_picture_says_what_it_was_drawn_from(tmp_path):
    path = race.picture(ROWS, tmp_path / "race.png")
    assert plots.drawn_from(path) == race.digest(ROWS)
    assert race.digest(ROWS) != race.digest(ROWS[:1])
    assert race.target_of(ROWS) == pytest.approx(2.1)
