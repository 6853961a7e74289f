"""ASVD against a port of the official code, and the plain truncation that both begin with."""

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.low_rank.asvd import asvd
from algorithms.low_rank.lqer import MagnitudeStats
from algorithms.low_rank.ranks import Ratio
from algorithms.low_rank.svd import svd
from algorithms.tensors import LowRankTensor
from tests.algorithms.low_rank import factor_official as official
from tests.algorithms.low_rank.layers import compress, layer, output_norm

SHAPES = [(12, 20), (30, 20)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.some(2)
def test_equals_the_official_code(x64, shape, alpha):
    w, x = layer(0, *shape)
    batches = np.split(x, 4)
    a, b = official.asvd(w, batches, 0.6, alpha)
    total = jnp.asarray(sum(np.abs(x).sum(0) for x in batches))
    tensor = asvd(ratio=0.6, alpha=alpha, dtype="float64").compress(
        jnp.asarray(w), MagnitudeStats(total)
    )
    tensor.validate()
    np.testing.assert_allclose(tensor.dequantize(), a @ b, atol=1e-4)  # 1e-6 is added there


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_the_nearest_matrix_of_its_rank(shape):
    w, x = layer(1, *shape)
    tensor, stats = compress(svd(ratio=0.6), w, x)
    assert stats is None and isinstance(tensor, LowRankTensor)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    k = tensor.rank
    np.testing.assert_allclose(tensor.dequantize(), u[:, :k] * s[:k] @ vt[:k], atol=6e-3)
    np.testing.assert_allclose(
        np.sum((w - np.asarray(tensor.dequantize())) ** 2), np.sum(s[k:] ** 2), rtol=1e-3
    )


def test_without_weighing_inputs_it_is_the_svd(x64):
    w, x = layer(2)
    stats = MagnitudeStats(jnp.asarray(np.abs(x).sum(0)))
    found = asvd(alpha=0, dtype="float64").compress(jnp.asarray(w), stats)
    plain = svd(dtype="float64").compress(jnp.asarray(w), None)
    np.testing.assert_allclose(found.dequantize(), plain.dequantize(), atol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.some(1)
def test_it_is_the_best_of_its_rank_in_its_own_norm(alpha):
    w, x = layer(3)
    tensor, stats = compress(asvd(ratio=0.5, alpha=alpha), w, x)
    method = asvd(ratio=0.5, alpha=alpha)
    error = method.error(jnp.asarray(w, jnp.float32), tensor.dequantize(), stats)
    scaled = w * np.abs(x).mean(0) ** alpha
    s = np.linalg.svd(scaled, compute_uv=False)
    np.testing.assert_allclose(error, np.sum(s[tensor.rank :] ** 2) / np.sum(s**2), rtol=1e-3)
    plain, _ = compress(svd(ratio=0.5), w, x)
    assert error < method.error(jnp.asarray(w, jnp.float32), plain.dequantize(), stats)


def test_it_loses_less_of_the_output_where_inputs_differ_in_size():
    """Uncorrelated inputs, of a hundredfold spread: where its norm is nearly that of the output."""
    w, _ = layer(4, o=32, i=64)
    x = np.random.default_rng(0).normal(size=(400, 64)) * np.geomspace(0.1, 10, 64)
    lost = [
        output_norm(w - compress(method, w, x)[0].dequantize(), x)
        for method in (asvd(ratio=0.5, alpha=1.0), asvd(ratio=0.5), svd(ratio=0.5))
    ]
    assert lost[0] < lost[1] < lost[2]


@pytest.mark.parametrize("method", [svd(), asvd()])
def test_finite_on_dead_inputs_zero_rows_and_zero_layers(method):
    w, x = layer(5)
    x[:, 5], w[3] = 0, 0
    for inputs in (x, 0 * x):
        dense = compress(method, w, inputs)[0].dequantize()
        assert jnp.isfinite(dense).all() and not dense[3].any()
    assert not compress(method, 0 * w, x)[0].dequantize().any()


@pytest.mark.parametrize("multiple", [1, 4])
def test_ranks_are_those_that_a_ratio_pays_for(multiple):
    for shape in ((576, 576), (192, 576), (1536, 576)):
        o, i = shape
        k = Ratio(ratio=0.8, rank_multiple=multiple).rank(shape)
        assert k % multiple == 0 and k * (o + i) <= 0.8 * o * i < (k + multiple) * (o + i)
    assert Ratio(ratio=0.8).rank((192, 576)) == official.rank((192, 576), 0.8)


def test_refuses_settings_that_mean_nothing():
    with pytest.raises(ValueError, match=r"alpha=-1 must not be negative"):
        asvd(alpha=-1)
    for method in (svd, asvd):
        with pytest.raises(ValueError, match="ratio=1.5 must be between 0 and 1"):
            method(ratio=1.5)
