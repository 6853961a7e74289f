"""Layers' own sparsities: ports of official codes, what they keep, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.channel_norms import NormStats
from algorithms.search import global_threshold
from algorithms.search import lamp as lamp_of
from algorithms.search.global_magnitude import global_magnitude
from algorithms.search.lamp import lamp
from algorithms.search.owl import owl


def blocks(seed=0):
    """Three blocks of two layers, each with some channels that are far larger than the rest."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(3):
        weights = [rng.normal(size=(8, 10)), rng.normal(size=(6, 10))]
        squares = [np.exp(rng.normal(size=10) * (1 + number)) for _ in weights]
        found.append((weights, squares))
    return found


def official_owl(blocks, sparsity, m, lam):
    """lib/prune_all.py of luuyin/OWL at dddb7a4bffe2 (MIT): percentages, then densities."""
    ratios = []
    for weights, squares in blocks:
        metric = np.concatenate(
            [(np.abs(w) * np.sqrt(s)[None]).ravel() for w, s in zip(weights, squares, strict=True)]
        )
        ratios.append(sum(value > metric.mean() * m for value in metric) / metric.size * 100)
    ratios = np.array(ratios)
    ratios = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * lam * 2)
    densities = ratios - ratios.mean() + (1 - sparsity)
    return np.array([0.01 if 1 - density <= 0 else 1 - density for density in densities])


def allocated(method, units, sparsity):
    measures = [
        method.measure([jnp.asarray(w) for w in weights], stats) for weights, stats in units
    ]
    sizes = np.array([sum(w.size for w in weights) for weights, _ in units])
    return np.asarray(method.allocate(np.stack([np.asarray(m) for m in measures]), sizes, sparsity))


def with_norms(blocks):
    return [(weights, [NormStats(jnp.asarray(s)) for s in squares]) for weights, squares in blocks]


@pytest.mark.parametrize("sparsity, deviation", [(0.7, 0.08), (0.03, 0.08)])
def test_owl_is_the_official_code(x64, sparsity, deviation):
    """A block that would lose nothing loses a hundredth, there and here."""
    found = allocated(owl(threshold=2.0, deviation=deviation), with_norms(blocks()), sparsity)
    expected = official_owl(blocks(), sparsity, 2.0, deviation)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (found == 0.01).any() == (sparsity == 0.03)


def test_owl_spans_twice_the_deviation_around_the_mean(x64):
    found = allocated(owl(threshold=2.0), with_norms(blocks()), 0.7)
    assert found.max() - found.min() == pytest.approx(0.16)
    assert found.mean() == pytest.approx(0.7)
    alike = with_norms(blocks()[:1] * 2)
    np.testing.assert_array_equal(allocated(owl(), alike, 0.7), [0.7, 0.7])
    uniform = allocated(owl(threshold=2.0, deviation=0), with_norms(blocks()), 0.7)
    np.testing.assert_allclose(uniform, 0.7)


def test_owl_does_not_depend_on_how_activations_are_scaled(x64):
    scaled = [(w, [100 * s for s in squares]) for w, squares in blocks()]
    first, second = (allocated(owl(), with_norms(b), 0.7) for b in (blocks(), scaled))
    np.testing.assert_array_equal(first, second)


def layers(seed=0):
    rng = np.random.default_rng(seed)
    shapes, scales = [(40, 60), (30, 20), (50, 50)], [1.0, 0.3, 2.0]
    return [([s * rng.normal(size=shape)], [None]) for s, shape in zip(scales, shapes, strict=True)]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_global_magnitude_is_one_sort_of_all_weights(sparsity):
    units = layers()
    everything = np.sort(np.concatenate([np.abs(w[0]).ravel() for w, _ in units]))
    threshold = everything[int(sparsity * everything.size)]
    expected = [np.mean(np.abs(w[0]) < threshold) for w, _ in units]
    found = allocated(global_magnitude(), units, sparsity)
    np.testing.assert_allclose(found, expected, atol=3e-3)
    sizes = [w[0].size for w, _ in units]
    assert np.average(found, weights=sizes) == pytest.approx(sparsity, abs=1e-6)


def official_lamp(weights, sparsity):
    """tools/pruners.py of jaeho-lee/layer-adaptive-sparsity at f9fa4f3c6c53 (MIT): a score for each
    weight, one sort of all, and what is left of each layer.
    """
    scores = []
    for w in weights:
        squares = np.sort(w.ravel() ** 2)
        rest = squares.sum() - np.concatenate([[0.0], np.cumsum(squares)[:-1]])
        scores.append(squares / rest)
    everything = np.sort(np.concatenate(scores))
    threshold = everything[int(sparsity * everything.size)]
    return [np.mean(score < threshold) for score in scores]


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_lamp_is_the_official_code(sparsity):
    expected = official_lamp([w[0] for w, _ in layers()], sparsity)
    np.testing.assert_allclose(allocated(lamp(), layers(), sparsity), expected, atol=3e-3)


def test_lamp_knows_no_scale_and_leaves_no_layer_empty():
    """Which is where a threshold on sizes fails: a layer of small weights goes whole."""
    units = layers()
    small = [units[0], ([1e-4 * units[1][0][0]], [None]), units[2]]
    np.testing.assert_allclose(*(allocated(lamp(), u, 0.8) for u in (units, small)), atol=1e-3)
    assert allocated(global_magnitude(), small, 0.8)[1] == 1.0
    assert float(lamp_of.scores(jnp.asarray(units[0][0][0]))[-1]) == 1.0
    assert not lamp_of.scores(jnp.zeros((3, 4))).any()


def test_counts_hold_every_score():
    x = jnp.asarray([0.0, 1e-30, 0.5, 1.0, 3e38])
    found = global_threshold.counts(x)
    assert found.sum() == 5 and found[0] == 1


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"deviation": 0.5}, {"deviation": -0.1}])
def test_what_owl_cannot_take_is_refused(settings):
    with pytest.raises(ValueError, match="must be"):
        owl(**settings)


def test_a_block_without_weights_is_refused(x64):
    with pytest.raises(ValueError, match="leaves a block without weights"):
        allocated(owl(threshold=2.0, deviation=0.2), with_norms(blocks()), 0.9)
