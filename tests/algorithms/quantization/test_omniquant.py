"""OmniQuant's learnable weight clipping against a port of the official code, and rounding.

The deviations are those of papers/omniquant.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms import blockwise, formats
from algorithms.blockwise import learn_block
from algorithms.formats import integer
from algorithms.quantization.omniquant import Parameters, omniquant, quantize_weight
from tests.algorithms.integers import rtn
from tests.algorithms.learning import PATHS, block, flows, layerwise_error, output_error, through
from tests.algorithms.quantization import omniquant_official as official


def layer(seed=0, o=5, i=24, n=40):
    """W [o, i], whose groups of 8 have both signs (deviation 2), correlated X [n, i], and X Wᵀ."""
    rng = np.random.default_rng(seed)
    w, x = rng.normal(size=(o, i)), rng.normal(size=(n, i)) @ rng.normal(size=(i, i))
    w[:, ::8], w[:, 1::8] = -np.abs(w[:, ::8]), np.abs(w[:, 1::8])
    return w, x, x @ w.T


def ours(factors, w):
    """The official factors as our tables [o, g]."""
    up, low = (jnp.asarray(table.reshape(len(w), -1)) for table in factors)
    return Parameters(low, up)


def exact(bits):
    return integer(bits=bits, group_size=8, scale_dtype=None)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounds_as_the_official_code(x64, bits):
    w, *_ = layer(bits)
    rng = np.random.default_rng(1)
    p = official.Factors(*(rng.normal(size=15) * 2 for _ in range(2)))
    expected = official.forward(w.reshape(-1, 8), p, bits)
    found = quantize_weight(jnp.asarray(w), ours(p, w), exact(bits))
    np.testing.assert_array_equal(found.codes.reshape(-1, 8), expected.codes)
    np.testing.assert_array_equal(found.grid.zero.ravel(), expected.zero)
    np.testing.assert_allclose(found.dense.reshape(-1, 8), expected.dense, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 4])
def test_takes_the_official_steps(x64, bits):
    """Factors and gradients at every step; ε as there, which is deviation 4."""
    w, x, y = layer(bits)
    expected = official.tune(w, x, y, group_size=8, bits=bits, steps=8, lr=0.3)
    method = omniquant(format=exact(bits))._replace(optimizer=optax.adamw(0.3, weight_decay=0.0))
    w, x, y = map(jnp.asarray, (w, x, y))

    def loss(p):
        return jnp.mean((x @ method.approximate(w, p).T - y) ** 2)

    p = method.init(w)
    state = method.optimizer.init(p)
    step = jax.jit(lambda g, state, p: blockwise._update(method, g, state, p))
    for factors, slopes in expected:
        gradient = jax.grad(loss)(p)
        for mine, theirs in zip(p, ours(factors, w), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-9)
        for mine, theirs in zip(gradient, ours(slopes, w), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-7 * np.abs(theirs).max())
        p, state = step(gradient, state, p)


def test_the_optimizer_is_adamw_whatever_the_size_of_the_loss():
    """Deviation 4: a relative loss has small gradients, which an ε of 1e-8 would swallow."""
    method = omniquant(learning_rate=0.1)
    p = method.init(jnp.ones((1, 64)))
    for size in (1.0, 1e-12):
        gradient = Parameters(jnp.full((1, 1), size), jnp.full((1, 1), -size))
        moved, _ = blockwise._update(method, gradient, method.optimizer.init(p), p)
        np.testing.assert_allclose(moved.low, 3.9, rtol=1e-3)
        np.testing.assert_allclose(moved.high, 4.1, rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.some(1)
def test_leaves_less_error_in_the_blocks_output_than_rounding(bits):
    grid = dict(bits=bits, group_size=None)
    inputs = flows()
    method = omniquant(format=integer(**grid), steps=100, batch=3)
    tensors, loss = learn_block(
        block(), inputs, through(block(), inputs), dict.fromkeys(PATHS, method), jax.random.key(0)
    )
    assert loss.last < 0.9 * loss.first
    assert output_error(tensors) < 0.9 * layerwise_error(rtn(**grid))


@pytest.mark.parametrize("format", [formats.nf4(group_size=8), formats.nvfp4(group_size=8)])
def test_clips_ranges_of_any_element(format):
    inputs = flows()
    targets = through(block(), inputs)
    methods = {"mlp.down": omniquant(format=format, steps=30, batch=3)}
    _, loss = learn_block(block(), inputs, targets, methods, jax.random.key(0))
    assert loss.last < loss.first


def test_begins_at_ranges_clipped_by_two_percent():
    w = jnp.asarray(layer(3)[0], jnp.float32)
    clipped = omniquant(format=exact(8)).compress(w).scale
    np.testing.assert_allclose(clipped, 0.98201 * exact(8).fit(w).scale, rtol=1e-4)


def test_zeros_stay_zeros():
    w = jnp.asarray(layer(4)[0], jnp.float32).at[3].set(0)
    method = omniquant(format=integer(bits=3, group_size=8))
    gradient = jax.grad(lambda p: jnp.sum(method.approximate(w, p) ** 2))(method.init(w))
    assert all(jnp.isfinite(part).all() and not part[3].any() for part in gradient)
    assert not method.compress(w).dequantize()[3].any()
    assert not method.compress(jnp.zeros_like(w)).dequantize().any()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(format=formats.fp8(rows=None)), "rows=None"),
        (dict(format=integer(search="groups")), "search='groups'"),
        (dict(steps=0), "steps=0 must be positive"),
        (dict(batch=-1), "batch=-1 must be positive"),
        (dict(learning_rate=-1.0), "learning_rate=-1.0"),
    ],
)
def test_refuses_what_it_cannot_do(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        omniquant(**settings)
