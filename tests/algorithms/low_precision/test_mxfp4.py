"""MXFP4 gradients against a port of the official code; unbiased; exact without rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms.low_precision import mxfp4
from algorithms.low_precision.mxfp4 import estimated, mxfp4_product
from algorithms.low_precision.rounding import rounded, stochastic
from algorithms.minifloat import E2M1, E4M3
from kernels import dispatch
from tests.algorithms.low_precision import fp4_official as official


def matrices(seed=0, n=64, i=32, o=128):
    rng = np.random.default_rng(seed)
    heavy = rng.normal(size=(n, i)) * 4.0 ** rng.normal(size=(1, i))
    return tuple(
        jnp.asarray(t, jnp.float32)
        for t in (heavy, rng.normal(size=(i, o)) / 8, rng.normal(size=(n, o)) / 100)
    )


@jax.jit
def passed(x, w, g, key):
    """y, ∂x and ∂w."""
    y, pull = jax.vjp(lambda x, w: mxfp4_product(64, x, w, jax.random.key_data(key)), x, w)
    return y, *pull(g)


def by_port(a, b, key):
    """`estimated` with the same draws."""
    signs, *own = jax.random.split(key, 3)
    s = np.asarray(jax.random.rademacher(signs, (64,), jnp.float32))
    both = []
    for t, k in zip((a, b), own, strict=True):
        t = np.float32(official.rotate(np.float64(t), s))
        both.append(official.mxfp4_dither(t, 1 - np.asarray(jax.random.uniform(k, t.shape))))
    return both[0].astype(np.float64) @ both[1].T.astype(np.float64)


def test_is_the_official_code():
    """Both gradients over ten steps of gradient descent, each with another key."""
    x, w, g = matrices()
    for n in range(10):
        key = jax.random.key(n)
        _, dx, dw = passed(x, w, g, key)
        first, second = jax.random.split(key)
        for found, port in ((dx, by_port(g, w, first)), (dw, by_port(x.T, g.T, second))):
            # Rotations in float32 and float64 may fall on two sides of a step: a few numbers do.
            off = np.abs(found - port) > 1e-5 * np.abs(port).max()
            assert off.mean() < 0.02
            assert np.linalg.norm(found - port) < 0.01 * np.linalg.norm(port)
        w = w - 0.1 * dw


def test_rounding_alone_is_the_official_code_to_the_last_bit():
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(64, 96)) * 10.0 ** rng.integers(-6, 6, size=(64, 1)))
    u = np.float32(rng.uniform(size=x.shape))
    ours = rounded(jnp.asarray(x), mxfp4.FORMAT, jnp.asarray(u), mxfp4.SHRINK)
    np.testing.assert_allclose(ours, official.mxfp4_dither(x, 1 - u), rtol=3e-7)


def z_scores(draw, expected, count=1500):
    samples = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), count)))
    deviation = np.maximum(samples.std(0), 1e-12) / np.sqrt(count)
    return (samples.mean(0) - np.asarray(expected)) / deviation, deviation


def test_its_gradients_are_right_on_average():
    """Also with a group's largest number at the edge of its scale, which would saturate."""
    x, w, _ = matrices(n=6, i=64, o=5)
    x = x.at[:, 0].set(7.9)
    z, deviation = z_scores(lambda key: estimated(x, w.T, key, 64), x @ w)
    assert np.abs(z).max() < 4.5  # of 30 numbers
    nearest = rounded(x, mxfp4.FORMAT) @ rounded(w.T, mxfp4.FORMAT).T
    assert np.abs((nearest - x @ w) / deviation).max() > 20  # which is not


@pytest.mark.parametrize("form", [E2M1, E4M3])
def test_stochastic_rounding_goes_to_neighbours_and_is_right_on_average(form):
    x = jnp.asarray(np.random.default_rng(0).uniform(-form.peak, form.peak, 200), jnp.float32)

    def draw(key):
        return stochastic(x, form, jax.random.uniform(key, x.shape))

    assert np.abs(z_scores(draw, x)[0]).max() < 5
    low, high = draw_range(draw)
    np.testing.assert_array_equal(form.round(low), low)
    np.testing.assert_array_equal(form.round(high), high)
    middle = form.round(low + (high - low) / 2)  # nothing lies between
    assert bool(((middle == low) | (middle == high)).all())
    exact = form.round(x)
    np.testing.assert_array_equal(stochastic(exact, form, jnp.full(x.shape, 0.9999)), exact)


def draw_range(draw):
    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 2000))
    return samples.min(0), samples.max(0)


def test_what_is_out_of_range_saturates():
    x = jnp.array([7.0, -1e30, 6.0, 0.0])
    np.testing.assert_array_equal(stochastic(x, E2M1, jnp.zeros(4)), [6.0, -6.0, 6.0, 0.0])


def test_without_rounding_the_gradients_are_the_plain_ones(monkeypatch):
    """Rotations cancel; axes that are no whole blocks too."""
    monkeypatch.setattr(mxfp4, "rounded", lambda x, *_: x)
    x, w, g = matrices(n=50, i=32, o=70)
    y, *found = passed(x, w, g, jax.random.key(0))
    np.testing.assert_array_equal(y, x @ w)
    for ours, expected in zip(found, (g @ w.T, x.T @ g), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_rotation_lowers_the_variance_where_there_are_outliers():
    x, w, _ = matrices(i=128, o=16)
    x = x.at[:, 3].mul(100.0)

    @functools.partial(jax.jit, static_argnums=0)
    def lost(rotation):
        keys = jax.random.split(jax.random.key(0), 16)
        found = jax.vmap(lambda key: estimated(x, w.T, key, rotation))(keys)
        return jnp.mean((found - x @ w) ** 2)

    assert lost(64) < 0.7 * lost(None)


def test_each_pass_draws_anew_and_the_same_again():
    def model():
        return mxfp4.MXFP4Linear(nnx.Linear(32, 64, rngs=nnx.Rngs(0)), jax.random.key(5), 64)

    x, _, g = matrices(o=64)

    def gradients(made, count):
        def total(made):
            return jnp.sum(made(x) * g)

        return [nnx.grad(total)(made)["kernel"][...] for _ in range(count)]

    first, again = gradients(model(), 3), gradients(model(), 3)
    assert len({np.asarray(t).tobytes() for t in first}) == 3
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert dispatch.choices()["mxfp4_product"]["implementation"] == "emulated"


@pytest.mark.parametrize("rotation", [16, 48])
def test_bad_settings_are_named(rotation):
    with pytest.raises(ValueError, match=f"rotation={rotation} must be a power of two from 32"):
        mxfp4.mxfp4(rotation=rotation)
