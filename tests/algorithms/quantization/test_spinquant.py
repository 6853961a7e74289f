"""Cayley SGD against a port of the official optimizer, the manifold it keeps to, and what it finds.

The deviations are those of papers/spinquant.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import expm

from algorithms.quantization import spinquant
from algorithms.quantization.spinquant import cayley_sgd, learn_rotation
from tests.algorithms.quantization import spinquant_official as official


def orthogonal(seed, n):
    return jax.random.orthogonal(jax.random.key(seed), n)


def off(r):
    """How far R is from the manifold."""
    return float(jnp.abs(r.T @ r - jnp.eye(r.shape[0])).max())


@pytest.mark.parametrize("lr", [0.01, 1.5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_the_official_code(x64, lr, momentum):
    """Four steps without QR factorizations: small ones, and ones that 1 / ‖W‖ cuts off."""
    r = orthogonal(0, 12)
    optimizer = cayley_sgd(lr, momentum=momentum, retract=False)
    update = jax.jit(optimizer.update)
    state, expected, buffer = optimizer.init(r), np.asarray(r), np.zeros((12, 12))
    for n in range(4):
        g = jax.random.normal(jax.random.key(n + 1), (12, 12))
        updates, state = update(g, state, r)
        r = optax.apply_updates(r, updates)
        expected, buffer = official.step(expected, np.asarray(g), buffer, lr=lr, momentum=momentum)
        np.testing.assert_allclose(r, expected, atol=1e-12)
        np.testing.assert_allclose(state.momentum, buffer, atol=1e-12)


def test_the_retraction_is_the_official_one(x64):
    """Which opens a step with it; so a step of no length is the retraction alone."""
    p = orthogonal(0, 12) + jax.random.normal(jax.random.key(1), (12, 12)) / 50
    expected, _ = official.step(np.asarray(p), np.zeros((12, 12)), 0.0, lr=0.0, qr=True)
    rows = p / jnp.linalg.norm(p, axis=1, keepdims=True)
    np.testing.assert_allclose(spinquant.retraction(rows.T).T, expected, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rotations_stay_orthogonal(momentum):
    """In float32, over a hundred steps as long as they get; without retraction they drift."""
    optimizer = {keep: cayley_sgd(1.5, momentum=momentum, retract=keep) for keep in (True, False)}

    @functools.partial(jax.jit, static_argnames="keep")
    def walk(r, keep):
        def step(carry, key):
            r, state = carry
            updates, state = optimizer[keep].update(jax.random.normal(key, r.shape), state, r)
            return (optax.apply_updates(r, updates), state), None

        keys = jax.random.split(jax.random.key(1), 100)
        return jax.lax.scan(step, (r, optimizer[keep].init(r)), keys)[0][0]

    assert off(walk(orthogonal(0, 24), True)) < 1e-5
    assert off(walk(orthogonal(0, 24), False)) > 5e-5


def test_many_rounds_reach_the_cayley_transform(x64):
    """(I - αW/2)⁻¹ (I + αW/2) X, which needs no retraction."""
    r, g = orthogonal(0, 8), jax.random.normal(jax.random.key(1), (8, 8))
    optimizer = cayley_sgd(0.05, iterations=60, retract=False)
    updates, _ = optimizer.update(g, optimizer.init(r), r)
    x, v = np.asarray(r).T, -np.asarray(g).T
    w = v @ x.T - x @ (x.T @ v @ x.T) / 2
    w = w - w.T
    eye, a = np.eye(8), min(0.05, 1 / np.abs(w).sum(0).max())
    expected = np.linalg.solve(eye - a * w / 2, (eye + a * w / 2) @ x).T
    np.testing.assert_allclose(r + updates, expected, atol=1e-6)
    assert off(r + updates) < 1e-6


def target(n=8):
    """A rotation within reach of the identity: det 1."""
    skew = np.random.default_rng(0).normal(size=(n, n))
    return jnp.asarray(expm(0.3 * (skew - skew.T)), jnp.float32)


def distance(r, goal, batch):
    return jnp.sum((r - goal) ** 2) + 0 * batch


def test_it_finds_a_rotation_that_is_there():
    optimizer = cayley_sgd(optax.cosine_decay_schedule(0.2, 60))
    r, losses = learn_rotation(distance, jnp.eye(8), target(), jnp.zeros(60), optimizer)
    assert losses[0] > 1 and losses.shape == (60,)
    assert distance(r, target(), 0.0) < 1e-3 and off(r) < 1e-5


def test_a_learned_rotation_rounds_better_than_a_random_one():
    """Of activations with outliers, by the squared error of rounding them to 4 bits per token."""
    x = jax.random.normal(jax.random.key(0), (8, 32, 16)) * jnp.ones(16).at[3].set(20.0)[None, None]

    def rounded(x):
        scale = jnp.abs(x).max(-1, keepdims=True) / 7
        fixed = jax.lax.stop_gradient((scale * jnp.round(x / scale) - x) / scale)
        return x + scale * fixed  # the error grows with the range

    def loss(r, model, x):
        return jnp.mean((rounded(x @ r) @ r.T - x) ** 2)

    batches = jnp.tile(x, (10, 1, 1))
    start = orthogonal(1, 16)
    r, losses = learn_rotation(
        loss, start, None, batches, cayley_sgd(optax.cosine_decay_schedule(1.5, 80))
    )
    assert loss(r, None, x) < 0.9 * loss(start, None, x)
    again, _ = learn_rotation(
        loss, start, None, batches, cayley_sgd(optax.cosine_decay_schedule(1.5, 80))
    )
    np.testing.assert_array_equal(r, again)


def test_it_takes_a_tree_of_rotations():
    tree = {"a": orthogonal(0, 4), "b": (orthogonal(1, 6),)}
    optimizer = cayley_sgd(0.1, momentum=0.5)
    gradients = jax.tree.map(lambda r: r * 2 + 1, tree)
    updates, state = optimizer.update(gradients, optimizer.init(tree), tree)
    alone, own = optimizer.update(gradients["a"], optimizer.init(tree["a"]), tree["a"])
    np.testing.assert_allclose(updates["a"], alone, atol=1e-6)
    np.testing.assert_allclose(state.momentum["a"], own.momentum, atol=1e-6)
    assert jax.tree.structure(updates) == jax.tree.structure(state.momentum)


def test_no_gradient_is_no_step():
    r = orthogonal(0, 8)
    optimizer = cayley_sgd(1.5)
    updates, _ = optimizer.update(jnp.zeros((8, 8)), optimizer.init(r), r)
    np.testing.assert_allclose(updates, 0, atol=1e-6)


@pytest.mark.parametrize(
    "settings, sentence",
    [({"momentum": 1.0}, "momentum=1.0 must be"), ({"iterations": 0}, "iterations=0 must be")],
)
def test_bad_settings_are_sentences(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        cayley_sgd(0.1, **settings)
    optimizer = cayley_sgd(0.1)
    with pytest.raises(ValueError, match="needs the rotations themselves"):
        optimizer.update(jnp.eye(2), optimizer.init(jnp.eye(2)))


def test_the_graph_grows_neither_with_width_nor_with_steps():
    def size(n, steps):
        f = functools.partial(learn_rotation, distance, optimizer=cayley_sgd(0.1))
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, n), (n, n), (steps,))]
        return len(str(jax.make_jaxpr(f)(*shapes)).splitlines())

    assert size(4, 3) == size(16, 9)
