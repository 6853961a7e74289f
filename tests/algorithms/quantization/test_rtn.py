"""Rounding against a port of the official GPTQ code's quantizer, and what a grid promises."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.algorithms.integers import rtn
from tests.algorithms.quantization import gptq_official as official


def weights(seed=0, o=6, i=48):
    """W [o, i] with negative weights and a positive largest magnitude in every group of 12.

    The official symmetric grid halves itself where a group has no negative weight (papers/gptq.md,
    deviation 2), and minus the largest magnitude is a tie (deviation 5).
    """
    w = np.random.default_rng(seed).normal(size=(o, i))
    w[:, ::12] = -np.abs(w[:, ::12])
    w[:, 3::12] = 1.5 * np.abs(w.reshape(o, -1, 12)).max(2)
    return w


def quantized(w, **grid) -> Any:
    """A QuantizedTensor, with unrounded scales unless `grid` says otherwise."""
    return rtn(**{"scale_dtype": None} | grid).compress(jnp.asarray(w), None)


@pytest.mark.parametrize("search", [None, "weights"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 12, 48])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.some(14)
def test_equals_the_official_quantizer(bits, group_size, symmetric, search):
    w = weights(bits)
    with jax.enable_x64(True):
        options = dict(bits=bits, symmetric=symmetric, search=search)
        tensor = quantized(w, group_size=group_size, **options)
        for n, piece in enumerate(np.split(w, 48 // tensor.group_size, axis=1)):
            grid = official.find_params(piece, bits, symmetric, mse=search is not None)
            columns = slice(n * tensor.group_size, (n + 1) * tensor.group_size)
            np.testing.assert_array_equal(tensor.codes()[:, columns], grid.quantize(piece))
            np.testing.assert_allclose(tensor.scale[:, n], grid.scale, rtol=1e-12)
            np.testing.assert_array_equal(tensor.zero_point()[:, n], grid.zero)


def test_needs_no_data():
    method = rtn()
    assert method.observe is None and method.init is None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [None, "float16", "bfloat16", "float32"])
@pytest.mark.some(3)
def test_no_weight_moves_by_more_than_its_range_allows(symmetric, scale_dtype):
    """Half a scale inside; the ends pay for an integer zero point and a rounded scale."""
    w = weights().astype(np.float32)
    tensor = quantized(w, group_size=12, symmetric=symmetric, scale_dtype=scale_dtype)
    scale = np.repeat(np.asarray(tensor.scale, np.float32), 12, axis=1)
    error = np.abs(tensor.dequantize() - w)
    inside = (tensor.codes() > 0) & (tensor.codes() < 15)
    assert (error <= 0.5001 * scale)[inside].all()
    assert (error <= 1.1 * scale).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_stays_zero(symmetric):
    w = weights().astype(np.float32)
    w[:, 5::7], w[2] = 0, 0
    dense = np.asarray(quantized(w, group_size=12, symmetric=symmetric).dequantize())
    assert not dense[w == 0].any()


def test_more_bits_and_smaller_groups_round_finer():
    w = np.random.default_rng(1).standard_t(3, size=(32, 256)).astype(np.float32)

    def error(**grid):
        return float(jnp.sum((quantized(w, **grid).dequantize() - w) ** 2))

    by_bits = [error(bits=bits, group_size=64) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_group = [error(bits=4, group_size=g) for g in (None, 64, 16)]
    assert by_group == sorted(by_group, reverse=True)
    assert error(bits=4, group_size=64) < error(bits=4, group_size=64, symmetric=True)


def test_search_lowers_the_error_it_searches_on():
    w = np.random.default_rng(2).standard_t(3, size=(32, 64)).astype(np.float32)
    whole, clipped = (
        np.asarray(quantized(w, bits=3, search=search).dequantize()) for search in (None, "weights")
    )
    norms = [(np.abs(dense - w) ** 2.4).sum(1) for dense in (whole, clipped)]
    assert (norms[1] <= norms[0] * 1.00001).all() and (norms[1] < norms[0]).any()


@pytest.mark.parametrize(
    ("grid", "bits_per_weight"),
    [
        (dict(bits=4, group_size=64), 4 + 16 / 64 + 8 / 64),
        (dict(bits=4, group_size=64, symmetric=True), 4 + 16 / 64),
        (dict(bits=8, group_size=None, scale_dtype="float32"), 8 + 32 / 128 + 8 / 128),
    ],
)
def test_storage_counts_scales_and_zero_points(grid, bits_per_weight):
    tensor = rtn(**grid).compress(jnp.ones((4, 128)), None)
    assert tensor.storage_bits() == bits_per_weight * 4 * 128


@pytest.mark.parametrize("symmetric", [False, True])
def test_jit_equals_eager_and_vmap_equals_the_loop(symmetric):
    def codes(layer):
        return quantized(layer, bits=3, group_size=12, symmetric=symmetric).codes()

    w = jnp.asarray(np.stack([weights(seed) for seed in range(3)]), jnp.float32)
    loop = [codes(layer) for layer in w]
    np.testing.assert_array_equal(jax.jit(codes)(w[0]), loop[0])
    np.testing.assert_array_equal(jax.vmap(codes)(w), loop)


@pytest.mark.parametrize("bits", [1, 9])
def test_refuses_bits_outside_2_to_8(bits):
    with pytest.raises(ValueError, match=f"bits={bits} must be from 2 to 8"):
        rtn(bits=bits)


def test_refuses_groups_that_do_not_divide():
    sentence = r"group_size=48 must divide the input dimension of w, w.shape=\(4, 128\)"
    with pytest.raises(ValueError, match=sentence):
        rtn(group_size=48).compress(jnp.ones((4, 128)), None)
