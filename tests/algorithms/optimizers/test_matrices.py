"""What optimizers of matrices share."""

import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import scale_by_muon

from algorithms.optimizers.matrices import muon_dimensions, orthogonal_momentum, orthogonalize


def test_optaxs_muon_goes_elsewhere_from_the_second_step_on():
    """Else it would serve: the official code's momentum is the reason for another."""
    ours = orthogonal_momentum(coefficients="jordan")
    theirs = scale_by_muon(weight_dimension_numbers=muon_dimensions())
    kernel = jnp.zeros((6, 8))
    states = [ours.init(kernel), theirs.init(kernel)]
    apart = []
    for step in range(2):
        g = jnp.asarray(np.random.default_rng(step).normal(size=(6, 8)), jnp.float32)
        one, states[0] = ours.update(g, states[0])
        other, states[1] = theirs.update(g, states[1])
        apart.append(float(jnp.linalg.norm(one - other) / jnp.linalg.norm(one)))
    assert apart[0] < 1e-4 and apart[1] > 0.02


def test_every_leaf_is_orthogonalized():
    g = {"a": 3 * jnp.eye(4), "b": jnp.stack([jnp.eye(3), -2 * jnp.eye(3)])}
    optimizer = orthogonalize([[1.5, -0.5, 0.0]] * 20)  # Newton and Schulz's own cubic
    found, _ = optimizer.update(g, optimizer.init(g))
    np.testing.assert_allclose(found["a"], jnp.eye(4), atol=1e-5)
    np.testing.assert_allclose(found["b"], jnp.stack([jnp.eye(3), -jnp.eye(3)]), atol=1e-5)


def test_no_momentum_beyond_one():
    with pytest.raises(ValueError, match="momentum=1.0 must be at least 0 and below 1"):
        orthogonal_momentum(momentum=1.0)
