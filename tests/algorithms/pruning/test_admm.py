"""ADMM against a port of the official code, and what least squares says."""

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.pruning.admm import ADMMConfig, admm, reconstructed
from algorithms.pruning.magnitude import magnitude
from algorithms.pruning.patterns import Pattern
from algorithms.pruning.sparsegpt import sparsegpt
from algorithms.pruning.wanda import wanda
from algorithms.tensors import BlockSparseTensor
from tests.algorithms.pruning import admm_official as official
from tests.algorithms.pruning.test_one_shot import compressed, layer, loss

TWO = {"keep": 2, "block": 4}


@pytest.mark.parametrize("settings, port", [
    ({}, {}),
    ({"sparsity": 0.7, "steps": 8, "gradual_steps": 5, "damping": 0.02},
     {"sparsity": 0.7, "iters": 8, "iterative_prune": 5, "percdamp": 0.02}),
    ({"gradual_steps": 0}, {"iterative_prune": 0}),
    (TWO, {"prune_n": 2}),
    ({**TWO, "gradual_steps": 0}, {"prune_n": 2, "iterative_prune": 0}),
], ids=["layer", "70", "once", "2:4", "2:4 once"])  # fmt: skip
@pytest.mark.some(3)
def test_it_is_the_official_code(x64, settings, port):
    w, x = layer()
    expected = official.admm(w, x.T @ x, **port)
    tensor = compressed(admm(dtype="float64", **settings), w, x)
    assert isinstance(tensor, BlockSparseTensor) is ("keep" in settings)
    found = np.asarray(tensor.dequantize())
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # its norms are 1e-8 longer


def best(w, h, mask):
    """Each row by least squares on its own inputs."""
    found = np.zeros_like(w)
    for row, alive in enumerate(mask):
        own = h[np.ix_(alive, alive)]
        found[row, alive] = np.linalg.solve(own, h[alive] @ w[row])
    return found


def test_it_comes_to_the_best_that_a_mask_allows(x64):
    """And is better than SparseGPT with SparseGPT's own mask after 20 steps."""
    w, x = layer(3, o=6, i=12)
    h = x.T @ x
    theirs = compressed(sparsegpt(damping=0.0, dtype="float64"), w, x)
    mask = np.asarray(theirs.alive())
    optimum = best(w, h, mask)

    def found(steps, damping=0.0):
        config = ADMMConfig(steps=steps, gradual_steps=0, damping=damping)
        return np.asarray(reconstructed(jnp.asarray(w), jnp.asarray(h), jnp.asarray(mask), config))

    np.testing.assert_allclose(found(200), optimum, atol=1e-6)
    lowest, sparse = loss(w, optimum, x), loss(w, theirs.dequantize(), x)
    start, soon = (loss(w, found(steps), x) for steps in (0, 20))
    assert lowest < soon < 1.01 * lowest < start and soon < 0.9 * sparse
    damped = loss(w, found(200, damping=0.1), x)  # another optimum, nearer to W
    assert lowest < damped < sparse


@pytest.mark.parametrize("pattern", [{}, TWO], ids=str)
def test_it_knows_more_than_those_before(pattern):
    w, x = layer(5)
    losses = [
        loss(w, compressed(method, jnp.float32(w), x).dequantize(), x)
        for method in (
            admm(**pattern), sparsegpt(**pattern), wanda(**pattern), magnitude(**pattern)
        )
    ]  # fmt: skip
    assert losses[0] < losses[1] and losses[0] < 0.7 * losses[2] < losses[3]


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.3}, {"keep": 1, "block": 3}, {"sparsity": 0.0}]
)
def test_so_many_are_left(settings):
    w, x = layer(6, o=5, i=9)
    x[:, 4] = 0
    tensor = compressed(admm(**settings), jnp.float32(w), x)
    found = np.asarray(tensor.dequantize())
    assert np.isfinite(found).all() and not found[:, 4].any()
    expected = 15 if "keep" in settings else 45 - int(45 * settings["sparsity"])
    assert int(tensor.alive().sum()) == expected


def test_more_and_more_go():
    config = ADMMConfig(pattern=Pattern(sparsity=0.5), gradual_steps=4, steps=4)
    np.testing.assert_array_equal(config.kept(1000), [711, 563, 508, 500])
    assert admm(gradual_steps=0, **TWO).stacked and not admm(**TWO).stacked


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"gradual_steps": 21}, "gradual_steps=21 must be from 0 to steps=20"),
        ({"steps": -1, "gradual_steps": 0}, "gradual_steps=0 must be from 0 to steps=-1"),
        ({"damping": -0.1}, "damping=-0.1 must not be negative"),
        ({"penalty": 0.0}, "penalty=0.0 must be positive"),
        ({"sparsity": 1.0}, "sparsity=1.0 must be from 0 to below 1"),
    ],
)
def test_settings_outside_their_ranges_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        admm(**settings)


def test_blocks_that_do_not_divide_a_row_are_refused():
    w, x = layer(7, o=4, i=10)
    with pytest.raises(ValueError, match="block=4 must divide the input dimension of w"):
        compressed(admm(**TWO), jnp.float32(w), x)
