"""Rounding at random: right on average, never more than a step away, worse than nearest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algorithms.integers import rtn, stochastic_rounding

GRIDS = [
    dict(bits=4, group_size=12),
    dict(bits=3, group_size=None, symmetric=True),
    dict(bits=2, group_size=24, search="weights"),
    dict(bits=8, group_size=48, scale_dtype=None),
]


def weights(seed=0, o=6, i=48):
    return np.random.default_rng(seed).normal(size=(o, i)).astype(np.float32)


def quantized(w, key=0, **grid) -> Any:
    key = jax.random.key(key) if isinstance(key, int) else key
    return stochastic_rounding(**grid).compress(jnp.asarray(w), None, key)


def scales(tensor, w):
    return np.repeat(np.asarray(tensor.scale, np.float32), w.shape[1] // tensor.scale.shape[1], 1)


def inside(tensor, w):
    """Weights that the grid's ends do not clip."""
    zero = np.repeat(np.asarray(tensor.zero_point(), np.float32), tensor.group_size, 1)
    code = w / scales(tensor, w) + zero
    return (code >= 0) & (code <= 2**tensor.bits - 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_is_right_on_average(grid):
    """The mean of n draws lies within 5 standard errors, √(p (1 - p) / n) of a step, everywhere."""
    w, n = weights(), 4096
    keys = jax.random.split(jax.random.key(1), n)
    dense = jax.jit(jax.vmap(lambda key: quantized(w, key, **grid).dequantize(jnp.float32)))(keys)
    tensor = quantized(w, **grid)
    s = scales(tensor, w)
    p = w / s - np.floor(w / s)
    error = np.abs(np.asarray(dense, np.float64).mean(0) - w) / s
    within = inside(tensor, w)
    assert (error <= 5 * np.sqrt(p * (1 - p) / n) + 1e-3)[within].all()
    assert within.mean() > 0.7


@pytest.mark.parametrize("grid", GRIDS)
def test_rounds_to_a_neighbour(grid):
    w = weights(2)
    tensor = quantized(w, **grid)
    s = scales(tensor, w)
    steps = np.asarray(tensor.dequantize(jnp.float32) - w)[inside(tensor, w)] / s[inside(tensor, w)]
    assert (np.abs(steps) <= 1 + 1e-5).all() and (np.abs(steps) > 0.5).any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_weight_on_the_grid_stays(symmetric):
    """Far from zero too, where adding u < 1 in float32 would now and then give the next code."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, size=(64, 4096))
    codes[:, 0], codes[:, 1] = 0, 255  # the whole range, so that the grid fitted is this one
    zero = 128 if symmetric else 56
    w = (0.25 * (codes - zero)).astype(np.float32)
    if symmetric:  # its range is a step wider at the lower end
        w = np.maximum(w, -0.25 * 127.5)
        w[:, 0] = -0.25 * 127.5
    tensor = quantized(w, bits=8, group_size=None, symmetric=symmetric)
    moved = np.asarray(tensor.dequantize(jnp.float32)) != w
    assert not moved[codes > 0].any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_stays_zero(symmetric):
    w = weights()
    w[:, 5::7], w[2] = 0, 0
    dense = np.asarray(quantized(w, group_size=12, symmetric=symmetric).dequantize())
    assert not dense[w == 0].any()


def test_the_key_alone_decides():
    w = weights()
    codes = [np.asarray(quantized(w, key, group_size=12).codes()) for key in (3, 3, 4)]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.some(1)
def test_doubles_the_squared_error_of_the_nearest(bits):
    """s²/6 against s²/12 where weights lie anywhere between grid points alike."""
    w = np.random.default_rng(bits).uniform(-1, 1, size=(256, 512)).astype(np.float32)
    grid = dict(bits=bits, group_size=64, scale_dtype=None)
    random = quantized(w, **grid)
    s, within = scales(random, w), inside(random, w)
    nearest = rtn(**grid).compress(jnp.asarray(w), None)
    errors = [
        np.mean((np.asarray(tensor.dequantize() - w) / s)[within] ** 2)
        for tensor in (random, nearest)
    ]
    np.testing.assert_allclose(errors, [1 / 6, 1 / 12], rtol=0.05)


@pytest.mark.parametrize("grid", GRIDS)
def test_jit_equals_eager_and_vmap_equals_the_loop(grid):
    def codes(layer, key):
        return quantized(layer, key, **grid).codes()

    w = jnp.asarray(np.stack([weights(seed) for seed in range(3)]))
    keys = jax.random.split(jax.random.key(5), 3)
    loop = [codes(*pair) for pair in zip(w, keys, strict=True)]
    np.testing.assert_array_equal(jax.jit(codes)(w[0], keys[0]), loop[0])
    np.testing.assert_array_equal(jax.vmap(codes)(w, keys), loop)


def test_stores_the_same_grid_as_the_nearest():
    w = jnp.asarray(weights())
    random, nearest = quantized(w, group_size=12), rtn(group_size=12).compress(w, None)
    np.testing.assert_array_equal(random.scale, nearest.scale)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(random.zero, nearest.zero)  # type: ignore[attr-defined]
    assert random.storage_bits() == nearest.storage_bits()


def test_is_seeded_and_needs_no_data():
    method = stochastic_rounding()
    assert method.seeded and method.observe is None and method.init is None


def test_refuses_groups_that_do_not_divide():
    sentence = r"group_size=48 must divide the input dimension of w, w.shape=\(4, 128\)"
    with pytest.raises(ValueError, match=sentence):
        quantized(np.ones((4, 128), np.float32), group_size=48)
