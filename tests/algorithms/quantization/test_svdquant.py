"""SVDQuant against a port of the official code, its theory, and rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.activations import quantized_inputs
from algorithms.quantization.rtn import rtn as rounding
from algorithms.quantization.svdquant import svdquant
from tests.algorithms.integers import gptq, rtn, stochastic_rounding
from tests.algorithms.low_rank import official
from tests.algorithms.low_rank.layers import compress, layer, losing
from tests.algorithms.quantization.test_gptq import equations


@pytest.mark.parametrize("shape", [(12, 20), (30, 20)])
def test_branch_and_residual_are_the_official_ones(shape):
    w, x = layer(0, *shape)
    b, a = official.branch(w, 4)
    seen = []
    keep = losing(0 * w)
    inner = keep._replace(compress=lambda r, stats: seen.append(r) or keep.compress(r, stats))
    tensor = svdquant(rank=4)(inner).compress(jnp.asarray(w, jnp.float32), None)
    np.testing.assert_allclose(tensor.correction.dequantize(), b @ a, atol=4e-3)
    np.testing.assert_allclose(seen[0], w - b @ a, atol=4e-3)
    np.testing.assert_allclose(tensor.dequantize(), w, atol=1e-5)  # nothing is lost by float16


@pytest.mark.parametrize("rank", [1, 5])
def test_the_residual_keeps_the_smaller_singular_values(rank):
    """What is left to quantize: Σ_{j>k} σ_j², and a largest value of σ_{k+1}."""
    w, x = layer(1)
    tensor, _ = compress(svdquant(rank=rank)(losing(0 * w)), w, x)
    s = np.linalg.svd(w, compute_uv=False)
    left = np.linalg.svd(np.asarray(tensor.base.weight), compute_uv=False)
    np.testing.assert_allclose(left[: 12 - rank], s[rank:], rtol=5e-3)


@pytest.mark.parametrize("inner", [rtn(bits=3, group_size=10), gptq(bits=3, group_size=10)])
def test_beats_the_method_alone_where_a_weight_has_outlying_directions(inner):
    w, x = layer(2, o=24)
    rng = np.random.default_rng(2)
    w = w + 5 * np.outer(rng.normal(size=24), rng.normal(size=20))
    plain, stats = compress(inner, w, x)
    tensor, _ = compress(svdquant(rank=2)(inner), w, x)
    method = svdquant(rank=2)(inner)
    errors = [
        method.error(jnp.asarray(w, jnp.float32), t.dequantize(), stats) for t in (tensor, plain)
    ]
    assert errors[0] < 0.25 * errors[1]
    assert (method.observe, method.row_block) == (inner.observe, inner.row_block)


def test_beats_rounding_with_as_many_bits():
    w, x = layer(3, o=64, i=128)
    rng = np.random.default_rng(3)
    w = w + 3 * np.outer(rng.normal(size=64), rng.normal(size=128))
    tensor, _ = compress(svdquant(rank=2)(rtn(bits=3, group_size=32)), w, x)
    plain, _ = compress(rtn(bits=3, group_size=16), w, x)
    assert tensor.storage_bits() <= plain.storage_bits()
    assert np.sum((w - tensor.dequantize()) ** 2) < np.sum((w - plain.dequantize()) ** 2)


def test_the_branch_sees_inputs_unrounded():
    """W4A4: y = Q(R) Q(x) + A B x."""
    w, x = layer(4, i=32)
    method = svdquant(rank=3)(
        quantized_inputs(format=formats.nvfp4())(rounding(format=formats.nvfp4()))
    )
    tensor, _ = compress(method, w, x)
    assert tensor.online
    x = jnp.asarray(x[:5], jnp.float32)
    rounded = tensor.base.rounded(x)
    assert np.abs(rounded - x).max() > 0.01
    expected = rounded @ tensor.base.dequantize().T + x @ tensor.correction.dequantize().T
    np.testing.assert_allclose(tensor.matmul(x), expected, rtol=1e-4, atol=1e-3)


def test_finite_on_dead_inputs_zero_rows_and_zero_layers():
    w, x = layer(5)
    x[:, 5], w[3] = 0, 0
    for inner in (rtn(bits=3, group_size=10), gptq(bits=3, group_size=10)):
        method = svdquant(rank=12)(inner)
        dense = compress(method, w, x)[0].dequantize()
        assert jnp.isfinite(dense).all() and not dense[3].any()
        assert not compress(method, 0 * w, x)[0].dequantize().any()


def test_a_seeded_method_gets_its_key():
    w, x = layer(6)
    method = svdquant(rank=2)(stochastic_rounding(bits=4, group_size=10))
    assert method.seeded
    assert jnp.isfinite(compress(method, w, x)[0].dequantize()).all()


def test_the_graph_does_not_grow_with_width():
    method = svdquant(rank=4)(rtn(bits=3, group_size=10))

    def size(i):
        shape = jax.ShapeDtypeStruct((200, i), jnp.float32)
        return equations(jax.make_jaxpr(lambda w: method.compress(w, None))(shape).jaxpr)

    assert size(100) == size(20) < 400


def test_refuses_a_rank_that_means_nothing():
    with pytest.raises(ValueError, match="rank=0 must be positive"):
        svdquant(rank=0)
