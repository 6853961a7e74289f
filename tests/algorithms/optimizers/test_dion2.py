"""Dion2 against a port of the official code, its theory, Muon and gradient descent."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.dion2 import Dion2State, dion2, scale_by_dion2
from algorithms.optimizers.matrices import orthogonal_momentum
from tests.algorithms.optimizers import dion2_official as official
from tests.algorithms.optimizers import trajectories
from tests.algorithms.optimizers.trajectories import SHAPES, STEPS, gradient, run, start

FIRST, *REST = official.POLAR_EXPRESS
STEPS_OF_THEIRS = [
    [c / official.ROOM**power for c, power in zip(FIRST, (1, 3, 5), strict=True)],
    *REST,
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])
def test_steps_are_the_official_codes(x64, shape, fraction):
    w = start(shape)
    settings = dict(fraction=fraction, weight_decay=0.1)
    found = run(dion2(0.02, momentum=0.9, coefficients=STEPS_OF_THEIRS, **settings), w)
    expected = official.dion2(w, gradient, STEPS, lr=0.02, ef_decay=0.9, **settings)
    # Their epsilon is 1e-8 beside a norm of ours of 1e-7, on momenta of norm above one
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_the_whole_matrix_is_muon(x64):
    """Without Nesterov's look ahead, and all of whose factor √(out/in)."""
    muon = optax.chain(orthogonal_momentum(nesterov=False), optax.scale_by_learning_rate(0.02))
    found = run(dion2(0.02 / np.sqrt(6 / 10), fraction=1.0, weight_decay=0.0), start((6, 10)))
    np.testing.assert_allclose(found, run(muon, start((6, 10))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 16), (16, 6), (3, 16, 6)])
def test_the_largest_slices_of_the_shorter_side_move_orthogonally(shape):
    """And what does not move is not forgotten: M decays in those slices alone."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    optimizer = scale_by_dion2(fraction=0.3, momentum=0.5)
    direction, state = optimizer.update(g, optimizer.init(g), g)
    if shape[-1] == 6:
        direction, kept, g = (jnp.swapaxes(x, -1, -2) for x in (direction, state.momentum, g))
        scale = np.sqrt(6 / 16)
    else:
        kept, scale = state.momentum, np.sqrt(16 / 6)
    direction, kept, g = (np.asarray(x).reshape(-1, 6, 16) for x in (direction, kept, g))
    for u, m, before in zip(direction, kept, g, strict=True):
        moved = np.abs(u).sum(1) > 0
        assert moved.sum() == 2  # ⌈0.3 · 6⌉
        assert np.abs(before).sum(1)[moved].min() > np.abs(before).sum(1)[~moved].max()
        values = np.linalg.svd(u[moved] / scale, compute_uv=False)
        assert 0.84 < values.min() and values.max() < 1.13
        np.testing.assert_allclose(m, before * np.where(moved, 0.5, 1.0)[:, None])


def test_every_slice_has_its_turn():
    """Of one gradient again and again, small rows too: that is what error feedback is for."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=(8, 24)), jnp.float32)
    g = g * jnp.geomspace(1, 0.1, 8)[:, None]
    optimizer = scale_by_dion2(fraction=0.25, momentum=0.5)
    state, moved = optimizer.init(g), np.zeros(8)
    for _ in range(60):
        direction, state = optimizer.update(g, state, g)
        moved += np.abs(direction).sum(1) > 0
    assert moved.min() > 0


def test_the_gradients_scale_does_not_matter(x64):
    once, scaled = (run(dion2(0.02), start((6, 10)), scale=scale) for scale in (1.0, 1e3))
    np.testing.assert_allclose(once, scaled, rtol=1e-6, atol=1e-6)


def test_bfloat16_parameters_have_bfloat16_updates_and_momenta():
    kernel = jnp.ones((4, 6), jnp.bfloat16)
    optimizer = dion2(0.02)
    updates, state = optimizer.update(kernel, optimizer.init(kernel), kernel)
    assert isinstance(state[0], Dion2State)
    assert updates.dtype == state[0].momentum.dtype == jnp.bfloat16


def test_it_gets_lower_than_what_costs_as_much_or_forgets():
    """A quarter of W for 400 steps; Muon for 100, and a choice by gradients alone for 400."""
    loss, w = trajectories.ill_conditioned()

    def lost(scale, steps):
        rate = optax.linear_schedule(0.5, 0.0, steps)
        return trajectories.descend(
            optax.chain(scale, optax.scale_by_learning_rate(rate)), w, loss, steps
        )

    ours = scale_by_dion2(fraction=0.25, momentum=0.8)
    forgetful = optax.stateless(lambda g, _: ours.update(g, ours.init(g))[0])
    assert lost(ours, 400) < 0.2 * lost(orthogonal_momentum(nesterov=False), 100)
    assert lost(ours, 400) < 0.5 * lost(forgetful, 400)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(fraction=0.0), "fraction=0.0 must be above 0 and at most 1"),
        (dict(fraction=1.5), "fraction=1.5 must be above 0 and at most 1"),
        (dict(momentum=1.0), "momentum=1.0 must be at least 0 and below 1"),
        (dict(coefficients="svd"), "coefficients='svd' must be"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        dion2(0.02, **settings)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"dion2 moves matrices alone, and bias has shape \(3,\)"):
        dion2(0.02).init({"bias": jnp.zeros(3)})
