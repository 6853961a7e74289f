"""SET against a port of the official code; masks that stay."""

import jax
import numpy as np
import optax
import pytest

from algorithms.pruning import masks
from algorithms.pruning.set import sparse_evolutionary, static
from tests.algorithms.pruning import rigl_official, sparse

SHAPES = {"a": (12, 20), "b": (7, 9)}


def made(**settings):
    plain = dict(steps=16, every=3, stop=0.75, drop=0.3, sparsity=0.7, match=".*", seed=3)
    return sparse_evolutionary(optax.sgd(0.1, momentum=0.9), **{**plain, **settings})


def test_is_the_official_code():
    """With the same random scores; its first change is after `frequency` steps (begin)."""
    with jax.enable_x64(True):
        params = sparse.weights(SHAPES)
        start = made().init(params)
        official = {
            name: rigl_official.Sparse(
                np.asarray(w), np.asarray(start.masks.alive[name]), begin=3, end=12, frequency=3,
                drop=0.3, anneal="constant", lr=0.1, momentum=0.9,
            )
            for name, w in params.items()
        }  # fmt: skip
        moved = 0
        run = sparse.steps(made(), params, 16)
        for n, (found, alive, gradients, before, state) in enumerate(run):
            key = jax.random.fold_in(start.key, n + 1)
            for path, w in jax.tree_util.tree_leaves_with_path(params):
                name = path[0].key
                scores = jax.random.uniform(masks._key(key, path), (w.size,))
                official[name].set(np.asarray(gradients[name]), np.asarray(scores))
                theirs = official[name]
                np.testing.assert_array_equal(alive[name], theirs.mask == 1)
                np.testing.assert_allclose(found[name], theirs.mask * theirs.w, rtol=1e-12)
                trace = state.inner[0].trace[name]
                np.testing.assert_allclose(trace, theirs.accumulated, rtol=1e-12, atol=1e-15)
            moved += bool((before.masks.alive["a"] != alive["a"]).any())
        assert moved == 4


def test_growth_is_another_each_time_and_for_each_seed():
    params = sparse.weights(SHAPES)
    born = []
    for seed in (0, 1):
        for _, alive, _, before, _ in sparse.steps(made(seed=seed), params, 7):
            new = np.asarray(alive["a"] & ~before.masks.alive["a"])
            born += [new.tobytes()] if new.any() else []
    assert len(set(born)) == len(born) == 4


def test_static_masks_stay():
    params = sparse.weights(SHAPES)
    optimizer = static(optax.adam(0.1), sparsity=0.7, match=".*", seed=3)
    first = optimizer.init(params).masks.alive
    for found, alive, *_ in sparse.steps(optimizer, params, 10):
        jax.tree.map(np.testing.assert_array_equal, alive, first)
        assert int((found["a"] != 0).sum()) == int(first["a"].sum())


@pytest.mark.parametrize("name, value", [("drop", 0.0), ("stop", 2.0)])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be above 0 and at most 1"):
        made(**{name: value})
