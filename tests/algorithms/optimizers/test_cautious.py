"""Cautious updates and decay against ports, their promises, and AdamW's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.cautious import (
    adamw_cautious,
    adamw_cautious_decay,
    add_cautious_decayed_weights,
    agreeing,
    cautious,
)
from tests.algorithms.optimizers import cautious_official as official
from tests.algorithms.optimizers.walks import draw, same, walk

SHAPES = {"matrix": (6, 4), "vector": (5,)}


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (adamw_cautious, official.CautiousAdamW),
        (adamw_cautious_decay, official.CautiousDecayAdamW),
    ],
)
def test_is_the_port(x64, ours, theirs):
    params, gradients = draw(SHAPES, 20)
    optimizer = ours(1e-2, b1=0.9, b2=0.99, weight_decay=0.1)
    ports = {name: theirs(p, lr=1e-2, wd=0.1) for name, p in params.items()}
    expected = [{name: ports[name].step(g[name]) for name in SHAPES} for g in gradients]
    same(walk(optimizer, params, gradients)[0], expected)


def test_no_element_goes_uphill():
    """After the gradient turns, Adam goes on uphill for a while; this waits."""
    g = jnp.asarray(np.random.default_rng(0).normal(size=(20, 8)), jnp.float32)
    for direction, downhill in (
        (optax.scale_by_adam(), False),
        (cautious(optax.scale_by_adam()), True),
    ):
        state = direction.init(g)
        for _ in range(5):
            _, state = direction.update(g, state)
        u, _ = direction.update(-0.5 * g, state)
        assert bool(jnp.all(u * (-0.5 * g) >= 0)) == downhill
        assert bool(jnp.sum(u * (-0.5 * g)) >= 0) == downhill


def test_where_all_agrees_it_is_the_direction():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(20, 8)), jnp.float32)
    np.testing.assert_array_equal(agreeing(3 * g, g), 3 * g)


def test_the_rest_grows_by_the_share_of_each_matrix():
    g = jnp.ones((2, 4, 5))
    u = g.at[0, :2].multiply(-1)  # half of the first disagrees
    found = agreeing(u, g)
    assert (found[0, :2] == 0).all() and (found[0, 2:] == 2).all() and (found[1] == 1).all()
    none = agreeing(-g, g)
    assert (none == 0).all()


def settled(decay):
    """Where SGD of (x - 1)² / 2 with a decay of 0.1 comes to rest, as the distance from 1."""
    optimizer = optax.chain(decay, optax.sgd(1e-2))
    steps, _ = walk(optimizer, {"x": np.array([3.0])}, [lambda p: {"x": p["x"] - 1}] * 1500)
    return abs(float(steps[-1]["x"][0]) - 1)


def test_the_minimum_stays_where_it_is():
    """Plain decay of λ moves it to 1 / (1 + λ)."""
    assert settled(add_cautious_decayed_weights(0.1)) < 2e-3
    assert settled(optax.add_decayed_weights(0.1)) == pytest.approx(1 - 1 / 1.1, rel=1e-3)


def test_what_is_masked_is_left_alone_and_parameters_are_asked_for():
    decay = add_cautious_decayed_weights(0.1)
    masked = {"a": jnp.ones(3), "b": optax.MaskedNode()}
    found, _ = decay.update(masked, decay.init(masked), masked)
    assert jax.tree.structure(found) == jax.tree.structure(masked)
    with pytest.raises(ValueError, match="params=None must be the parameters"):
        decay.update(masked, decay.init(masked))
