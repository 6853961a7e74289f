import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.activations import quantized_inputs
from algorithms.tensors import DenseTensor
from algorithms.tensors.low_rank import LowRankTensor, SumTensor
from tests.algorithms.integers import rtn


@functools.cache
def parts():
    """W [10, 16] rounded, a correction of rank 3, and activations of the same magnitude."""
    rng = np.random.default_rng(0)
    w, a, b, x = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((10, 16), (10, 3), (3, 16), (2, 5, 16))
    )
    base = rtn(bits=3, group_size=8).compress(w, None)
    return base, LowRankTensor(a.astype(jnp.float16), b.astype(jnp.float16)), x


def dense(correction):
    return np.asarray(correction.a, np.float64) @ np.asarray(correction.b, np.float64)


def test_a_low_rank_tensor_is_its_product():
    _, correction, x = parts()
    correction.validate()
    assert (correction.shape, correction.rank) == ((10, 16), 3)
    np.testing.assert_allclose(correction.dequantize(), dense(correction), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(correction.matmul(x), x @ dense(correction).T, rtol=1e-4, atol=1e-4)
    assert correction.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    assert correction.matmul(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_sum_is_both_side_by_side():
    base, correction, x = parts()
    tensor = SumTensor(base, correction)
    tensor.validate()
    expected = np.asarray(base.dequantize(), np.float64) + dense(correction)
    np.testing.assert_allclose(tensor.dequantize(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tensor.matmul(x), x @ expected.T, rtol=1e-4, atol=1e-4)
    assert not tensor.online
    unpacked = tensor.unpacked(jnp.float32)
    assert isinstance(unpacked, DenseTensor)
    np.testing.assert_array_equal(unpacked.weight, tensor.dequantize())


def test_the_correction_of_a_layer_that_rounds_its_input_sees_the_input_unrounded():
    base, correction, x = parts()
    rounding = quantized_inputs(format=formats.integer(bits=2, group_size=None, symmetric=True))
    inner = rounding(rtn(bits=3)._replace(compress=lambda w, stats: base)).compress(None, None)
    tensor = SumTensor(inner, correction)
    assert tensor.online
    rounded = np.asarray(inner.rounded(x), np.float64)
    assert np.abs(rounded - x).max() > 0.1
    expected = rounded @ np.asarray(base.dequantize(), np.float64).T + x @ dense(correction).T
    for form in (tensor, tensor.unpacked(jnp.float32)):
        assert form.online
        np.testing.assert_allclose(form.matmul(x), expected, rtol=1e-4, atol=1e-4)


def test_pieces_are_complete_and_every_stored_byte_is_counted():
    base, correction, x = parts()
    tensor = SumTensor(base, correction)
    assert correction.storage_bits() == 16 * 3 * (10 + 16)
    assert tensor.storage_bits() == base.storage_bits() + correction.storage_bits()
    pieces = tensor.split([4, 6])
    for piece, rows in zip(pieces, (slice(4), slice(4, 10)), strict=True):
        piece.validate()
        np.testing.assert_array_equal(piece.correction.b, correction.b)
        np.testing.assert_allclose(piece.matmul(x), tensor.matmul(x)[..., rows], atol=1e-4)
    spent = sum(piece.storage_bits() for piece in pieces)
    assert spent == tensor.storage_bits() + 16 * 3 * 16  # B is copied


def test_both_pass_through_jit():
    base, correction, x = parts()
    tensor = SumTensor(base, correction)
    made = jax.jit(lambda tensor: tensor)(tensor)
    assert jax.tree.structure(made) == jax.tree.structure(tensor)
    np.testing.assert_allclose(
        jax.jit(lambda t, x: t.matmul(x))(tensor, x), tensor.matmul(x), rtol=1e-4, atol=1e-4
    )


def test_refuses_parts_that_do_not_fit():
    base, correction, _ = parts()
    with pytest.raises(
        ValueError, match=r"a.shape=\(10, 3\) and b.shape=\(2, 16\) have no product"
    ):
        LowRankTensor(correction.a, correction.b[:2]).validate()
    with pytest.raises(
        ValueError, match=r"base.shape=\(10, 16\) is not correction.shape=\(4, 16\)"
    ):
        SumTensor(base, correction.split([4, 6])[0]).validate()


def test_factors_may_be_compressed_themselves():
    _, plain, x = parts()
    method = rtn(bits=8, group_size=None)
    compress = jax.jit(lambda f: method.compress(f.astype(jnp.float32), None))
    a, b = compress(plain.a), compress(plain.b)
    tensor = LowRankTensor(a, b)
    tensor.validate()
    assert (tensor.shape, tensor.rank, tensor.online) == ((10, 16), 3, False)
    assert tensor.storage_bits() == a.storage_bits() + b.storage_bits()
    expected = np.asarray(a.dequantize(), np.float64) @ np.asarray(b.dequantize(), np.float64)
    for form in (tensor, tensor.unpacked(jnp.float32)):
        np.testing.assert_allclose(form.dequantize(), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(form.matmul(x), x @ expected.T, rtol=1e-4, atol=1e-4)
    assert tensor.unpacked(jnp.float16).a.dtype == jnp.float16
    for piece, rows in zip(tensor.split([4, 6]), (slice(4), slice(4, 10)), strict=True):
        piece.validate()
        np.testing.assert_allclose(piece.dequantize(), expected[rows], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="have no product"):
        LowRankTensor(a, b.split([2, 1])[0]).validate()
