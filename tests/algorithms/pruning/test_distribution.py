"""Numbers of weights against a port of the official code."""

import numpy as np
import pytest

from algorithms.pruning.distribution import distributed, erk_densities
from tests.algorithms.pruning.rigl_official import erdos_renyi

SHAPES = {"q": (64, 64), "k": (64, 16), "up": (64, 256), "down": (256, 64), "small": (4, 3)}


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_erk_is_the_official_code(sparsity):
    assert distributed(sparsity, "erk")(SHAPES) == erdos_renyi(SHAPES, sparsity)


def test_a_batch_of_matrices_is_as_many_layers():
    alone = {f"experts.{n}": (16, 24) for n in range(5)} | {"q": (32, 32)}
    found = distributed(0.8, "erk")({"experts": (5, 16, 24), "q": (32, 32)})
    assert found == {"experts": erdos_renyi(alone, 0.8)["experts.0"],
                     "q": erdos_renyi(alone, 0.8)["q"]}  # fmt: skip


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_erk_has_as_many_weights_as_uniform(sparsity):
    totals = [sum(distributed(sparsity, kind)(SHAPES).values()) for kind in ("erk", "uniform")]
    assert abs(totals[0] - totals[1]) <= len(SHAPES)
    assert erk_densities(SHAPES, sparsity)["small"] == 1.0  # ε would be above one


def test_uniform_rounds_to_more_weights():
    assert distributed(0.7, "uniform")({"a": (3, 3)}) == {"a": 9 - int(np.floor(0.7 * 9))}
    assert distributed(0.0, "erk")({"a": (3, 3)}) == {"a": 9}
