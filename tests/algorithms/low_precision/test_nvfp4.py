"""NVFP4 layers against a port of TransformerEngine's reference; what the recipe's parts are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.low_precision import nvfp4
from algorithms.low_precision.nvfp4 import ROWS, SQUARES, nvfp4_product
from algorithms.low_precision.rounding import rounded
from tests.algorithms.low_precision import fp4_official as official


def matrices(seed=0, n=48, i=32, o=64):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(t, jnp.float32)
        for t in (
            rng.normal(size=(n, i)) * 3.0 ** rng.normal(size=(1, i)),
            rng.normal(size=(i, o)) / 8,
            rng.normal(size=(n, o)) / 100,
        )
    )


SIGNS = jnp.asarray(np.random.default_rng(9).choice([-1.0, 1.0], 16), jnp.float32)


@jax.jit
def passed(x, w, g, key):
    """y, ∂x and ∂w."""
    data = jax.random.key_data(key)
    y, pull = jax.vjp(lambda x, w: nvfp4_product(x, w, SIGNS, data), x, w)
    return y, *pull(g)


@pytest.mark.parametrize("format, rows", [(ROWS, 1), (SQUARES, 16)])
def test_rounding_to_the_nearest_is_transformer_engines(format, rows):
    for seed in range(10):
        x = np.asarray(matrices(seed)[0]) * 10.0 ** (seed - 5)
        ours = rounded(jnp.asarray(x), format)
        np.testing.assert_allclose(ours, official.nvfp4(x, rows=rows), rtol=1e-6)


def test_all_three_products_are_transformer_engines():
    """Over ten steps of gradient descent, each with another key."""
    x, w, g = matrices()
    signs = np.asarray(SIGNS)
    for n in range(10):
        key = jax.random.key(n)
        y, dx, dw = passed(x, w, g, key)
        first, second = jax.random.split(key)
        a, b, c = (np.asarray(t) for t in (x, w, g))
        qw = official.nvfp4(b.T, rows=16)
        gt = np.float32(official.rotate(np.float64(c.T), signs))
        xt = np.float32(official.rotate(np.float64(a.T), signs))
        u, v = (
            1 - np.asarray(jax.random.uniform(k, t.shape)) for k, t in ((first, c), (second, gt))
        )
        near(y, official.nvfp4(a) @ qw.T, 0)
        near(dx, official.nvfp4(c, u) @ qw, 0.02)
        near(dw, official.nvfp4(xt) @ official.nvfp4(gt, v).T, 0.02)
        w = w - 0.1 * dw


def near(found, port, off):
    """But for a share of numbers: x / s and x · (1 / s) may fall on two sides of a step."""
    apart = np.abs(found - port) > 1e-5 * np.abs(port).max()
    assert apart.mean() <= off
    assert np.linalg.norm(found - port) < 0.01 * np.linalg.norm(port)


def test_without_rounding_the_gradients_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(nvfp4, "rounded", lambda x, *_: x)
    x, w, g = matrices(n=50, i=30, o=70)
    every = zip(passed(x, w, g, jax.random.key(0)), (x @ w, g @ w.T, x.T @ g), strict=True)
    for found, expected in every:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_weights_are_the_same_in_both_directions():
    """With squares; rows of a matrix and of its transpose are rounded to two different ones."""
    w = matrices()[1]
    np.testing.assert_array_equal(rounded(w, SQUARES), rounded(w.T, SQUARES).T)
    assert (rounded(w, ROWS) != rounded(w.T, ROWS).T).any()


def test_gradients_are_right_on_average():
    """Of gradients that no group's largest number saturates: by ∂x, whose weights are fixed."""
    _, w, g = matrices(n=5, i=16, o=32)
    g = jnp.clip(g, -0.01, 0.01).at[:, ::16].set(0.012)  # every scale is the same power of two
    x = jnp.zeros((5, 16))

    def draw(key):
        data = jax.random.key_data(key)
        return jax.vjp(lambda x: nvfp4_product(x, w, SIGNS, data), x)[1](g)[0]

    samples = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 1500)))
    expected = np.asarray(g @ rounded(w.T, SQUARES))
    z = (samples.mean(0) - expected) / (samples.std(0) / np.sqrt(1500))
    assert np.abs(z).max() < 4.5


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e30, 3e38])
def test_scaling_never_overflows(size):
    x = jnp.asarray(size * np.linspace(-1, 1, 32 * 48).reshape(32, 48), jnp.float32)
    for format in (ROWS, SQUARES):
        for u in (None, jnp.full(x.shape, 0.5)):
            found = rounded(x, format, u)
            assert bool(jnp.isfinite(found).all())
            assert jnp.abs(found).max() <= 1.07 * jnp.abs(x).max()


def test_loses_less_than_one_scale_for_the_tensor():
    x = matrices()[0]
    step = jnp.abs(x).max() / 6
    whole = ROWS.element.format.round(x / step) * step
    assert jnp.linalg.norm(rounded(x, ROWS) - x) < 0.7 * jnp.linalg.norm(whole - x)
