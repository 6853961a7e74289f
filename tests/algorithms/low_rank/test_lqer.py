"""LQER against a port of the official code, its theory, and rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.low_rank import projection
from algorithms.low_rank.lqer import init, lqer, observe
from tests.algorithms.integers import gptq, rtn, stochastic_rounding
from tests.algorithms.low_rank import official
from tests.algorithms.low_rank.layers import compress, layer, losing
from tests.algorithms.quantization.test_gptq import equations


@pytest.mark.parametrize("shape", [(12, 20), (30, 20), (20, 20)])
@pytest.mark.parametrize("rank", [1, 5])
def test_equals_the_official_code(shape, rank):
    e, x = layer(rank, *shape)
    a, b = official.lqer(e, official.lqer_scale([x]), rank)
    with jax.enable_x64(True):
        stats = observe(init(20), jnp.asarray(x))
        u = projection.leading(jnp.asarray(e) * stats.total, rank)
        np.testing.assert_allclose(u @ (u.T @ e), (a @ b).T, atol=1e-9)
    tensor, _ = compress(lqer(rank=rank)(losing(e)), 0 * e, x)
    np.testing.assert_allclose(tensor.correction.dequantize(), (a @ b).T, atol=4e-3)


@pytest.mark.parametrize("shape", [(12, 20), (30, 20)])
def test_without_scales_it_is_the_truncated_singular_value_decomposition(shape):
    e, x = layer(3, *shape)
    method = lqer(rank=4, scaled=False)(losing(e))
    assert method.observe is None  # data-free as the method within
    tensor, _ = compress(method, 0 * e, x)
    u, s, vt = np.linalg.svd(e, full_matrices=False)
    np.testing.assert_allclose(tensor.correction.dequantize(), u[:, :4] * s[:4] @ vt[:4], atol=4e-3)
    left = np.sum((e - tensor.correction.dequantize()) ** 2)
    np.testing.assert_allclose(left, np.sum(s[4:] ** 2), rtol=1e-3)


def test_deviation_1_the_mean_over_all_tokens_for_the_largest_batch_mean():
    """With one batch both are the same; S counts up to a factor."""
    _, x = layer(4)
    mine = observe(
        observe(init(20), jnp.asarray(x[:30], jnp.float32)), jnp.asarray(x[30:], jnp.float32)
    )
    ratio = np.asarray(mine.total) / official.lqer_scale([x])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_error_falls_with_the_rank_to_nothing(scaled):
    """In the norm that it minimises: ‖(E - A B) S‖."""
    e, x = layer(5)
    size = np.abs(x).sum(0) if scaled else np.ones(20)
    left = []
    for rank in (1, 3, 6, 12, 32):
        tensor, _ = compress(lqer(rank=rank, scaled=scaled)(losing(e)), 0 * e, x)
        assert tensor.correction.rank == min(rank, 12)
        left.append(np.sum(((e - tensor.correction.dequantize()) * size) ** 2))
    assert (np.diff(left[:4]) < 0).all()
    assert left[-1] < 1e-5 * left[0]


@pytest.mark.parametrize("inner", [rtn(bits=3, group_size=10), gptq(bits=3, group_size=10)])
def test_corrects_what_the_method_within_loses(inner):
    w, x = layer(6, o=24)
    plain, _ = compress(inner, w, x)
    tensor, stats = compress(lqer(rank=6)(inner), w, x)
    np.testing.assert_array_equal(tensor.base.codes(), plain.codes())
    size = np.abs(x).sum(0)
    before, after = (np.sum(((w - t.dequantize()) * size) ** 2) for t in (plain, tensor))
    assert after < 0.7 * before
    method = lqer(rank=6)(inner)
    error = method.error(jnp.asarray(w, jnp.float32), tensor.dequantize(), stats)
    assert 0 < error < 1
    assert (method.row_block, method.notes is None) == (inner.row_block, inner.notes is None)


def test_beats_rounding_with_as_many_bits():
    """Two numbers in 16 bits per row and column against groups of half the size, where two channels
    are much larger than the rest."""
    w, x = layer(7, o=64, i=128, n=300)
    x[:, [3, 50]] *= 300
    tensor, _ = compress(lqer(rank=2)(rtn(bits=3, group_size=32)), w, x)
    plain, _ = compress(rtn(bits=3, group_size=16), w, x)
    assert tensor.storage_bits() <= plain.storage_bits()
    size = np.abs(x).sum(0)
    assert np.sum(((w - tensor.dequantize()) * size) ** 2) < np.sum(
        ((w - plain.dequantize()) * size) ** 2
    )


def test_a_seeded_method_gets_its_key():
    w, x = layer(8)
    method = lqer(rank=2)(stochastic_rounding(bits=3, group_size=10))
    assert method.seeded
    tensor, _ = compress(method, w, x)
    plain, _ = compress(stochastic_rounding(bits=3, group_size=10), w, x)
    np.testing.assert_array_equal(tensor.base.codes(), plain.codes())


@pytest.mark.parametrize("scaled", [True, False])
def test_finite_on_dead_inputs_zero_rows_and_zero_layers(scaled):
    w, x = layer(9)
    x[:, 5], w[3] = 0, 0
    method = lqer(rank=8, scaled=scaled)(rtn(bits=3, group_size=10))
    for inputs in (x, 0 * x):
        dense = compress(method, w, inputs)[0].dequantize()
        assert jnp.isfinite(dense).all() and not dense[3].any()
    assert not compress(method, 0 * w, x)[0].dequantize().any()


def test_the_graph_does_not_grow_with_width():
    method = lqer(rank=4)(rtn(bits=3, group_size=10))

    def size(i):
        def run(w, x):
            return method.compress(w, method.observe(method.init(i), x))

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((200, i), (30, i))]
        return equations(jax.make_jaxpr(run)(*shapes).jaxpr)

    assert size(100) == size(20) < 400


def test_refuses_a_rank_that_means_nothing():
    with pytest.raises(ValueError, match="rank=0 must be positive"):
        lqer(rank=0)
