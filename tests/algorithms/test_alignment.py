"""Neurons aligned as the official code does; permuted networks come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.alignment import align_layers, align_neurons, squared_distances
from tests.algorithms import otfusion_official as official
from tests.algorithms.test_clustering import equations


def network(widths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(o, i)) / np.sqrt(i) for i, o in zip(widths, widths[1:], strict=False)]


def permuted(layers, seed=1):
    """The same function, its hidden neurons in another order."""
    rng, before, found = np.random.default_rng(seed), None, []
    for number, w in enumerate(layers):
        w = w if before is None else w[:, before]
        if number < len(layers) - 1:
            before = rng.permutation(len(w))
            w = w[before]
        found.append(w)
    return found


def run(layers, x):
    for w in layers[:-1]:
        x = np.maximum(w @ x, 0)
    return layers[-1] @ x


def arrays(layers):
    return [jnp.asarray(w) for w in layers]


@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_layers_are_the_official_codes(x64, epsilon):
    ours, theirs = network((6, 8, 8, 3)), network((6, 8, 8, 3), seed=5)
    found = align_layers(arrays(ours), arrays(theirs), epsilon=epsilon)
    for mine, expected in zip(found, official.aligned(theirs, ours, epsilon), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-10 if epsilon is None else 2e-3)


@pytest.mark.parametrize("epsilon", [None, 1e-3])
@pytest.mark.some(1)
def test_a_permutation_is_undone(x64, epsilon):
    ours = network((6, 8, 8, 3))
    found = align_layers(arrays(ours), arrays(permuted(ours)), epsilon=epsilon)
    for mine, expected in zip(found, ours, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-9)


def test_aligned_networks_average_better_than_as_they_are(x64):
    """Of one network and a permuted, slightly different copy."""
    rng, ours = np.random.default_rng(2), network((6, 8, 8, 3))
    theirs = [w + 0.02 * rng.normal(size=w.shape) for w in permuted(ours)]
    x = rng.normal(size=(6, 200))
    fused = align_layers(arrays(ours), arrays(theirs))

    def off(layers):
        mean = [(a + b) / 2 for a, b in zip(ours, layers, strict=True)]
        return np.linalg.norm(run(mean, x) - run(ours, x))

    assert off([np.asarray(w) for w in fused]) < 0.2 * off(theirs)


def test_wider_networks_come_to_the_others_width(x64):
    """Each neuron twice: averages of them are the neurons, and what reads them adds up."""
    ours = network((6, 5, 3))
    twice = [np.repeat(ours[0], 2, 0), np.repeat(ours[1], 2, 1)]
    found = align_layers(arrays(ours), arrays(twice), epsilon=1e-3)
    for mine, expected in zip(found, ours, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-6)


def test_rows_are_averages_with_gradients(x64):
    x, y = (jnp.asarray(w) for w in (network((4, 6))[0], network((4, 9), seed=3)[0]))
    found = jax.jit(lambda x: align_neurons(x, y, epsilon=0.1))(x)
    np.testing.assert_allclose(np.asarray(found).sum(1), 1, rtol=1e-9)
    loss = lambda x: jnp.sum(align_neurons(x, y, epsilon=0.1) ** 2)  # noqa: E731
    gradient = np.asarray(jax.jit(jax.grad(loss))(x))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3


def test_equal_neurons_are_anyones():
    zeros = jnp.zeros((8, 6))
    np.testing.assert_allclose(
        align_neurons(zeros, zeros, epsilon=0.1), np.full((8, 8), 1 / 8), rtol=1e-5
    )
    np.testing.assert_array_equal(squared_distances(zeros + 1e4, zeros + 1e4), 0)


@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_the_graph_does_not_grow(epsilon):
    def size(n):
        run = lambda x, y: align_neurons(x, y, epsilon=epsilon)  # noqa: E731
        return equations(jax.make_jaxpr(run)(jnp.ones((n, 4)), jnp.ones((n, 4))).jaxpr)

    assert size(8) == size(64) < 300


def test_refuses_what_cannot_be_aligned():
    with pytest.raises(ValueError, match=r"x.shape=\(2, 3\) and y.shape=\(2, 4\) must have"):
        align_neurons(jnp.ones((2, 3)), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="give an epsilon such as"):
        align_neurons(jnp.ones((2, 3)), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="as many layers, not 1 and 0"):
        align_layers([jnp.ones((2, 3))], [])
