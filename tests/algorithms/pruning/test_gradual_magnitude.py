"""Gradual magnitude pruning against a port of the official code, and pruning at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.pruning.gradual_magnitude import gradual_magnitude
from tests.algorithms.pruning import gradual_magnitude_official as official
from tests.algorithms.pruning import sparse


def made(**settings):
    plain = dict(steps=16, every=3, begin=0.1875, stop=0.75, sparsity=0.8, initial=0.2, match=".*")
    return gradual_magnitude(optax.sgd(0.1, momentum=0.9), **{**plain, **settings})


def test_is_the_official_code():
    """From step 3 to 12, every third."""
    with jax.enable_x64(True):
        params = sparse.weights({"w": (12, 20)})
        aims = [np.asarray(sparse.aims(params, n)["w"]) for n in range(16)]
        theirs = official.train(
            np.asarray(params["w"]), lambda w, n: w - aims[n], steps=16, initial=0.2, final=0.8,
            begin=3, end=12, frequency=3, lr=0.1, momentum=0.9,
        )  # fmt: skip
        for ours, (w, alive) in zip(sparse.steps(made(), params, 16), theirs, strict=True):
            np.testing.assert_array_equal(ours[1]["w"], alive == 1)
            np.testing.assert_allclose(ours[0]["w"], w, rtol=1e-12)
        assert alive.sum() == 48


def test_sparsity_rises_along_the_cube_and_weights_never_come_back():
    params = sparse.weights({"w": (20, 50)})
    dead = np.zeros((20, 50), bool)
    counts = []
    for found, alive, *_ in sparse.steps(made(begin=0.0, initial=0.0, every=1), params, 16):
        assert not (dead & np.asarray(alive["w"])).any()
        dead = np.asarray(~alive["w"])
        np.testing.assert_array_equal(found["w"][dead], 0)
        counts.append(int(dead.sum()))
    t = np.minimum(np.arange(1, 17) / 12, 1)
    np.testing.assert_allclose(counts, 1000 * (0.8 - 0.8 * (1 - t) ** 3), atol=1)
    assert counts[-1] == 800


def test_the_last_pruning_is_at_its_end_whatever_the_interval_is():
    params = sparse.weights({"w": (20, 50)})
    *_, (_, alive, *_) = sparse.steps(made(every=7), params, 16)
    assert int(alive["w"].sum()) == 200


def test_loses_less_than_pruning_at_once():
    """Of correlated inputs, the ones that are left can take over."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 40)) @ rng.normal(size=(40, 40)) / 6
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=(40, 8)), jnp.float32)

    def loss(params):
        return jnp.mean((x @ params["w"] - x @ w) ** 2)

    optimizer = gradual_magnitude(optax.adam(0.02), steps=200, every=5, sparsity=0.6, match=".*")
    params, state = sparse.begun(optimizer, {"w": w})

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(200):
        params, state = step(params, state)
    at_once = {"w": jnp.where(official.mask(np.asarray(w), 0.6) == 1, w, 0)}
    assert int((params["w"] != 0).sum()) == int((at_once["w"] != 0).sum()) == 128
    assert loss(params) < 0.5 * loss(at_once)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(begin=0.8), "begin=0.8 must be from 0 to below stop=0.75"),
        (dict(initial=0.9), "initial=0.9 must be from 0 to sparsity=0.8"),
        (dict(sparsity=1.0), "initial=0.2 must be from 0 to sparsity=1.0, below 1"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(**settings)
