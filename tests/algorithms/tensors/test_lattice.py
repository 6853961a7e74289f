"""The tensor of lattice codes: what it stands for, what it costs, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import lattice
from algorithms.tensors.lattice import LatticeTensor


def tensor(bits, o=6, m=5) -> LatticeTensor:
    rng = np.random.default_rng(bits)
    x = jnp.asarray(rng.normal(size=(o * m, 8)), jnp.float32)
    (codes, residual), _ = jax.jit(lattice.approximate, static_argnums=1)(x, bits)
    scale = jnp.asarray(rng.uniform(0.5, 2, size=o), jnp.float16)
    residual = None if residual is None else residual.reshape(o, m)
    return LatticeTensor(codes.reshape(o, m), residual, scale, bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_stands_for_its_points_times_its_scales(bits):
    t = tensor(bits)
    t.validate()
    dense = np.zeros((6, 40), np.float32)
    points = np.asarray(lattice.reconstruct(t.codes, t.residual, bits))
    for row, k in np.ndindex(6, 5):
        dense[row, 8 * k : 8 * k + 8] = np.float32(t.scale[row]) * points[row, k]
    assert t.shape == (6, 40)
    np.testing.assert_array_equal(t.dequantize(), dense)
    assert t.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40)), jnp.float32)
    np.testing.assert_allclose(t.matmul(x), np.asarray(x) @ dense.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_costs_its_bits_and_16_for_each_row(bits):
    assert tensor(bits).storage_bits() == 6 * 40 * bits + 6 * 16


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.some(1)
def test_splits_into_complete_pieces(bits):
    t = tensor(bits)
    pieces = t.split([1, 2, 3])
    for piece in pieces:
        piece.validate()
    joined = jnp.concatenate([piece.dequantize() for piece in pieces])
    np.testing.assert_array_equal(joined, t.dequantize())


def test_batches():
    layers = [tensor(3), dataclasses.replace(tensor(3), scale=jnp.ones(6, jnp.float16))]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    dense = jax.vmap(LatticeTensor.dequantize)(stacked)
    for n in range(2):
        np.testing.assert_array_equal(dense[n], layers[n].dequantize())


@pytest.mark.parametrize(
    ("bits", "change", "message"),
    [
        (2, dict(bits=5), "bits=5 must be 2, 3 or 4"),
        (2, dict(scale=jnp.ones(5)), r"codes uint16\(6, 5\) must be uint16, a row for each"),
        (2, dict(codes=jnp.zeros((6, 5), jnp.int32)), r"codes int32\(6, 5\) must be uint16"),
        (2, dict(bits=3), "residual None is not what bits=3"),
        (3, dict(bits=4), "is not what bits=4"),
        (3, dict(residual=jnp.zeros((6, 4), jnp.uint8)), r"is not what bits=3 and codes.shape"),
    ],
)
def test_refuses_parts_that_do_not_fit(bits, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tensor(bits), **change).validate()
