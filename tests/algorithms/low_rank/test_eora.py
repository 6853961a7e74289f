"""EoRA against a port of the official code, its theory, and other corrections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import hessian
from algorithms.low_rank.eora import eora
from algorithms.low_rank.lqer import lqer
from algorithms.low_rank.projection import leading_in_output
from tests.algorithms.integers import gptq, rtn
from tests.algorithms.low_rank import official
from tests.algorithms.low_rank.layers import compress, layer, losing, observed, output_norm
from tests.algorithms.quantization.test_gptq import equations

SHAPES = [(12, 20), (30, 20)]  # through E G Eᵀ, and through Q'


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5])
def test_equals_the_official_code(shape, rank):
    e, x = layer(rank, *shape)
    b, a = official.eora(e, official.eora_moment([x]), rank)  # one batch: plain X Xᵀ
    with jax.enable_x64(True):
        u = leading_in_output(jnp.asarray(e), jnp.asarray(x.T @ x), rank)
        np.testing.assert_allclose(u @ (u.T @ e), b @ a, atol=1e-8)
    tensor, _ = compress(eora(rank=rank)(losing(e)), 0 * e, x)
    np.testing.assert_allclose(tensor.correction.dequantize(), b @ a, atol=5e-3)


def test_deviation_1_all_windows_count_alike():
    _, x = layer(2)
    batches = np.split(x, 4)
    theirs = official.eora_moment(batches)
    assert np.abs(theirs / theirs[0, 0] - x.T @ x / (x.T @ x)[0, 0]).max() > 1e-3
    stats = observed(eora()(losing(0 * x[:12])), [b.astype(np.float32) for b in batches])
    np.testing.assert_allclose(stats.own.gram, x.T @ x, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.some(2)
def test_leaves_the_discarded_singular_values_and_no_other_correction_less(shape, rank):
    e, x = layer(3, *shape)
    tensor, _ = compress(eora(rank=rank)(losing(e)), 0 * e, x)
    left = output_norm(e - tensor.correction.dequantize(), x)
    values, q = np.linalg.eigh(x.T @ x)
    s = np.linalg.svd(e @ (q * np.sqrt(np.maximum(values, 0))), compute_uv=False)
    np.testing.assert_allclose(left, np.sum(s[rank:] ** 2), rtol=1e-3)

    for scaled in (True, False):
        other, _ = compress(lqer(rank=rank, scaled=scaled)(losing(e)), 0 * e, x)
        assert left < output_norm(e - other.correction.dequantize(), x)
    rng, root = np.random.default_rng(0), np.linalg.cholesky(x.T @ x)
    for _ in range(20):  # the best correction in a row space at random, in the same norm
        inputs = np.linalg.qr(root.T @ rng.normal(size=(20, rank)))[0]
        assert left < np.sum((e @ root - e @ root @ inputs @ inputs.T) ** 2)
    assert left < output_norm(e, x)


@pytest.mark.parametrize("inner", [rtn(bits=3, group_size=10), gptq(bits=3, group_size=10)])
def test_lowers_the_output_error_of_the_method_within(inner):
    w, x = layer(4, o=24)
    method = eora(rank=6)(inner)
    plain, _ = compress(inner, w, x)
    tensor, stats = compress(method, w, x)
    np.testing.assert_array_equal(tensor.base.codes(), plain.codes())
    assert output_norm(w - tensor.dequantize(), x) < 0.7 * output_norm(w - plain.dequantize(), x)
    error = method.error(jnp.asarray(w, jnp.float32), tensor.dequantize(), stats)
    expected = output_norm(w - tensor.dequantize(), x) / output_norm(w, x)
    np.testing.assert_allclose(error, expected, rtol=1e-3)


def test_statistics_that_the_method_has_are_not_gathered_twice():
    shared, own = (eora()(inner) for inner in (gptq(), rtn()))
    assert shared.observe is hessian.observe and shared.init is hessian.init
    stats = observed(own, [np.ones((3, 4), np.float32)])
    assert stats.inner is None and stats.own.gram.shape == (4, 4)
    assert own.notes(stats)["dead_inputs"] == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inner", [rtn(bits=3, group_size=10), gptq(bits=3, group_size=10)])
@pytest.mark.some(2)
def test_finite_on_dead_inputs_zero_rows_and_zero_layers(shape, inner):
    """Where the official code divides by the roots of zero eigenvalues."""
    w, x = layer(5, *shape)
    x[:, 5], w[3] = 0, 0
    method = eora(rank=11)(inner)
    for inputs in (x, x[:3], 0 * x):
        dense = compress(method, w, inputs)[0].dequantize()
        assert jnp.isfinite(dense).all() and not dense[3].any()
    tensor, stats = compress(method, 0 * w, x)
    assert not tensor.dequantize().any()
    assert method.error(jnp.zeros(shape), tensor.dequantize(), stats) == 0


def test_beats_rounding_with_as_many_bits():
    w, x = layer(6, o=64, i=128, n=300)
    tensor, _ = compress(eora(rank=2)(rtn(bits=3, group_size=32)), w, x)
    plain, _ = compress(rtn(bits=3, group_size=16), w, x)
    assert tensor.storage_bits() <= plain.storage_bits()
    assert output_norm(w - tensor.dequantize(), x) < output_norm(w - plain.dequantize(), x)


@pytest.mark.parametrize("o", [10, 200])
def test_the_graph_does_not_grow_with_width(o):
    def size(i):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((o, i), (i, i))]
        return equations(jax.make_jaxpr(lambda e, g: leading_in_output(e, g, 4))(*shapes).jaxpr)

    assert size(100) == size(20) < 200


def test_refuses_a_rank_that_means_nothing():
    with pytest.raises(ValueError, match="rank=-1 must be positive"):
        eora(rank=-1)
